"""``purepruning``, the command: one module for each of its own, over the library and the adapters.

``__main__`` is the entry and imports nothing but the standard library, so that it can say what is
missing. :mod:`purepruning_interop.cli.app` puts the commands together; a command's module imports
what it needs when it is called, so that ``--help`` is quick.
"""
