"""Checkpoints larger than memory, pruned on the way from one folder to another.

In layer scope every layer is a problem of its own: its weight is mapped, ranked by any pruner, and
written. In global scope the weights of all files are ranked together. Magnitudes are then counted
by their leading 16 bits, which for bfloat16 is all there is; of wider ones once more by the 16 bits
that follow, where the leading ones are those of the threshold; and the third pass writes. Counts by
layer make it exact: the same masks as in memory, ties by the order of parameters. Other criteria
see all layers of global scope at once, and their masks stay in memory until they are written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import function, instance, missing
from purepruning.config.config import Config, Pool, check_config, check_count
from purepruning.granularity import NM
from purepruning.layers import Layer
from purepruning.pruners.magnitude import level
from purepruning.saving.files import checksum
from purepruning.saving.masks import FORMAT_VERSION
from purepruning.saving.tensors import INDEX, Shard, Stored, read_shards, width, write_tensors
from purepruning.selection.biases import bias_masks
from purepruning.types import Stats
from purepruning.versions import __version__

_ELEMENTS = 2**20  # of a tensor that are looked at at a time
_BINS = 2**15  # leading bits of a magnitude, the sign left out
_LOW = 2**16
_INFINITY = 0x7F800000
_RANKED = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")  # which float32 holds exactly

#: The file of the masks, in the folder that is written.
MASKS = "masks.safetensors"
#: The folder in it of what a run that is killed goes on from.
WORK = ".pruning"
#: What weights in other formats end in; they are those of the network before.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


class Streamed(NamedTuple):
    """What :func:`prune_files` did.

    Attributes:
        files: what was written, in order; the masks come last. Empty where there is no target.
        pruned: by parameter, how many of its elements the masks prune.
        size: elements of all parameters that have a mask.
    """

    files: tuple[Path, ...]
    pruned: dict[str, int]
    size: int


def prune_files(
    pruner: Callable[..., Any],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    config: Config,
    *,
    stats: Stats = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Streamed:
    """Prunes a checkpoint of safetensors files, of any size, into a folder.

    The folder gets a file for each file of the source, with the same tensors, pruned weights zero;
    ``masks.safetensors``, which :func:`purepruning.load_masks` reads; and copies of the other
    files, such as the index and the tokenizer, but none of weights in other formats. Masks are
    those that the pruner makes of all parameters in memory, bit for bit.

    Memory holds one layer at a time: its mask, a byte for each element, and what the pruner needs;
    weights are mapped. In global scope :func:`purepruning.level` ranks any number of weights so:
    counts by layer lie in a file, and the source is read three times, of bfloat16 twice. Other
    pruners, stacks of layers and float64 need the masks of all layers in memory in global scope. A
    run that is killed leaves whole files only, and goes on behind them when it is called again.

    Args:
        pruner: ``(params, stats, config) -> masks``; of those that return parameters too, none.
        source: a safetensors file, or a folder: the files that its index names,
            ``model.safetensors``, or all safetensors files but masks.
        target: the folder to write to; it is made. None writes nothing, and counts.
        config: the resolved rules, whose weights are the names of tensors; no coupling.
        stats: what the pruner takes.
        progress: ``(bytes done, bytes in all, tensor)``, called after each part.

    Raises:
        KeyError: a layer's weight is not in the files.
        ValueError: it has another shape; the config has a coupling; a score is NaN; the target has
            what another run began, or is the source; a file is damaged.
        OSError: a file cannot be read or written.

    >>> import tempfile, numpy as np, safetensors.numpy
    >>> import purepruning as pp
    >>> weights = {"w": np.float32([[1, 2], [3, 4]])}
    >>> layers = [pp.make_layer(weights, "w", "Linear", out_axes=0, in_axes=1)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     safetensors.numpy.save_file(weights, f"{folder}/model.safetensors")
    ...     done = pp.prune_files(
    ...         pp.level, f"{folder}/model.safetensors", f"{folder}/out", pp.resolve(0.5, layers)
    ...     )
    ...     safetensors.numpy.load_file(f"{folder}/out/model.safetensors")["w"].tolist()
    [[0.0, 0.0], [3.0, 4.0]]
    """
    function(pruner, "prune_files: pruner", "such as pp.level")
    check_config("prune_files", config)
    instance(source, (str, os.PathLike), "prune_files: source", "a path")
    if target is not None:
        instance(target, (str, os.PathLike), "prune_files: target", "a path, or None")
    if progress is not None:
        function(progress, "prune_files: progress", "of (done, total, tensor)")
    if config.allocation is not None:
        raise ValueError(
            "prune_files prunes no coupled channels, since those lie in many layers; resolve "
            "without coupling"
        )
    if not isinstance(config.granularity, NM):
        for pool in config.pools:
            check_count("prune_files", pool, config.counts[pool.name])
    shards = read_shards(source)
    stored = {name: t for shard in shards for name, t in shard.tensors.items()}
    owners = _checked(config, stored)
    if target is None:
        owned = {path: stored[path] for path in owners}
        with tempfile.TemporaryDirectory() as work:
            return _counted_only(_Run(pruner, config, stats, owned, Path(work), progress))
    out = Path(target)
    _check_target(out, shards)
    out.mkdir(parents=True, exist_ok=True)
    work_folder = out / WORK
    _begin(work_folder, shards, config, pruner, stats)
    run = _Run(pruner, config, stats, stored, work_folder, progress)
    files: list[Path] = []
    rows: dict[str, dict[str, Any]] = {}
    for shard in shards:
        done = work_folder / f"{shard.file.name}.json"
        if done.exists():
            run.advance(_size(shard.tensors.values()), shard.file.name)
        else:
            _write_shard(run, shard, owners, out, done)
        rows |= json.loads(done.read_text())
        files.append(out / shard.file.name)
    masks = _join_masks(out, work_folder, shards, rows)
    _copy_rest(Path(source), out)
    shutil.rmtree(work_folder)
    pruned = {name: row["pruned"] for name, row in sorted(rows.items())}
    size = sum(math.prod(row["param_shape"]) for row in rows.values())
    return Streamed((*files, masks), pruned, size)


def _check_target(out: Path, shards: tuple[Shard, ...]) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"prune_files: target {str(out)!r} is a file; name a folder")
    if out.resolve() == shards[0].file.parent.resolve():
        raise ValueError("prune_files: target is the folder of the source; name another")
    if any(shard.file.name == MASKS for shard in shards):
        raise ValueError(
            f"prune_files: source has weights in a file {MASKS!r}, which is what the masks are "
            "called; rename it"
        )


class _Run:
    """A call: its arguments, and in global scope the cut of every layer, or the masks."""

    def __init__(
        self,
        pruner: Callable[..., Any],
        config: Config,
        stats: Any,
        stored: Mapping[str, Stored],
        work: Path,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.pruner, self.config, self.stats = pruner, config, stats
        self.stored, self.work = stored, work
        self._progress, self._done = progress, 0
        counted = config.scope == "global" and self._counts_bits()
        weights = [[stored[x.weight] for x in pool.layers] for pool in config.pools]
        passes = sum(_size(some) * _passes(some) for some in weights) if counted else 0
        self._total = passes + _size(stored.values())
        self.cuts: dict[str, tuple[int, int]] = {}
        self._whole: Mapping[str, Any] | None = None
        if counted:
            for i, pool in enumerate(config.pools):
                self.cuts |= _global_cuts(self, pool, f"{work}/{i}")
        elif config.scope == "global":
            paths = [path for layer in config.layers for path in _paths(config, layer)]
            self._whole = self._pruned({path: stored[path].array() for path in paths}, config)

    def advance(self, size: int, name: str) -> None:
        """Counts bytes that are done, and says so."""
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total, name)

    def masks(self, layer: Layer) -> dict[str, np.ndarray]:
        """Returns the masks of a layer's weight and of its bias, where it has one that follows."""
        params = {path: self.stored[path].array() for path in _paths(self.config, layer)}
        if layer.name in self.cuts:
            masks = {layer.weight: _cut(params[layer.weight], *self.cuts[layer.name])}
            if layer.bias in params:
                masks |= bias_masks([layer], masks, self.config.granularity)
        elif self._whole is not None:
            masks = dict(self._whole)
        else:
            masks = self._pruned(params, _alone(self.config, layer))
        return {
            path: np.asarray(masks[path]).reshape(-1)
            if path == layer.bias
            else np.asarray(masks[path])
            for path in params
            if masks.get(path) is not None
        }

    def _counts_bits(self) -> bool:
        """Whether magnitudes can be ranked by counting their bits."""
        config = self.config
        plain = not (config.masks or config.inverted) and config.granularity == "element"
        dtypes = {self.stored[layer.weight].dtype for layer in config.layers}
        stacked = any(layer.stack_axes for layer in config.layers)
        return self.pruner is level and plain and dtypes <= set(_RANKED) and not stacked

    def _pruned(self, params: dict[str, np.ndarray], config: Config) -> Any:
        masks = self.pruner(params, self.stats, config)
        if isinstance(masks, tuple):
            name = getattr(self.pruner, "__name__", "the pruner")
            raise ValueError(f"prune_files: {name} returns parameters too; call it on its own")
        return masks


def _size(tensors: Iterable[Stored]) -> int:
    return sum(t.stop - t.start for t in tensors)


def _passes(tensors: list[Stored]) -> int:
    """Returns how often the weights of a pool are counted."""
    return 1 if all(tensor.dtype == "BF16" for tensor in tensors) else 2


def _counted_only(run: _Run) -> Streamed:
    """Returns what would be pruned."""
    pruned, size = {}, 0
    for layer in run.config.layers:
        for path, mask in run.masks(layer).items():
            tensor = run.stored[path]
            pruned[path] = _pruned_of(mask, tensor)
            size += math.prod(tensor.shape)
            run.advance(_size([tensor]), path)
    return Streamed((), dict(sorted(pruned.items())), size)


def _pruned_of(mask: np.ndarray, tensor: Stored) -> int:
    """Returns how many elements of a tensor a mask prunes that broadcasts to it."""
    size = math.prod(tensor.shape)
    return size - int(np.count_nonzero(mask)) * (size // max(mask.size, 1))


def _paths(config: Config, layer: Layer) -> list[str]:
    """Returns the tensors that a layer's masks are of: its weight, and a bias that follows it."""
    follows = config.bias == "follow" and layer.bias is not None
    return [layer.weight, *([layer.bias] if follows and layer.bias else [])]


def _alone(config: Config, layer: Layer) -> Config:
    """Returns the config of one layer."""
    pool = next(pool for pool in config.pools if layer in pool.layers)
    counts = {name: count for name, count in config.counts.items() if name == pool.name}
    paths = (layer.weight, layer.bias)
    masks = {path: mask for path, mask in config.masks.items() if path in paths}
    return dataclasses.replace(config, pools=(pool,), counts=counts, masks=masks)


def _checked(config: Config, stored: Mapping[str, Stored]) -> dict[str, Layer]:
    """Returns the layer that each pruned tensor belongs to, by the tensor's name."""
    owners: dict[str, Layer] = {}
    for layer in config.layers:
        where = f"prune_files: layer {layer.name!r}"
        for path in _paths(config, layer):
            if path not in stored:
                raise KeyError(missing(f"{where}: the files have no {path!r}", path, stored))
            if path in owners:
                raise ValueError(f"{where}: {path!r} is that of {owners[path].name!r} as well")
            owners[path] = layer
        shape = stored[layer.weight].shape
        if shape != layer.shape:
            raise ValueError(
                f"{where}: {layer.weight!r} has shape {shape} in the files, but {layer.shape} in "
                "the layer table"
            )
    return owners


def _begin(work: Path, shards: tuple[Shard, ...], config: Config, pruner: Any, stats: Any) -> None:
    """Writes down what this run is, or makes sure that it is the one that was begun."""
    parts = [(s.file.name, s.file.stat().st_size, s.file.stat().st_mtime_ns) for s in shards]
    for name, count in config.counts.items():
        if np.shape(count):
            raise ValueError(
                f"prune_files: the count of {name!r} has shape {np.shape(count)}; files are pruned "
                "once, so give one number"
            )
    counts = {name: int(np.asarray(count)) for name, count in config.counts.items()}
    static = dataclasses.replace(config, counts={}, masks={})
    arrays = [checksum(_numbers(x)) for x in jax.tree.leaves((dict(config.masks), stats))]
    what = [getattr(pruner, "__name__", ""), parts, counts, repr(static), arrays]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    mark = work / "run"
    if mark.exists():
        if mark.read_text() != digest:
            raise ValueError(
                f"prune_files: {str(work.parent)!r} has what another run began; remove "
                f"{str(work)!r}, or name another folder"
            )
        return
    work.mkdir(exist_ok=True)
    temporary = work / "run.new"
    temporary.write_text(digest)
    temporary.replace(mark)


def _numbers(leaf: Any) -> np.ndarray:
    """Returns the numbers of an array, a tensor, or a random key."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _write_shard(
    run: _Run, shard: Shard, owners: Mapping[str, Layer], out: Path, done: Path
) -> None:
    """Writes one file of weights and one of its masks, and then a row for each mask."""
    rows: dict[str, Any] = {}
    found: dict[str, np.ndarray] = {}
    left = set(shard.tensors)
    with (run.work / f"{shard.file.name}.bits").open("wb") as bits:

        def pieces(name: str, tensor: Stored) -> Iterator[Any]:
            for piece in masked(name, tensor):
                yield piece
                run.advance(memoryview(piece).nbytes, name)

        def masked(name: str, tensor: Stored) -> Iterator[Any]:
            if name not in owners:
                yield from tensor.pieces()
                return
            layer = owners[name]
            if name not in found:
                some = run.masks(layer)
                found.update({path: m for path, m in some.items() if path in left})
            left.discard(name)
            mask = found.pop(name, None)
            if mask is None:
                yield from tensor.pieces()
                return
            packed = np.packbits(mask.reshape(-1), bitorder="little")
            rows[name] = {
                "mask_shape": list(mask.shape if name == layer.weight else tensor.shape),
                "param_shape": list(tensor.shape),
                "crc32": checksum(packed),
                "start": bits.tell(),
                "bytes": packed.size,
                "pruned": _pruned_of(mask, tensor),
            }
            bits.write(packed.data)
            yield from _zeroed(tensor, mask.reshape(rows[name]["mask_shape"]))

        # Weights before the biases that follow them, so that no layer is ranked twice.
        order = sorted(shard.tensors, key=lambda n: n in owners and owners[n].weight != n)
        tensors = {
            name: (t.dtype, t.shape, t.stop - t.start, pieces(name, t))
            for name, t in ((name, shard.tensors[name]) for name in order)
        }
        write_tensors(out / shard.file.name, tensors, shard.metadata)
        bits.flush()
        os.fsync(bits.fileno())
    temporary = done.with_suffix(".new")
    temporary.write_text(json.dumps(rows))
    temporary.replace(done)


def _zeroed(tensor: Stored, mask: np.ndarray) -> Iterator[Any]:
    """Yields the bytes of a tensor with pruned elements at zero, some rows at a time."""
    array = tensor.array()
    rows = max(1, _ELEMENTS * max(array.shape[:1] or (1,)) // max(array.size, 1))
    for start in range(0, array.shape[0] if array.ndim else 0, rows):
        part = np.array(array[start : start + rows])
        keep = mask[start : start + rows] if mask.shape[0] == array.shape[0] else mask
        part[~np.broadcast_to(keep, part.shape)] = 0
        yield part.view(np.uint8).data


def _join_masks(
    out: Path, work: Path, shards: tuple[Shard, ...], rows: dict[str, dict[str, Any]]
) -> Path:
    """Writes the masks of all files as one, in the form of :func:`purepruning.save_masks`."""
    files = {name: work / f"{s.file.name}.bits" for s in shards for name in s.tensors}
    keys = ("mask_shape", "param_shape", "crc32")
    header = {
        "format": "masks",
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "masks": {name: {key: rows[name][key] for key in keys} for name in sorted(rows)},
    }
    tensors = {}
    for name in sorted(rows):
        start, size = rows[name]["start"], rows[name]["bytes"]
        bits = Stored(files[name], "U8", (size,), start, start + size)
        tensors[name] = ("U8", (size,), size, bits.pieces())
    path = out / MASKS
    write_tensors(path, tensors, {"purepruning": json.dumps(header, sort_keys=True)})
    return path


def _copy_rest(source: Path, out: Path) -> None:
    """Copies what else lies in a folder: the index, the model's config, the tokenizer."""
    if not source.is_dir():
        return
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", *_OTHER_WEIGHTS)
        of_others = path.name.endswith(".index.json") and path.name != INDEX
        if not path.is_file() or weights or of_others:
            continue
        temporary = out / f".{path.name}.new"
        with path.open("rb") as old, temporary.open("wb") as new:
            shutil.copyfileobj(old, new)
            new.flush()
            os.fsync(new.fileno())
        temporary.replace(out / path.name)


# Magnitudes by their bits. Those of float32 have the order of the numbers that they stand for.
def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the bits of the magnitudes, uint32, some at a time."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _ELEMENTS):
        part = flat[start : start + _ELEMENTS]
        yield part.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)


def _global_cuts(run: _Run, pool: Pool, path: str) -> dict[str, tuple[int, int]]:
    """Returns by layer the bits of the threshold, and how many of those equal to it go.

    As in memory only the ``caps[i]`` lowest of layer i take part, and of equal ones those of
    earlier layers go first. A layer that reaches its cap below the common threshold is cut there.
    """
    layers, caps = pool.layers, [int(cap) for cap in pool.caps]
    budget = int(np.asarray(run.config.counts[pool.name]))
    tensors = [run.stored[layer.weight] for layer in layers]
    if not budget:
        run.advance(_size(tensors) * _passes(tensors), pool.name)
        return {layer.name: (0, 0) for layer in layers}
    names = [layer.name for layer in layers]
    high = _counted(run, f"{path}.high", tensors, names, lambda i, bits: bits >> 16, _BINS)
    most = _first(high, [0] * len(layers), caps, budget)
    bins = [min(_reaches(row, 0, cap), most) for row, cap in zip(high, caps, strict=True)]
    under = [int(row[:bin].sum()) for row, bin in zip(high, bins, strict=True)]
    if _passes(tensors) == 1:  # the bits that follow are zero
        low: Any = [row[bin : bin + 1] for row, bin in zip(high, bins, strict=True)]
    else:
        follow = np.asarray(bins, np.uint32)

        def of(i: int, bits: np.ndarray) -> np.ndarray:
            return (bits & np.uint32(0xFFFF))[bits >> 16 == follow[i]]

        low = _counted(run, f"{path}.low", tensors, names, of, _LOW)
    shared = [i for i, bin in enumerate(bins) if bin == most]
    rest = budget - sum(cap for cap, bin in zip(caps, bins, strict=True) if bin < most)
    some, n, most_of = ([values[i] for i in shared] for values in (low, under, caps))
    last = _first(some, n, most_of, rest)
    at = [_reaches(low[i], under[i], caps[i]) for i in range(len(layers))]
    at = [min(place, last) if bin == most else place for place, bin in zip(at, bins, strict=True)]
    before = [under[i] + int(low[i][: at[i]].sum()) for i in range(len(layers))]
    rest -= sum(before[i] if at[i] == last else caps[i] for i in shared)
    cuts = {}
    for i, layer in enumerate(layers):
        ties = min(int(low[i][at[i]]), caps[i] - before[i])
        if bins[i] == most and at[i] == last:
            ties = min(ties, rest)
            rest -= ties
        cuts[layer.name] = ((bins[i] << 16) + at[i], ties)
    return cuts


def _reaches(counts: np.ndarray, under: int, cap: int) -> int:
    """Returns the first bin up to which there are ``cap`` elements, with those under all bins."""
    return min(int(np.searchsorted(np.cumsum(counts) + under, cap)), len(counts) - 1)


def _first(counts: Any, under: list[int], caps: list[int], budget: int) -> int:
    """Returns the first bin up to which all rows together have ``budget``, each up to its cap."""
    taking: Any = sum(
        np.minimum(np.cumsum(row) + n, cap) for row, n, cap in zip(counts, under, caps, strict=True)
    )
    return int(np.searchsorted(taking, budget))


def _counted(
    run: _Run,
    path: str,
    tensors: list[Stored],
    names: list[str],
    bins_of: Callable[[int, np.ndarray], np.ndarray],
    n_bins: int,
) -> np.ndarray:
    """Returns how many elements each tensor has in each bin, from a file that is kept."""
    shape = (len(tensors), n_bins)
    if os.path.exists(path):
        run.advance(_size(tensors), names[-1])
    else:
        counts = np.memmap(f"{path}.new", np.int64, "w+", shape=shape)
        for i, tensor in enumerate(tensors):
            for bits in _chunks(tensor.array()):
                if bits.max() > _INFINITY:
                    raise ValueError(f"prune_files: scores of layer {names[i]!r} are NaN")
                counts[i] += np.bincount(bins_of(i, bits), minlength=n_bins)
                run.advance(bits.size * width(tensor.dtype), names[i])
        counts.flush()
        os.replace(f"{path}.new", path)
    return np.memmap(path, np.int64, "r", shape=shape)


def _cut(weight: np.ndarray, threshold: int, ties: int) -> np.ndarray:
    """Returns which elements stay: those above the threshold, and but for the first equal ones."""
    mask = np.empty(weight.size, bool)
    start = 0
    for bits in _chunks(weight):
        part = mask[start : start + bits.size]
        np.greater_equal(bits, threshold, out=part)
        if ties:
            first = np.flatnonzero(bits == threshold)[:ties]
            part[first] = False
            ties -= len(first)
        start += bits.size
    return mask.reshape(weight.shape)
