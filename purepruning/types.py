"""What the arguments of public functions are called in signatures.

Trees can be anything that JAX flattens, or a flat dict of torch tensors, so that type checkers take
their aliases for Any; the names say what the leaves are. :class:`Array` is checked.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias


class Array(Protocol):
    """An array of JAX, torch or NumPy, or a tracer of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> Any:
        """Type of the elements."""

    @property
    def ndim(self) -> int:
        """Number of axes."""

    def __getitem__(self, key: Any, /) -> Any: ...
    def __add__(self, other: Any, /) -> Any: ...
    def __radd__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __rmul__(self, other: Any, /) -> Any: ...
    def __truediv__(self, other: Any, /) -> Any: ...
    def __float__(self) -> float: ...


#: A tree of arrays: parameters, or anything of their structure, such as gradients.
Params: TypeAlias = Any

#: A tree of booleans like the parameters: True keeps, None (or no entry) is not pruned.
Masks: TypeAlias = Any

#: Running statistics, the state of a criterion or a random key: what a pruner asks for.
Stats: TypeAlias = Any

#: Scores by layer name or as a tree like the parameters; larger is more important.
Scores: TypeAlias = Any
