"""What a model costs: parameters, multiply-adds and activation bytes, layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from purepruning.coupling.describe import number


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One layer: the parameters under one name, and the products that read them.

    Attributes:
        name: path of its parameters without the last part; where no parameter is read, the place
            in the program.
        params: number of parameters.
        macs: multiply-adds of its matrix products and convolutions.
        activation_bytes: bytes of what those products return.
    """

    name: str
    params: int
    macs: Any
    activation_bytes: Any


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """What a function costs: its layers, and their sums.

    Attributes:
        layers: in the order of the program; layers that only scale or shift come last.
    """

    layers: tuple[LayerCost, ...]

    @property
    def params(self) -> int:
        """Number of parameters."""
        return sum(layer.params for layer in self.layers)

    @property
    def macs(self) -> Any:
        """Number of multiply-adds."""
        return sum(layer.macs for layer in self.layers)

    @property
    def activation_bytes(self) -> Any:
        """Bytes that all products return."""
        return sum(layer.activation_bytes for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "params", "MACs", "activation bytes")]
        rows += [
            (x.name, f"{x.params:,}", number(x.macs), number(x.activation_bytes))
            for x in self.layers
        ]
        total = number(self.macs), number(self.activation_bytes)
        rows.append(("total", f"{self.params:,}", *total))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
                ]
            )
            for row in rows
        )
