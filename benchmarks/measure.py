"""Time, processor time and peak memory of calls, side by side.

Alternatives are timed in turns in one process, so that whatever else the machine does hits all of
them; medians are reported. Memory is measured in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

MIB = 2**20
PAUSE = 0.03  # seconds before each timed call, in which thread pools stop waiting busily for more


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    *,
    least: int = 5,
    most: int = 25,
    seconds: float = 60.0,
    setup: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns median wall and CPU seconds of every call, timed round after round.

    Every call runs once before, which compiles it. Rounds go on until ``seconds`` have passed, but
    there are at least ``least`` and at most ``most``. ``setup[name]()`` runs untimed before each
    call of ``name``, which is then given its result.
    """
    setup = setup or {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for name, call in calls.items():
        call(*_arguments(setup, name))
    start, rounds = time.perf_counter(), 0
    while rounds < least or (rounds < most and time.perf_counter() - start < seconds):
        for name, call in calls.items():
            arguments = _arguments(setup, name)
            times[name].append(_timed(call, arguments))
            del arguments
        rounds += 1
    return {name: _summary(some) for name, some in times.items()}


def _arguments(setup: Mapping[str, Callable[[], Any]], name: str) -> tuple[Any, ...]:
    return (setup[name](),) if name in setup else ()


def _timed(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, float]:
    time.sleep(PAUSE)
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(*arguments)
    spent = time.perf_counter() - wall, time.process_time() - cpu
    del result
    return spent


def _summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    walls, cpus = zip(*times, strict=True)
    return {
        "wall_s": statistics.median(walls),
        "cpu_s": statistics.median(cpus),
        "wall_s_best": min(walls),
        "rounds": len(times),
    }


def peak_extra(call: Callable[[], Any]) -> int:
    """Returns how far resident memory rises during a call, in bytes, its result included.

    Best in a fresh process. The high-water mark is reset before the call where the kernel allows
    it; elsewhere the mark of the whole process counts, which can only be higher.
    """
    release()
    _wait_for_rest()
    reset = _reset_high_water_mark()
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") if reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del result
    return max(peak - before, 0)


def release() -> None:
    """Gives freed memory back to the system, so that it is not mistaken for memory in use."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def _wait_for_rest(seconds: float = 0.5) -> None:
    """Waits until resident memory has been the same for so long.

    JAX frees what it was given in a thread of its own, for a while after the array is there; what
    is left of that when the mark is reset would count as the call's.
    """
    if not PAUSE:  # sizes so small that the numbers mean nothing
        return
    now, since = _status("VmRSS"), time.perf_counter()
    while time.perf_counter() - since < seconds:
        time.sleep(0.02)
        before, now = now, _status("VmRSS")
        if now != before:
            since = time.perf_counter()


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


def one_torch_thread() -> None:
    """Makes torch compute in the calling thread alone.

    Its threads wait busily for each other, so on a machine that does anything else their CPU time
    is a multiple of the work.
    """
    import torch

    torch.set_num_threads(1)


def fresh(function: Callable[..., Any], *arguments: Any, one_thread: bool = False) -> Any:
    """Returns ``function(*arguments)`` from a new Python process; both must be importable there.

    NumPy reads at import how many threads its products of matrices run in.
    """
    context = multiprocessing.get_context("spawn")
    threads = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if one_thread else {}
    with patch.dict(os.environ, threads), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_carefully, function, arguments).result()


def _carefully(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except Exception:
        traceback.print_exc()
        raise


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns ``function(*arguments)``: stands in for :func:`fresh` where seconds matter more."""
    return function(*arguments)


def memory_of(call: Callable[[], Any], parameters: int) -> dict[str, Any]:
    extra = peak_extra(call)
    return {"peak_extra_mib": extra / MIB, "ratio": extra / parameters}


def at_most(what: str, reached: float, limit: float) -> dict[str, Any]:
    return {"what": what, "reached": reached, "at most": limit, "ok": reached <= limit}


def at_least(what: str, reached: float, limit: float) -> dict[str, Any]:
    return {"what": what, "reached": reached, "at least": limit, "ok": reached >= limit}


def report(what: str, reached: float) -> dict[str, Any]:
    return {"what": what, "reached": reached}
