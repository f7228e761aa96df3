"""The entry of the console script ``purepruning``."""

from __future__ import annotations

import importlib.util
import sys

#: Exit status where the packages of the extra are missing.
MISSING = 1


def main() -> int:
    """Returns the exit status of the command that the process's arguments name."""
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


if __name__ == "__main__":
    sys.exit(main())
