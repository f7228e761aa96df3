"""The commands put together, and what becomes of their errors: one line, and an exit status.

A command is a function of its own module, whose parameters are typer's. It raises ``ValueError``,
``TypeError``, ``KeyError`` or ``OSError`` for what is wrong with what it was given, as the library
does, and :class:`purepruning_interop.checkpoints.NotWritten` where it cannot write.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from purepruning_interop.cli import inspect, prune, shrink, study
from purepruning_interop.cli import run as run_command
from purepruning_interop.cli.errors import BUG, NOT_WRITTEN, USAGE, WRONG_INPUT, message_of

app = typer.Typer(
    name="purepruning",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit status: 0 done; 1 something given is wrong (a file, a rule, a model); 2 wrong usage; "
        "3 the result cannot be written; 4 a bug; 130 and 143 interrupted. Output is whole or not "
        "there."
    ),
)

# One line for each command.
app.command("inspect")(inspect.inspect)
app.command("prune")(prune.prune)
app.command("shrink")(shrink.shrink)
app.command("run")(run_command.run)
app.command("study")(study.study)

_options = {"traceback": False}
_COMPLETES = "_PUREPRUNING_COMPLETE"
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer names none of its bases


def _version(wanted: bool) -> None:
    if wanted:
        from purepruning.versions import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in Python an error arose.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Prune neural networks: checkpoints without their code, models, recipes, whole studies."""
    _options["traceback"] = show_traceback
    if show_traceback:
        logging.disable(logging.NOTSET)


def run(arguments: Sequence[str]) -> int:
    """Returns the exit status of a command; its errors are one line on standard error.

    What the process does on SIGINT and SIGTERM is up to ``__main__``.
    """
    _options["traceback"] = False
    with _short_warnings(), _no_logs():
        try:
            status = typer.main.get_command(app).main(
                list(arguments), prog_name="purepruning", standalone_mode=False
            )
            sys.stdout.flush()
        except SystemExit as error:
            if _COMPLETES in os.environ or _of_completion(arguments):
                raise
            return _failed(ValueError(f"what was called ended with exit status {error.code}"))
        except Exception as error:  # whatever it is, it becomes one line and a status
            return _failed(error)
    return status if isinstance(status, int) else 0


def _of_completion(arguments: Sequence[str]) -> bool:
    """Whether a shell's completion is asked for, after which typer ends the process."""
    return any(x.startswith(("--show-completion", "--install-completion")) for x in arguments)


def _failed(error: BaseException) -> int:
    if isinstance(error, BrokenPipeError) or getattr(error, "errno", 0) == errno.EPIPE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads
        return 128 + int(getattr(signal, "SIGPIPE", 13))
    if _options["traceback"]:
        traceback.print_exception(error)
    status, text = _status(error)
    print(f"purepruning: {text}", file=sys.stderr)
    return status


def _status(error: BaseException) -> tuple[int, str]:
    text = message_of(error)
    if isinstance(error, _UsageError):
        words = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return USAGE, f"error: {words}. See purepruning --help."
    if type(error).__name__ == "NotWritten":  # whose module loads NumPy
        return NOT_WRITTEN, f"error: {text}"
    if isinstance(error, (ValueError, TypeError, KeyError, OSError, RuntimeError)):
        return WRONG_INPUT, f"error: {text}"
    if isinstance(error, MemoryError):
        return WRONG_INPUT, "error: not enough memory"
    return BUG, f"error: {type(error).__name__}: {text}; report it, with purepruning --traceback"


@contextlib.contextmanager
def _no_logs() -> Iterator[None]:
    """Keeps off the terminal what frameworks log, such as tracebacks of errors that are handled."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Shows a warning as one line, without the line of Python it came from."""
    with warnings.catch_warnings():

        def show(message: Any, *_: Any, **__: Any) -> None:
            print(f"purepruning: warning: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = show
        yield
