"""Exit statuses, and errors as one line."""

from __future__ import annotations

#: Something given is wrong; wrong usage; the result cannot be written; a bug.
WRONG_INPUT, USAGE, NOT_WRITTEN, BUG = 1, 2, 3, 4


def message_of(error: BaseException) -> str:
    """Returns what an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        file = f": {error.filename!r}" if error.filename is not None else ""
        return f"{error.strerror}{file}"
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    words = " ".join(str(text).split()) or type(error).__name__
    above = "as the error above says"
    if above in words and error.__cause__ is not None:  # which is not shown here
        words = words.replace(above, f"since {message_of(error.__cause__)}")
    return words
