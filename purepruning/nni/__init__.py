"""NNI: its names and its config lists, in this library's terms."""
