"""The front end of JAX: coupling, shrinking and counting of traced functions."""
