"""Rules to config: what is pruned, in which units, and how many of them."""
