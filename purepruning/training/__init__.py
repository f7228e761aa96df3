"""Pruning during training: Optax transforms, lottery tickets, ADMM, movement pruning."""
