"""Adapters between purepruning and the frameworks models are written in.

One module per framework, and each imports its own framework only: ``purepruning_interop.linen``,
``.nnx``, ``.equinox``, ``.haiku``, ``.keras`` and ``.torch``. Import the one you need; this package
imports nothing.
"""
