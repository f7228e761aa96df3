"""Structure: which channels are coupled, read off the program itself, and the smaller model."""
