"""The entry of the console script ``purepruning``."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from typing import Any

#: Exit status where the packages of the extra are missing.
MISSING = 1


def main() -> int:
    """Returns the exit status of the command that the process's arguments name."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    absent = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if absent:
        print(
            f"purepruning: error: the command needs {' and '.join(absent)}; "
            "pip install 'purepruning[cli]'",
            file=sys.stderr,
        )
        return MISSING
    from purepruning_interop.cli.app import run

    return run(sys.argv[1:])


def _end(number: int, frame: Any) -> None:
    """Removes what is not finished, unless it can be gone on with, and ends the process.

    At once, and not by an exception: extension modules that are being loaded would end it with
    their own words.
    """
    write: Any = sys.modules.get("purepruning_interop.checkpoints.write")
    left = [aside.leave() for aside in tuple(getattr(write, "OPEN", ()))]
    words = "interrupted" if number == signal.SIGINT else "terminated"
    words += "; the same command goes on from there" if any(left) else ""
    os.write(2, f"purepruning: {words}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
