"""What a set of masks does to a model, in numbers that a person or a program can read."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from purepruning.arguments import missing, shown
from purepruning.arrays import by_numpy, compiled, is_array, namespace
from purepruning.granularity import Grid, any_of, fold, grid
from purepruning.layers import Layer, Layers, checked_table
from purepruning.masks import by_path, count_kept, to_numpy
from purepruning.shards import whole
from purepruning.trees import flatten
from purepruning.types import Masks, Params


class LayerSummary(NamedTuple):
    """One row of a summary; all counts are exact.

    Attributes:
        name: layer name.
        type: op type.
        weight: path of the weight.
        shape: shape of the weight.
        masked: whether the weight has a mask.
        channels_kept: output channels of which some weight is kept, over all stacked layers; None
            if the weight has no output axis.
        channels: all output channels; None if the weight has no output axis.
        weights_kept: weights kept.
        weights: all weights.
    """

    name: str
    type: str
    weight: str
    shape: tuple[int, ...]
    masked: bool
    channels_kept: int | None
    channels: int | None
    weights_kept: int
    weights: int

    @property
    def density(self) -> float:
        """Fraction of weights kept."""
        return _share(self.weights_kept, self.weights)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What masks do to a model: one row per layer, and the sums over its parameters.

    ``print`` shows a table, and so does ``rich.print`` in colour.

    Attributes:
        layers: one row per layer of the table.
        masked_kept: weights kept, of the parameters that have a mask (biases included, of which a
            mask of single weights keeps all).
        masked: all weights of the parameters that have a mask.
        kept: weights kept, of all parameters.
        total: all weights of all parameters.
    """

    layers: tuple[LayerSummary, ...]
    masked_kept: int
    masked: int
    kept: int
    total: int

    @property
    def layers_kept(self) -> int:
        """Weights kept, of the layers whose weight has a mask; biases not included."""
        return sum(row.weights_kept for row in self.layers if row.masked)

    @property
    def layers_masked(self) -> int:
        """All weights of the layers whose weight has a mask; biases not included."""
        return sum(row.weights for row in self.layers if row.masked)

    @property
    def layers_density(self) -> float:
        """Fraction kept of the layers whose weight has a mask: 0.2 where 80 % were asked for."""
        return _share(self.layers_kept, self.layers_masked)

    @property
    def masked_density(self) -> float:
        """Fraction kept of the parameters that have a mask; 1 if none has."""
        return _share(self.masked_kept, self.masked)

    @property
    def density(self) -> float:
        """Fraction kept of all parameters."""
        return _share(self.kept, self.total)

    @property
    def compression(self) -> float:
        """All parameters over kept ones (Blalock et al. 2020, arXiv:2003.03033)."""
        return self.total / self.kept if self.kept else math.inf

    def to_json(self) -> str:
        """Returns the summary as a JSON object; an infinite compression is null."""
        sums = (
            "layers_kept",
            "layers_masked",
            "layers_density",
            "masked_kept",
            "masked",
            "masked_density",
            "kept",
            "total",
            "density",
        )
        compression = self.compression if self.kept else None
        return json.dumps(
            {
                "layers": [{**row._asdict(), "density": row.density} for row in self.layers],
                **{name: getattr(self, name) for name in sums},
                "compression": compression,
            },
            indent=2,
        )

    def to_csv(self) -> str:
        """Returns the layers as CSV with a header; shapes as ``3x3x16``, unknown channels empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*LayerSummary._fields, "density"])
        for row in self.layers:
            cells = {**row._asdict(), "shape": _times(row.shape), "density": row.density}
            writer.writerow(cells.values())
        return out.getvalue()

    def __str__(self) -> str:
        cells = [_COLUMNS, *(_cells(row) for row in self.layers)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(_pad, row, widths, _RIGHT)).rstrip() for row in cells]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", *self._sums()])

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        import rich.table
        import rich.text

        table = rich.table.Table(header_style="bold")
        for name, right in zip(_COLUMNS, _RIGHT, strict=True):
            table.add_column(name, justify="right" if right else "left")
        for row in self.layers:
            # As Text: a name with brackets is no markup.
            cells = map(rich.text.Text, _cells(row))
            table.add_row(*cells, style="" if row.masked else "dim")
        yield table
        yield from map(rich.text.Text, self._sums())

    def _sums(self) -> list[str]:
        return [
            f"pruned layers:     {self.layers_kept:,} of {self.layers_masked:,} weights kept "
            f"({_percent(self.layers_density)})",
            f"masked parameters: {self.masked_kept:,} of {self.masked:,} weights kept "
            f"({_percent(self.masked_density)})",
            f"all parameters:    {self.kept:,} of {self.total:,} weights kept "
            f"({_percent(self.density)}), compression {self.compression:.2f}x",
        ]


def summarize(params: Params, masks: Masks, layers: Layers) -> Summary:
    """Returns how much of every layer, and of the whole model, the masks keep.

    Only shapes are read from ``params``. All arrays in it count as parameters; pass the trainable
    ones to leave statistics out. A layer without a mask is a row in which everything is kept.

    Raises:
        KeyError: a mask or a layer names no parameter.
        ValueError: a mask does not broadcast, or a layer has another shape than its parameter.
        TypeError: a mask is not boolean, or not known (under ``jit`` or ``vmap``).

    >>> import jax.numpy as jnp
    >>> from purepruning import make_layer
    >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    >>> layer = make_layer(params, "w", "Linear", out_axes=1, in_axes=0, bias="b")
    >>> masks = {"w": jnp.array([[True, True, True, False]]), "b": None}
    >>> print(summarize(params, masks, [layer]))
    layer  type    shape  channels  weights  density
    ------------------------------------------------
    w      Linear  3x4         3/4     9/12    75.0%
    <BLANKLINE>
    pruned layers:     9 of 12 weights kept (75.0%)
    masked parameters: 9 of 12 weights kept (75.0%)
    all parameters:    13 of 16 weights kept (81.2%), compression 1.23x
    """
    leaves = flatten(params).leaves
    table = checked_table(layers, "summarize: layers")
    keep = by_path(masks, params)
    sizes = {path: math.prod(x.shape) for path, x in leaves.items() if is_array(x)}
    kept = {path: count_kept(mask, tuple(leaves[path].shape)) for path, mask in keep.items()}
    masked_kept, masked = sum(kept.values()), sum(sizes[path] for path in kept)
    total = sum(sizes.values())
    rows = tuple(_row(layer, leaves, keep, kept) for layer in table)
    return Summary(rows, masked_kept, masked, total - masked + masked_kept, total)


def _row(
    layer: Layer, leaves: dict[str, Any], keep: dict[str, Any], kept: dict[str, int]
) -> LayerSummary:
    where = f"summarize: layer {layer.name!r}"
    if layer.weight not in leaves:
        raise KeyError(missing(f"{where}: params have no {layer.weight!r}", layer.weight, leaves))
    weight = leaves[layer.weight]
    if not is_array(weight):
        raise TypeError(f"{where}: {layer.weight!r} is no array in params, but {shown(weight)}")
    shape = tuple(weight.shape)
    if shape != layer.shape:
        raise ValueError(
            f"{where}: {layer.weight!r} has shape {shape} in params, but {layer.shape} in the "
            "layer table"
        )
    mask, size = keep.get(layer.weight), math.prod(shape)
    channels_kept, channels = _channels(layer, mask)
    return LayerSummary(
        layer.name,
        layer.type,
        layer.weight,
        shape,
        mask is not None,
        channels_kept,
        channels,
        kept.get(layer.weight, size),
        size,
    )


def _channels(layer: Layer, mask: Any) -> tuple[int | None, int | None]:
    if not layer.out_axes:
        return None, None
    g = grid(layer, "output_channel")
    channels = g.n_stacked * g.n_units
    if mask is None:
        return channels, channels
    kept = by_numpy(lambda mask: compiled(mask, _channels_kept, "g")(mask, g=g), whole(mask))
    return int(np.count_nonzero(to_numpy(kept))), channels


def _channels_kept(mask: Any, *, g: Grid) -> Any:
    xp = namespace(mask)
    return fold(xp, xp.broadcast_to(mask, g.shape), g, any_of)


_COLUMNS = ("layer", "type", "shape", "channels", "weights", "density")


_RIGHT = (False, False, False, True, True, True)


def _cells(row: LayerSummary) -> tuple[str, ...]:
    return (
        row.name,
        row.type,
        _times(row.shape),
        "" if row.channels is None else f"{row.channels_kept}/{row.channels}",
        f"{row.weights_kept}/{row.weights}",
        _percent(row.density) if row.masked else "dense",
    )


def _pad(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _share(kept: int, total: int) -> float:
    return kept / total if total else 1.0
