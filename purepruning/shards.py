"""What one process holds of a tensor that lies over several: torch's DTensor.

Under ``fully_shard``, tensor parallelism or both, every process has a box of a parameter: its
shard. Algorithms work on shards, and processes tell each other integers: counts, limbs of exact
sums, bits. Whole tensors are put together only where a function says so.

Like :mod:`purepruning.arrays`, this imports no framework: who has a DTensor has imported torch.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from purepruning.arrays import (
    as_numpy,
    bits_float,
    float_bits,
    in_framework,
    is_numpy,
    is_torch,
    namespace,
    zeros,
)


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor, whatever its layout."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def refuse_sharded(where: str, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError if a leaf lies over processes; ``where`` says for which function."""
    path = next((path for path, x in leaves.items() if is_sharded(x)), None)
    if path is not None:
        raise ValueError(
            f"{where}: {path!r} lies over processes (a DTensor), and is needed whole; call it "
            "before fully_shard, or give it {name: x.full_tensor() for name, x in params.items()}, "
            "which every process has to make"
        )


@dataclasses.dataclass(frozen=True)
class Box:
    """Where a shard lies in the whole.

    Attributes:
        shape: shape of the whole.
        start: position of the shard's first element, by axis.
        sizes: shape of the shard; an axis may be of size 0.
        first: whether this process speaks for the shard, which others may have as well.
        mesh: the processes, or None where this one has the whole.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    sizes: tuple[int, ...]
    first: bool
    mesh: Any

    @property
    def is_whole(self) -> bool:
        """Whether the shard is all there is."""
        return self.sizes == self.shape

    def cut(self, x: Any) -> Any:
        """Returns the shard of an array that broadcasts to the whole; axes of size 1 stay."""
        at, lead = [], len(self.shape) - len(x.shape)
        for n, whole, start, size in zip(
            x.shape, self.shape[lead:], self.start[lead:], self.sizes[lead:], strict=True
        ):
            at.append(slice(None) if n != whole else slice(start, start + size))
        return x[tuple(at)]

    def index(self, place: np.ndarray | Any) -> Any:
        """Returns positions in the whole of the elements at flat positions in the shard.

        Of a whole of at most ``2**31 - 1`` elements, int32.
        """
        axes: list[tuple[int, int, int]] = []  # size and start in the shard, size of the whole
        for n, start, size in zip(self.shape, self.start, self.sizes, strict=True):
            if axes and size == n:  # what lies whole inside of an axis goes with it
                last = axes.pop()
                axes.append((last[0] * n, last[1] * n, last[2] * n))
            else:
                axes.append((size, start, n))
        stride, result = 1, place * 0
        for size, start, n in reversed(axes[1:]):
            result = result + (place % size + start) * stride
            place, stride = place // size, stride * n
        start = axes[0][1] if axes else 0
        return result + (place + start) * stride


def box_of(x: Any) -> Box:
    """Returns where what this process holds of ``x`` lies; of other arrays than DTensors, all.

    Raises:
        ValueError: sums of ``x`` are pending, or its shard is no box.
    """
    shape = tuple(x.shape)
    if not is_sharded(x):
        return Box(shape, (0,) * len(shape), shape, True, None)
    if any(p.is_partial() for p in x.placements):
        raise ValueError(
            f"a DTensor with placements {x.placements} has sums that are pending; redistribute it "
            "to Shard or Replicate"
        )
    starts, sizes = [], []
    for axis, n in enumerate(shape):
        start, size = _along(x, axis, n)
        starts.append(start)
        sizes.append(size)
    mine = x.device_mesh.get_coordinate()
    if mine is None:
        raise ValueError("this process is not in the mesh of a parameter; call this on its members")
    first = all(i == 0 for i, p in zip(mine, x.placements, strict=True) if not hasattr(p, "dim"))
    return Box(shape, tuple(starts), tuple(sizes), first, x.device_mesh)


def _along(x: Any, axis: int, n: int) -> tuple[int, int]:
    """Returns where along an axis of size n the shard of a DTensor begins, and its size."""
    tensor, torch = sys.modules["torch.distributed.tensor"], sys.modules["torch"]
    placements = [
        p if getattr(p, "dim", None) == axis else tensor.Replicate() for p in x.placements
    ]
    if all(p.is_replicate() for p in placements):
        return 0, n
    ones = [1] * x.ndim
    ones[axis] = n
    places = torch.arange(n, device=x.device_mesh.device_type).reshape(ones)
    # Without a source nothing is sent: every process takes its own part.
    mine = tensor.distribute_tensor(places, x.device_mesh, placements, src_data_rank=None)
    found = mine.to_local().reshape(-1).tolist()
    if found and found != list(range(found[0], found[0] + len(found))):
        raise ValueError(
            f"a DTensor with placements {x.placements} has shards that are no boxes; redistribute "
            "it to Shard"
        )
    return (found[0], len(found)) if found else (n, 0)


def local(x: Any) -> Any:
    """Returns the shard of a DTensor, without gradient history; other arrays as they are."""
    return x.detach().to_local() if is_sharded(x) else x


def local_as(like: Any, x: Any) -> Any:
    """Returns the part of ``x``, which broadcasts to ``like``, at this process's shard of ``like``.

    A DTensor that is laid out otherwise is put together for it, by all processes.
    """
    if is_sharded(x) and is_sharded(like) and _fits(x, like):
        return local(x)
    return box_of(like).cut(whole(x))


def _fits(x: Any, like: Any) -> bool:
    """Whether a DTensor is laid out as another one that it broadcasts to; alike everywhere."""
    return x.device_mesh == like.device_mesh and tuple(x.placements) == tuple(_placements(x, like))


def whole(x: Any) -> Any:
    """Returns a DTensor whole, which every process has to call; other arrays as they are."""
    return x.detach().full_tensor() if is_sharded(x) else x


def laid_out(x: Any, like: Any) -> Any:
    """Returns a whole array that broadcasts to ``like`` as a DTensor laid out as that is.

    Axes of size 1 lie on every process. Nothing is sent.
    """
    if not is_sharded(like):
        return x
    tensor = sys.modules["torch.distributed.tensor"]
    placements = _placements(x, like)
    x = in_framework("torch", x).to(like.device)
    return tensor.distribute_tensor(x, like.device_mesh, placements, src_data_rank=None)


def _placements(x: Any, like: Any) -> list[Any]:
    """Returns how an array lies that broadcasts to a DTensor, and goes with its shards."""
    replicate, lead = sys.modules["torch.distributed.tensor"].Replicate(), like.ndim - x.ndim
    return [
        replicate
        if hasattr(p, "dim") and (p.dim < lead or x.shape[p.dim - lead] != like.shape[p.dim])
        else _moved(p, lead)
        for p in like.placements
    ]


def _moved(placement: Any, lead: int) -> Any:
    """Returns the placement of an array that lacks ``lead`` leading axes."""
    if not lead or not hasattr(placement, "dim"):
        return placement
    return dataclasses.replace(placement, dim=placement.dim - lead)


def of_shard(x: Any, like: Any) -> Any:
    """Returns a DTensor, laid out as ``like``, of which this process has the shard ``x``."""
    x = in_framework("torch", x)
    if not is_sharded(like):
        return x
    result = sys.modules["torch"].empty_like(like.detach(), dtype=x.dtype)
    result.to_local().copy_(x)
    return result


def zeros_as(like: Any, shape: tuple[int, ...]) -> Any:
    """Returns float32 zeros where ``like`` is; of its shape, laid out as it is."""
    if is_sharded(like) and shape == tuple(like.shape):
        return of_shard(zeros(local(like), box_of(like).sizes, "float32"), like)
    return zeros(like, shape, "float32")


def reduced(boxes: Sequence[Box], arrays: Sequence[Any], how: str = "SUM") -> list[Any]:
    """Returns integer arrays added up, or the largest of them, over the processes of their boxes.

    Arrays are of NumPy or torch, one for each box, of the same shape on every process. Those of
    one mesh and dtype are sent together.
    """
    result = list(arrays)
    groups: dict[Any, list[int]] = {}
    for i, (box, x) in enumerate(zip(boxes, arrays, strict=True)):
        if box.mesh is not None:
            groups.setdefault((id(box.mesh), str(x.dtype)), []).append(i)
    for some in groups.values():
        xp = namespace(arrays[some[0]])
        joined = xp.concat([xp.reshape(arrays[i], (-1,)) for i in some])
        joined = _all_reduced(boxes[some[0]].mesh, joined, how)
        start = 0
        for i in some:
            stop = start + math.prod(arrays[i].shape)
            result[i] = xp.reshape(joined[start:stop], tuple(arrays[i].shape))
            start = stop
    return result


def agreed(box: Box, flag: bool) -> bool:
    """Returns whether a flag is set on some process of a box's mesh: the same on all of them."""
    return bool(reduced([box], [np.asarray([flag], np.int32)])[0][0])


