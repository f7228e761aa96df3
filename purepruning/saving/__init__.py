"""Files: masks, states and plans, written whole and checked when they are read."""
