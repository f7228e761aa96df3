"""From a module to its ATen operations: recorded, or exported where that is not enough."""