def _all_reduced(mesh: Any, x: Any, how: str) -> Any:
    """Returns a vector reduced over all processes of a mesh."""
    distributed = sys.modules["torch.distributed"]
    sent = in_framework("torch", np.array(x) if is_numpy(x) else x).to(mesh.device_type)
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            op = getattr(distributed.ReduceOp, how)
            distributed.all_reduce(sent, op=op, group=mesh.get_group(axis))
    return as_numpy(sent) if is_numpy(x) else sent.to(x.device)


@dataclasses.dataclass(frozen=True)
class Across:
    """Reductions over units whose weights lie over several processes.

    Arrays have the axes of the weight, those inside a unit of size 1.

    Attributes:
        box: where this process's shard lies.
        inside: axes of the weight inside a unit.
    """

    box: Box
    inside: tuple[int, ...]

    @property
    def terms(self) -> int:
        """Number of weights in a unit."""
        return math.prod(self.box.shape[a] for a in self.inside)

    def totals(self, arrays: Sequence[Any], how: str = "SUM") -> list[Any]:
        """Returns, by unit in the shard, what :func:`reduced` makes of those of all processes."""
        placed = [self._placed(x, self.box.first) for x in arrays]
        found = reduced([self._units] * len(placed), placed, how)
        return [self._units.cut(x) for x in found]

    def everywhere(self, x: Any) -> Any:
        """Returns, for all units, what the processes that have some of each agree on."""
        speaks = self.box.first and all(self.box.start[a] == 0 for a in self.inside)
        xp = namespace(x)
        x = xp.reshape(x, self._units.sizes)
        is_bool = x.dtype == xp.bool
        bits = xp.astype(x, xp.uint8) if is_bool else float_bits(xp, x)
        (found,) = reduced([self._units], [self._placed(bits, speaks)])
        return found > 0 if is_bool else bits_float(xp, found)

    @property
    def _units(self) -> Box:
        """The box of the shard among the units."""
        shape, start, sizes = (
            tuple(rest if a in self.inside else n for a, n in enumerate(of))
            for of, rest in ((self.box.shape, 1), (self.box.start, 0), (self.box.sizes, 1))
        )
        return dataclasses.replace(self.box, shape=shape, start=start, sizes=sizes)

    def _placed(self, x: Any, speaks: bool) -> Any:
        xp, units = namespace(x), self._units
        kind = {"device": x.device} if is_torch(x) else {}
        result = xp.zeros(units.shape, dtype=x.dtype, **kind)
        if speaks:
            at = tuple(slice(a, a + n) for a, n in zip(units.start, units.sizes, strict=True))
            result[at] = x
        return result
