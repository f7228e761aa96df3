"""How atoms flow through ATen operators, one module for each kind."""
