"""How atoms flow through the primitives of JAX, one module for each kind."""
