"""Modes around the call of a module: in float64 throughout, or with every last digit changed.

Two models that compute one function agree in float64 to rounding, once the dtypes that their code
names are read as float64; in their own dtype they agree as well as rounding lets them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_HALF = (torch.float16, torch.bfloat16)

#: Dtypes that are read as another one, for runs in float64 and in float32 at least.
Reading = Mapping[torch.dtype, torch.dtype]
IN_FLOAT64: Reading = {
    **dict.fromkeys((torch.float32, *_HALF), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
IN_FLOAT32: Reading = {**dict.fromkeys(_HALF, torch.float32), torch.complex32: torch.complex64}
AS_IT_IS: Reading = {}


def widen(x: Any, reading: Reading) -> Any:
    """Returns a tensor or a dtype as it is read, anything else as it is."""
    if isinstance(x, torch.Tensor):
        return x.to(reading[x.dtype]) if x.dtype in reading else x
    return reading.get(x, x) if isinstance(x, torch.dtype) else x


class _Mode(TorchDispatchMode):
    """A mode that never asks the compiler."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Widened(_Mode):
    """Computes in other dtypes than the code names.

    ``x.to(torch.float32)`` and ``softmax(dtype=...)`` are read as float64, say, and tensors that
    are made without a dtype are widened.
    """

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.reading = reading

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls an operation."""
        args, kwargs = pytree.tree_map(self._read, (args, kwargs or {}))
        return pytree.tree_map(self._read, func(*args, **kwargs))

    def _read(self, x: Any) -> Any:
        return widen(x, self.reading)


class Perturbed(_Mode):
    """Changes every result by one unit in its last place, up or down at random.

    How far the outputs then move is how far two ways of computing one function may differ.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls an operation."""
        result = func(*args, **(kwargs or {}))
        if any(a.alias_info is not None for a in func._schema.returns):
            return result  # a view, or what was written to
        return pytree.tree_map(self._moved, result)

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        signs = torch.randint(0, 2, x.shape, generator=self.generator, dtype=torch.int8)
        step = torch.finfo(x.dtype).eps
        return x * (1 + step * (2 * signs - 1).to(x))


@contextlib.contextmanager
def plain_kernels(seed: int) -> Iterator[None]:
    """No fused encoder layers, whose rounding and shapes are their own; draws by a seed."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed also seeds accelerators, which nobody puts back, and where there is
            # none it formats a stack trace for each of them.
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
