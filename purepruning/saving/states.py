"""States in files: a run that was stopped goes on as if it had not been.

With :mod:`purepruning.saving.masks`, whose way of writing it shares, this is where the library
reads and writes. Any pytree of arrays can be saved: parameters, optimizer states, the states of
schedules, lotteries and searches, random keys; in torch also the ``state_dict`` of an optimizer.

The format is one safetensors file. Tensors are named by their place in the tree; a dtype that
safetensors' NumPy side has not (bfloat16) is stored as its bytes. The metadata entry
``purepruning`` is a JSON object with ``format`` (``"state"``), ``format_version``,
``library_version``, for every place in ``leaves`` its ``dtype``, ``shape`` and ``crc32`` (a typed
key's generator in ``key``; of Python's own numbers and strings the ``value``), and in ``config``
what the rules were resolved to.
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

from purepruning.arguments import missing
from purepruning.arrays import is_concrete, is_torch, namespace
from purepruning.config.config import Config
from purepruning.masks import to_numpy
from purepruning.saving.files import read_whole, write_whole
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
        TypeError: a leaf is something else, or not known (under ``jit``).
        OSError: the file cannot be written.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(folder + "/run.safetensors", {"w": jnp.ones(2), "key": jax.random.key(7)})
    ...     fresh = {"w": jnp.zeros(2), "key": jax.random.key(0)}
    ...     state = load_state(folder + "/run.safetensors", fresh)
    >>> state["w"].tolist(), state["key"] == jax.random.key(7)
    ([1.0, 1.0], Array(True, dtype=bool))
    """
    rows: dict[str, dict[str, Any]] = {}
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in _leaves(state).items():
        kind = _kind(name, leaf)
        if isinstance(leaf, _SCALARS):
            rows[name] = {**kind, "value": leaf}
            continue
        x = _to_numpy(name, leaf)
        tensors[name] = x if x.dtype.kind in "biuf" else np.frombuffer(x.tobytes(), np.uint8)
        rows[name] = {**kind, "crc32": zlib.crc32(x.tobytes())}
    header = {
        "format": "state",
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "leaves": rows,
        "config": None if config is None else _description(config),
    }
    metadata = {"purepruning": json.dumps(header, sort_keys=True)}
    write_whole(Path(path), safetensors.numpy.save(tensors, metadata=metadata))


def load_state(path: str | os.PathLike[str], like: Any, *, config: Config | None = None) -> Any:
    """Returns the state in a file, as a tree like ``like``.

    Arrays come back in the framework, and on the devices, of the leaves of ``like``, whose values
    do not matter; but the schedules in it must be those of the file.

    Args:
        path: the file.
        like: the state that the run would begin with.
        config: the resolved rules; needed if the file was written with them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was not written by :func:`save_state`, or is damaged; or its leaves,
            rules or schedules are not those of this run: the message says which.
    """
    path = Path(path)
    header, tensors = read_whole(path, "state", FORMAT_VERSION)
    _check_config(path, header.get("config"), config)
    rows, leaves = header.get("leaves"), _leaves(like)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{path} cannot be read as state: its header has no leaves")
    for name in leaves:
        if name not in rows:
            message = f"{path} is of another run: it has no {_shown(name)}, which this one has"
            raise ValueError(missing(message, name, rows))
    for name in rows:
        if name not in leaves:
            message = f"{path} is of another run: it has {_shown(name)}, which this one has not"
            raise ValueError(missing(message, name, leaves))
    restored = []
    for name, leaf in leaves.items():
        row, kind = rows[name], _kind(name, leaf)
        if {key: row.get(key) for key in kind} != kind:
            was, now = (
                ", ".join(f"{key} {value}" for key, value in sorted(x.items()))
                for x in ({key: row.get(key) for key in kind}, kind)
            )
            raise ValueError(f"{path} is of another run: {_shown(name)} was {was}, and is {now}")
        restored.append(row["value"] if "value" in row else _read(path, name, row, tensors, leaf))
    state = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), restored)
    try:
        check_resumed(state, like)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return state


def _leaves(tree: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
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
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(f"the state's leaf {_shown(name)} is no array or number, but {leaf!r:.60}")
    kind: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype).split(".")[-1]}
    if _is_key(leaf):
        kind |= {"dtype": "key", "key": str(jax.random.key_impl(leaf))}
    return kind


def _to_numpy(name: str, leaf: Any) -> np.ndarray:
    if not is_concrete(leaf):
        raise TypeError(f"the state's leaf {_shown(name)} is not known under jit or vmap")
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if is_torch(leaf):
        leaf = leaf.detach().cpu().contiguous()
        if leaf.dtype == namespace(leaf).bfloat16:
            return leaf.view(namespace(leaf).int16).numpy().view(jnp.bfloat16)
        return leaf.numpy()
    return np.ascontiguousarray(np.asarray(leaf)).reshape(np.shape(leaf))


def _read(path: Path, name: str, row: dict, tensors: dict[str, np.ndarray], like: Any) -> Any:
    try:
        x = tensors[name]
        if zlib.crc32(x.tobytes()) != row["crc32"]:
            raise ValueError("the contents do not agree with their checksum")
        if row["dtype"] != "key":
            dtype = jnp.dtype(row["dtype"])
            x = np.frombuffer(x.tobytes(), dtype).reshape(row["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as state: {_shown(name)}: {error}") from error
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(x), impl=row["key"])
    if is_torch(like):
        xp = namespace(like)
        if x.dtype == jnp.bfloat16:
            return xp.asarray(x.view(np.int16).copy()).view(xp.bfloat16).to(like.device)
        return xp.asarray(x.copy()).to(like.device)
    if isinstance(like, np.ndarray | np.generic):
        return x.copy()
    sharding = getattr(like, "sharding", None)
    return jnp.asarray(x) if sharding is None else jax.device_put(x, sharding)


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
        name: None if count is None else np.asarray(count).tolist()
        for name, count in config.counts.items()
    }
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
