"""A check of error messages that names what must be in them, not their wording."""

import contextlib

import pytest


@contextlib.contextmanager
def raises(error, *parts):
    """Expects ``error``, and every part in its message."""
    with pytest.raises(error) as caught:
        yield
    missing = [part for part in map(str, parts) if part not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
