"""A program with other sizes, as a graph module."""
