"""The version of the library, and those of other packages that it runs with: :func:`require`.

A package that is too old is an error where it is imported, not an ``AttributeError`` later on; one
whose internals matter here, and which is newer than what was tested, is a warning.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import warnings
from typing import NamedTuple

#: The version of the library; the build reads it here.
__version__ = "0.2.0"


class Range(NamedTuple):
    """Which versions of a package were run.

    Attributes:
        oldest: the lower bound in ``pyproject.toml``, and what ``constraints-lowest.txt`` pins.
        newest: the newest version or series; empty where a newer one is as good, since only the
            package's stable interface is used.
    """

    oldest: str
    newest: str = ""


RANGES = {
    "jax": Range("0.7.2", "0.12"),
    "numpy": Range("2.0.0"),
    "optax": Range("0.2.6"),
    "safetensors": Range("0.6.2"),
    "flax": Range("0.12.0", "0.12"),
    "equinox": Range("0.13.1", "0.13"),
    "dm-haiku": Range("0.0.15", "0.0.17"),
    "keras": Range("3.15.0", "3.15"),
    "torch": Range("2.13.0", "2.13"),
    "array-api-compat": Range("1.14.0"),
}


def require(package: str, by: str) -> None:
    """Checks the installed version of a package; says nothing of one that is not installed.

    Args:
        package: its name on PyPI.
        by: the module that needs it.

    Raises:
        ImportError: the version is older than any the library was run with.

    Warns:
        UserWarning: once, if it is newer than any the library was run with.
    """
    found = installed(package)
    if not found:
        return  # the import that follows says so, or finds a copy without metadata
    oldest, newest = RANGES[package]
    if _numbers(found) < _numbers(oldest):
        raise ImportError(
            f"{by} needs {package} {oldest} or later, found {found}; "
            f"run: pip install --upgrade '{package}>={oldest}'"
        )
    if newest and _numbers(found)[: len(_numbers(newest))] > _numbers(newest):
        _warn(package, found, newest)


def installed(package: str) -> str:
    """Returns the version of a package that is installed; empty where that is not known."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _warn(package: str, found: str, newest: str) -> None:
    warnings.warn(
        f"{package} {found} is newer than {newest}, the newest that purepruning {__version__} was "
        f"tested with: what it computes may not hold; upgrade purepruning, or install "
        f"'{package}=={newest}.*'",
        stacklevel=4,
    )


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the numbers a version begins with: those of ``0.13.0.dev2+cpu`` are 0, 13, 0."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in found.group().split(".")) if found else ()
