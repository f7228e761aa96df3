"""Pruners: ``(params, stats, config) -> masks``, one file per family."""
