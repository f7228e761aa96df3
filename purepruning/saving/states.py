"""States in files: a run that was stopped goes on as if it had not been.

With :mod:`purepruning.saving.masks`, whose way of writing it shares, this is where the library
reads and writes. Any pytree of arrays can be saved: parameters, optimizer states, the states of
schedules, lotteries and searches, random keys; in torch also the ``state_dict`` of an optimizer.

The format is one safetensors file. Tensors are named by their place in the tree; a dtype that
safetensors' NumPy side has not (bfloat16, float8) is stored as its bytes. The metadata entry
``purepruning`` is a JSON object with ``format`` (``"state"``), ``format_version``,
``library_version``, for every place in ``leaves`` its ``dtype``, ``shape`` and ``crc32`` (a typed
key's generator in ``key``, of an array its ``framework``; of Python's own numbers and strings the
``value``), in ``nodes`` which places are lists, tuples, None or empty dicts, and in ``config`` what
the rules were resolved to.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from purepruning.arguments import missing, shown
from purepruning.arrays import (
    framework_of,
    is_array,
    is_concrete,
    is_torch,
    jax_array,
    namespace,
    stand_in,
)
from purepruning.config.config import Config, check_config, known_counts
from purepruning.masks import to_numpy
from purepruning.saving.files import (
    BROKEN,
    check_here,
    check_sum,
    checksum,
    file_path,
    read_whole,
    unreadable,
    write_whole,
)
from purepruning.saving.nodes import is_empty, node_kinds, rebuilt
from purepruning.schedules.schedule import check_resumed
from purepruning.versions import __version__

FORMAT_VERSION = 1


_SCALARS = (bool, int, float, str)


def save_state(path: str | os.PathLike[str], state: Any, *, config: Config | None = None) -> None:
    """Writes a state to a file; returns nothing.

    The file appears whole or not at all, over an older one if there is one: a process that is
    killed while it writes leaves the older one.

    Args:
        path: the file.
        state: a pytree of arrays (JAX, NumPy or torch), typed random keys, numbers and strings.
        config: the resolved rules of the run. They are written down, so that :func:`load_state`
            can tell when the rules or the model have changed.

    Raises:
        TypeError: a leaf is something else, not known (under ``jit``), or of a dtype that a file
            does not hold: objects, records, strings, bytes in the other order, more than 64 bits.
        ValueError: of a leaf this process has only a part.
        OSError: the file cannot be written.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(folder + "/run.safetensors", {"w": jnp.ones(2), "key": jax.random.key(7)})
    ...     fresh = {"w": jnp.zeros(2), "key": jax.random.key(0)}
    ...     state = load_state(folder + "/run.safetensors", fresh)
    >>> state["w"].tolist(), state["key"] == jax.random.key(7)
    ([1.0, 1.0], Array(True, dtype=bool))
    """
    target = file_path(path, "save_state")
    if config is not None:
        check_config("save_state", config)
    rows: dict[str, dict[str, Any]] = {}
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in _leaves(state).items():
        if is_empty(leaf):
            continue
        kind = _kind(name, leaf)
        if isinstance(leaf, _SCALARS):
            rows[name] = {**kind, "value": leaf}
            continue
        x = _to_numpy(name, leaf)
        tensors[name] = x if x.dtype.kind in "biuf" else np.frombuffer(x.tobytes(), np.uint8)
        rows[name] = {**kind, "crc32": checksum(x), "framework": framework_of(leaf)}
    header = {
        "format": "state",
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "leaves": rows,
        "nodes": node_kinds(state),
        "config": None if config is None else _description(config),
    }
    metadata = {"purepruning": json.dumps(header, sort_keys=True)}
    write_whole(target, safetensors.numpy.save(tensors, metadata=metadata))


def load_state(path: str | os.PathLike[str], like: Any, *, config: Config | None = None) -> Any:
    """Returns the state in a file, as a tree like ``like``.

    Arrays come back in the framework, and on the devices, of the leaves of ``like``, whose values
    do not matter; but the schedules in it must be those of the file. An empty dict in the dicts,
    lists and tuples of ``like`` stands for whatever of these the file has there, with arrays of the
    framework that they were saved from, on its default device. So an optimizer of torch that has
    taken no step is resumed::

        state = load_state(path, {"model": model.state_dict(), "sgd": optimizer.state_dict()})
        optimizer.load_state_dict(state["sgd"])

    Args:
        path: the file.
        like: the state that the run would begin with.
        config: the resolved rules; needed if the file was written with them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was not written by :func:`save_state`, or is damaged; or its leaves,
            rules or schedules are not those of this run: the message says which.
    """
    path = file_path(path, "load_state")
    if config is not None:
        check_config("load_state", config)
    header, tensors = read_whole(path, "state", FORMAT_VERSION)
    _check_config(path, header.get("config"), config)
    rows, leaves = header.get("leaves"), _leaves(like)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{path} cannot be read as state: its header has no leaves")
    for name, leaf in leaves.items():
        if name not in rows and not is_empty(leaf):
            message = f"{path} is of another run: it has no {_shown(name)}, which this one has"
            raise ValueError(missing(message, name, rows))
    taken = tuple(name for name, kind in node_kinds(like).items() if kind == "dict")
    extra = {name: row for name, row in rows.items() if name not in leaves}
    for name in extra:
        if not name.startswith(taken):
            message = f"{path} is of another run: it has {_shown(name)}, which this one has not"
            raise ValueError(
                f"{missing(message, name, leaves)}; give like as the run has it by then, or with "
                "an empty dict where all that the file has is to be read"
            )
    restored = []
    for name, leaf in leaves.items():
        if is_empty(leaf):
            restored.append(_taken(path, name, header, extra, tensors) if name in taken else {})
            continue
        row, kind = rows[name], _kind(name, leaf)
        if {key: row.get(key) for key in kind} != kind:
            was, now = (
                ", ".join(f"{key} {value}" for key, value in sorted(x.items()))
                for x in ({key: row.get(key) for key in kind}, kind)
            )
            raise ValueError(f"{path} is of another run: {_shown(name)} was {was}, and is {now}")
        restored.append(_restored(path, name, row, tensors, leaf))
    structure = jax.tree_util.tree_structure(like, is_leaf=is_empty)
    state = jax.tree_util.tree_unflatten(structure, restored)
    try:
        check_resumed(state, like)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return state


def _taken(path: Path, name: str, header: dict, rows: dict, tensors: dict[str, np.ndarray]) -> Any:
    """Returns all that the file has below a name, in dicts and lists."""
    mine = {inner: row for inner, row in rows.items() if inner.startswith(name)}
    try:
        leaves = {
            inner: row["value"] if "value" in row else _read(inner, row, tensors, _like(row))
            for inner, row in mine.items()
        }
        return rebuilt(name, leaves, header.get("nodes", {}))
    except BROKEN as error:
        raise unreadable(path, "state", error) from error


def _like(row: dict) -> Any:
    """Returns an array, or a key, as the one was that a row describes."""
    if row["dtype"] == "key":
        return jax.random.key(0, impl=row["key"])
    return stand_in(row["framework"], row["dtype"])


def _restored(path: Path, name: str, row: dict, tensors: dict[str, np.ndarray], like: Any) -> Any:
    """Returns one leaf of a state; its row agrees with ``like`` in what :func:`_kind` says."""
    try:
        if not isinstance(like, _SCALARS):
            return _read(name, row, tensors, like)
        if type(row["value"]) is not type(like):
            raise ValueError(f"{_shown(name)} should be {type(like).__name__} in its header")
        return row["value"]
    except BROKEN as error:
        raise unreadable(path, "state", error) from error


def _leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name, and its empty dicts."""
    try:
        found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_empty)
    except (TypeError, ValueError):
        raise TypeError(
            "a dict in the state has keys that cannot be sorted; give it keys of one type"
        ) from None
    return {jax.tree_util.keystr(keys): leaf for keys, leaf in found}


