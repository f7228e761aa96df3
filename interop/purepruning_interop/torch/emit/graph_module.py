"""The modules that a smaller graph is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen

aten = torch.ops.aten


class OpenSize(Exception):
    """An axis of open size is cut by position: the program must be of fixed sizes."""


class Shrunk(fx.GraphModule):
    """A graph module whose copies share the description of its arguments."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        info = self.graph._codegen.pytree_info  # type: ignore[attr-defined]
        for spec in (info.in_spec, info.out_spec):
            memo[id(spec)] = spec
        return super().__deepcopy__(memo)


class Constant(torch.nn.Module):
    """Returns a tensor that moves with the model and is not in its state dict."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("tensor", tensor, persistent=False)

    def forward(self) -> torch.Tensor:
        """Returns the tensor."""
        return self.tensor  # type: ignore[return-value]


class Mode(torch.nn.Module):
    """Returns whether train() was called last."""

    def forward(self) -> bool:
        """Returns the mode."""
        return self.training


class Sizes(torch.nn.Module):
    """Refuses an input of other sizes than the graph was made for."""

    def __init__(self, name: str, sizes: Mapping[int, int]) -> None:
        super().__init__()
        self.name, self.sizes = name, dict(sizes)

    def forward(self, x: torch.Tensor) -> None:
        """Raises ValueError for other sizes."""
        if x.ndim <= max(self.sizes):
            raise ValueError(f"{self.name} must have more than {max(self.sizes)} axes")
        for axis, size in self.sizes.items():
            if x.shape[axis] != size:
                raise ValueError(
                    f"this graph takes {self.name} of size {size} along axis {axis}, got "
                    f"{x.shape[axis]}; shrink the model with an example of that size"
                )


class Packing(_PyTreeCodeGen):
    """How arguments and results are packed; copies of a graph share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Packing:
        return self
