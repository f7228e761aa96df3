"""Which batch norm of a JAX program reads the output of which layer, and can be folded into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

from purepruning.jaxpr.internals import Jaxpr, JaxprEqn, Literal, inner_jaxprs
from purepruning.layers import Layer
from purepruning.quantize import BatchNorm
from purepruning_interop._marks import Program, is_mark

_FOLDED = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d")


class Norm(NamedTuple):
    """A batch norm of a model: what its module says.

    Attributes:
        name: the dotted name.
        axis: of the channels, as the module has it.
        epsilon: what is added to the variance.
        scale, offset: paths of its parameters; None where it has none.
        mean, variance: paths of its statistics.
        updates, decay: as of :class:`purepruning.quantize.BatchNorm`.
    """

    name: str
    axis: Any
    epsilon: float
    scale: str | None
    offset: str | None
    mean: str
    variance: str
    updates: str | None = None
    decay: float = 0.0


def owner(row: Layer) -> str:
    """Returns the name of the module that owns a layer's weight."""
    return row.weight.rpartition(".")[0]


def foldable(rows: Iterable[Layer]) -> dict[str, Layer]:
    """Returns the rows of layers that batch norms can be folded into, by module."""
    plain = [r for r in rows if r.type in _FOLDED and len(r.out_axes) == 1 and not r.stack_axes]
    return {owner(row): row for row in plain}


def behind_layers(
    program: Program, layers: Mapping[str, Layer], norms: Mapping[str, Norm]
) -> tuple[BatchNorm, ...]:
    """Returns a row for every norm that reads a layer's output, which nothing else reads.

    Args:
        program: of the model, with marks ``(module, "output")`` of all layers and
            ``(module, "input")`` of all norms. What is called several times is left out.
        layers: what :func:`foldable` returned.
        norms: the batch norms, by module.
    """
    calls: Counter[Hashable] = Counter()
    pairs: list[tuple[str, str, tuple[int, ...], int]] = []

    def look(jaxpr: Jaxpr) -> None:
        made_by: dict[Any, JaxprEqn] = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        reads = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
        uses: Counter[Any] = Counter(v for v in reads if not isinstance(v, Literal))
        for eqn in jaxpr.eqns:
            for inner in inner_jaxprs(eqn.params):
                look(inner)
            if not is_mark(eqn):
                continue
            name, side = eqn.params["layer"]
            calls[name] += 1
            read: Any = eqn.invars[0] if side == "input" and eqn.invars else None
            source = made_by.get(read)
            if source is not None and is_mark(source) and uses[read] == 1:
                of, rank = source.params["layer"][0], eqn.params["ranks"][0]
                pairs.append((of, name, tuple(read.aval.shape), rank))

    look(program.jaxpr.jaxpr)
    return tuple(
        _row(norm, layer)
        for layer, norm, shape, rank in (
            (layers[one], norms[other], shape, rank)
            for one, other, shape, rank in pairs
            if calls[one] == calls[other] == 1
        )
        if _has_channels(norm, layer, shape, rank)
    )


def _row(norm: Norm, layer: Layer) -> BatchNorm:
    fields = norm._asdict()
    del fields["axis"]
    return BatchNorm(layer=layer, **fields)


def _has_channels(norm: Norm, layer: Layer, shape: tuple[int, ...], rank: int) -> bool:
    """Whether the channels of a norm, whose call sees so many axes, are the outputs of a layer."""
    if not isinstance(norm.axis, int) or not -rank <= norm.axis < rank:
        return False
    axis = norm.axis % rank - rank
    return layer.output_axes == (axis,) and layer.shape[layer.out_axes[0]] == shape[axis]