def _shown(name: str) -> str:
    return name or "the state itself"


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return not is_torch(leaf) and jnp.issubdtype(dtype, jax.dtypes.prng_key) if dtype else False


def _kind(name: str, leaf: Any) -> dict[str, Any]:
    """Returns what must agree between the leaf in a file and the one it is read for."""
    if isinstance(leaf, _SCALARS):
        return {"type": type(leaf).__name__}
    if not (is_array(leaf) or _is_key(leaf) or isinstance(leaf, np.ndarray | np.generic)):
        raise TypeError(f"the state's leaf {_shown(name)} is no array or number, but {shown(leaf)}")
    kind: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype).split(".")[-1]}
    if _is_key(leaf):
        kind |= {"dtype": "key", "key": str(jax.random.key_impl(leaf))}
    elif not _can_be_stored(leaf, kind["dtype"]):
        raise TypeError(
            f"the state's leaf {_shown(name)} has dtype {leaf.dtype}, which a file does not hold; "
            "convert it to numbers of at most 64 bits, in this machine's byte order"
        )
    return kind


def _can_be_stored(leaf: Any, dtype: str) -> bool:
    """Whether an array is read back as it is: by the name of its dtype, from its bytes."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        return False
    number = found == np.bool_ or jnp.issubdtype(found, jnp.number)
    widths = {"f": 8, "c": 16}
    return bool(number) and found.isnative and found.itemsize <= widths.get(found.kind, 8)


def _to_numpy(name: str, leaf: Any) -> np.ndarray:
    if not is_concrete(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"the state's leaf {_shown(name)} has no values: it is a shape, or jit or vmap traces "
            "it; save outside of them"
        )
    check_here(f"the state's leaf {_shown(name)}", leaf)
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if is_torch(leaf):
        if leaf.is_meta:
            raise TypeError(f"the state's leaf {_shown(name)} lies on the meta device: no values")
        xp = namespace(leaf)
        # Conjugated and negated views are only marked as such until they are looked at.
        leaf = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous()
        dtype = jnp.dtype(str(leaf.dtype).split(".")[-1])
        if dtype.kind not in "biufc":  # of those that NumPy has not: the bytes
            return leaf.reshape(-1).view(xp.uint8).numpy().view(dtype).reshape(tuple(leaf.shape))
        return leaf.numpy()
    return np.ascontiguousarray(np.asarray(leaf)).reshape(np.shape(leaf))


def _read(name: str, row: dict, tensors: dict[str, np.ndarray], like: Any) -> Any:
    x = tensors[name]
    check_sum(_shown(name), x, row)
    if row["dtype"] != "key":
        x = np.frombuffer(x.tobytes(), jnp.dtype(row["dtype"])).reshape(row["shape"])
    if _is_key(like):
        return jax.random.wrap_key_data(jax_array(x), impl=row["key"])
    if is_torch(like):
        xp = namespace(like)
        if x.dtype.kind not in "biufc":
            flat = xp.asarray(x.reshape(-1).view(np.uint8).copy()).view(like.dtype)
            return flat.reshape(tuple(x.shape)).to(like.device)
        return xp.asarray(x.copy()).to(like.device)
    if isinstance(like, np.ndarray | np.generic):
        return x.copy()
    sharding = getattr(like, "sharding", None)
    return jax_array(x) if sharding is None else jax.device_put(x, sharding)


def _description(config: Config) -> dict[str, Any]:
    """Returns what the rules were resolved to, as JSON has it."""
    pools = {}
    for pool in config.pools:
        row = {f.name: getattr(pool, f.name) for f in dataclasses.fields(pool) if f.name != "name"}
        for field in ("layers", "gradual"):
            row.pop(field)
        row["gradual"] = None if pool.gradual is None else dataclasses.asdict(pool.gradual)
        for layer in pool.layers:
            row[f"layer {layer.name!r}"] = dataclasses.asdict(layer)
        pools[pool.name] = row
    counts = {
        pool.name: known_counts("config", pool, count).tolist()
        for pool in config.pools
        if (count := config.counts.get(pool.name)) is not None
    }
    for path, mask in config.masks.items():
        check_here(f"the config's mask of {path!r}", mask)
    described = {
        "pools": pools,
        "counts": counts,
        "scope": config.scope,
        "granularity": str(config.granularity),
        "bias": config.bias,
        "inverted": config.inverted,
        "allocation": None if config.allocation is None else config.allocation.digest,
        "masks": {
            path: zlib.crc32(np.packbits(to_numpy(mask)).tobytes())
            for path, mask in config.masks.items()
        },
    }
    return json.loads(json.dumps(described))


def _check_config(path: Path, was: dict[str, Any] | None, config: Config | None) -> None:
    if (was is None) != (config is None):
        states = {True: "without a config", False: "with one"}
        raise ValueError(
            f"{path} was written {states[was is None]}, and is read {states[config is None]}: give "
            "config=... to both save_state and load_state, or to neither"
        )
    if was is not None and config is not None:
        difference = _difference(was, _description(config), "")
        if difference is not None:
            where, a, b = difference
            raise ValueError(
                f"{path}: the rules or the model have changed: {where} was {a!r}, and is {b!r} now"
            )


def _difference(was: Any, now: Any, where: str) -> tuple[str, Any, Any] | None:
    """Returns where two trees of dicts first differ, and what they have there."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return None if was == now else (where, was, now)
    for key in sorted({*was, *now}):
        name = f"{where}[{key!r}]" if where else key
        if key not in was or key not in now:
            return where or "config", sorted(was), sorted(now)
        found = _difference(was[key], now[key], name)
        if found is not None:
            return found
    return None
