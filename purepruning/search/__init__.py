"""Searches for how much each layer loses, as pure state machines."""
