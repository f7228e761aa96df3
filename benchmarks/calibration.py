"""Rows about pruning by inputs, about sparse training, and about N:M both ways."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import at_least, at_most, in_turns, one_torch_thread

import purepruning as pp
from purepruning import NM, Layer
from purepruning.stats import inputs
from purepruning.stats.accumulate import CompensatedSum, WideCount
from purepruning.stats.inputs import InputStats

RULES = [{"op_types": ["Linear"]}]


def _layer(out: int, columns: int) -> Layer:
    return Layer("fc", "Linear", "w", (out, columns), (0,), (1,))


def _config(layer: Layer, granularity: Any) -> pp.Config:
    config = pp.resolve(RULES, [layer], granularity=granularity)
    return config if isinstance(granularity, NM) else config.with_sparsity(0.5)


def _frameworks() -> dict[str, Callable[[Any], Any]]:
    import jax.numpy as jnp
    import torch

    one_torch_thread()
    return {"JAX": jnp.asarray, "torch": lambda x: torch.from_numpy(np.array(x))}


def _totals(array: Callable[[Any], Any], kind: str, total: np.ndarray, n: int) -> InputStats:
    """Returns statistics of n inputs that hold one total."""
    zero, seen = np.int32(0), np.int32(n)
    fields: dict[str, Any] = {name: {} for name in InputStats._fields if name != "positions"}
    fields[kind] = {"fc": CompensatedSum(array(total), array(np.zeros_like(total)))}
    return InputStats({"fc": WideCount(array(zero), array(seen))}, **fields)


# SparseGPT.


def sparse_gpt(size: int, run: Callable[..., Any]) -> dict[str, Any]:
    found = run(_sparse_gpt, size)
    checks = []
    for kind, (times, errors) in found.items():
        for framework in ("JAX", "torch"):
            ratio = times["reference"]["cpu_s"] / times[framework]["cpu_s"]
            checks.append(at_least(f"{kind}, {framework}: reference / CPU time", ratio, 1.5))
            # Where both prune the same, the last digits are those of float32.
            error = errors[framework] / errors["reference"]
            checks.append(at_most(f"{kind}, {framework}: error / reference's", error, 1.001))
    return {
        "title": f"SparseGPT of {size} x {size}",
        "ours": {
            f"{framework}, {kind}": {"time": times[framework]}
            for kind, (times, _) in found.items()
            for framework in ("JAX", "torch")
        },
        "instead": {
            f"reference, {kind}": {"time": t["reference"]} for kind, (t, _) in found.items()
        },
        "checks": checks,
    }


def _sparse_gpt(size: int) -> dict[str, Any]:
    frameworks = _frameworks()
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(size, size)).astype(np.float32)
    x = rng.normal(size=(2 * size, size)) * rng.uniform(0.2, 2.2, size)
    x[:, 1:] += 0.5 * x[:, :-1]
    gram = (x.T @ x).astype(np.float32)
    torch_weight, torch_gram = (frameworks["torch"](array) for array in (weight, gram))
    layer, found = _layer(size, size), {}
    for kind, granularity in (("50 %", "element"), ("2:4", NM(2, 4))):
        config = _config(layer, granularity)
        nm = isinstance(granularity, NM)
        calls = {"reference": lambda nm=nm: reference(torch_weight, torch_gram, nm)}
        for name, array in frameworks.items():
            stats = _totals(array, "grams", gram[None], 2 * size)
            params = {"w": array(weight)}
            calls[name] = lambda p=params, s=stats, c=config: pp.sparse_gpt(p, s, c)[0]["w"]
        errors = {}
        for name, call in calls.items():
            gone = np.float64(weight) - np.float64(np.asarray(call()))
            errors[name] = float(np.einsum("ij,ij->", gone @ gram, gone))
        found[kind] = in_turns(calls, least=3, most=5), errors
    return found


def reference(weight: Any, gram: Any, nm: bool) -> Any:
    """The algorithm as it is written in the paper's code, in torch; exactly half of each block."""
    import torch

    w, h = weight.clone(), gram.clone()
    columns = w.shape[1]
    h += 0.01 * torch.mean(torch.diag(h)) * torch.eye(columns, device=h.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, 128):
        stop = min(start + 128, columns)
        own, u = w[:, start:stop].clone(), upper[start:stop, start:stop]
        done, errors = torch.zeros_like(own), torch.zeros_like(own)
        gone = torch.zeros_like(own, dtype=torch.bool)
        if not nm:
            scores = own**2 / torch.diag(u)[None] ** 2
            threshold = torch.sort(scores.flatten())[0][scores.numel() // 2 - 1]
            gone = scores <= threshold
        for i in range(stop - start):
            if nm and i % 4 == 0:
                scores = own[:, i : i + 4] ** 2 / torch.diag(u)[i : i + 4][None] ** 2
                gone.scatter_(1, i + torch.topk(scores, 2, dim=1, largest=False)[1], True)
            column = own[:, i].clone()
            column[gone[:, i]] = 0
            error = (own[:, i] - column) / u[i, i]
            own[:, i:] -= error[:, None] @ u[i, i:][None]
            done[:, i], errors[:, i] = column, error
        w[:, start:stop] = done
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w


# Statistics and scores.


def gram(size: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    times = run(_gram, size)
    ratio = times["gram"]["cpu_s"] / times["matmul"]["cpu_s"]
    return {
        "title": f"a Gram matrix of {size[1]} columns, {size[0]} rows added",
        "ours": {"inputs.update": {"time": times["gram"]}},
        "instead": {"the product of matrices alone": {"time": times["matmul"]}},
        "checks": [at_most("CPU time / the product", ratio, 1.1)],
    }


def _gram(size: tuple[int, int]) -> dict[str, Any]:
    import torch

    one_torch_thread()
    columns = size[1]
    layer = _layer(4, columns)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=size).astype(np.float32))
    begun = inputs.init({"w": torch.zeros(4, columns)}, [layer], keep=["grams"])
    return in_turns(
        {
            "gram": lambda: inputs.update(begun, {"fc": x}, [layer]).grams["fc"].high,
            "matmul": lambda: x.T @ x,
        },
        least=3,
        most=7,
    )


def wanda(size: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    times = run(_wanda, size)
    return {
        "title": f"Wanda of {size[0]} x {size[1]} at 50 % of every row",
        "ours": {name: {"time": times[name]} for name in ("JAX", "torch")},
        "instead": {
            "torch.sort of every row": {"time": times["sort"]},
            "selection alone, of keys that are there": {"time": times["selection"]},
        },
        "checks": [
            check
            for name in ("JAX", "torch")
            for ours in (times[name]["cpu_s"],)
            for check in (
                at_least(f"{name}: sort / CPU time", times["sort"]["cpu_s"] / ours, 5.0),
                # One pass that reads, and scores while what it read is in cache; one that writes.
                at_most(f"{name}: CPU time / selection", ours / times["selection"]["cpu_s"], 2.0),
            )
        ],
    }


def _wanda(size: tuple[int, int]) -> dict[str, Any]:
    import torch

    frameworks, layer = _frameworks(), _layer(*size)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=size).astype(np.float32)
    squares = rng.uniform(0.1, 9.0, (1, size[1])).astype(np.float32)
    config, calls = _config(layer, "element"), {}
    for name, array in frameworks.items():
        stats, params = _totals(array, "squares", squares, 8), {"w": array(weight)}
        calls[name] = lambda p=params, s=stats: pp.wanda(p, s, config)["w"]

    def by_sort() -> Any:
        scores = torch.from_numpy(weight).abs() * torch.from_numpy(squares).sqrt()
        mask = torch.ones(size, dtype=torch.bool)
        order = torch.sort(scores, dim=1, stable=True)[1]
        return mask.scatter_(1, order[:, : size[1] // 2], False)

    keys = np.abs(weight).view(np.int32)

    def selection() -> None:
        for start in range(0, size[0], 16):
            np.partition(keys[start : start + 16], size[1] // 2, axis=1)

    expected = by_sort().numpy()
    for name, call in calls.items():
        assert np.array_equal(np.asarray(call()), expected), f"{name}: another mask"
    return in_turns({**calls, "sort": by_sort, "selection": selection}, least=3, most=7)


# Sparse training, and N:M both ways.


def rigl(size: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    times = run(_rigl, size)
    ratio = times["argsort"]["cpu_s"] / times["ours"]["cpu_s"]
    return {
        "title": f"connections of {size[0]} x {size[1]} moved by RigL, jitted",
        "ours": {"pp.rewire": {"time": times["ours"]}},
        "instead": {"by argsort, as jaxpruner": {"time": times["argsort"]}},
        "checks": [at_least("argsort / CPU time", ratio, 10.0)],
    }


def _rigl(size: tuple[int, int]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    layer, n = _layer(*size), int(np.prod(size))
    rng = np.random.default_rng(0)
    weight, slope = (rng.normal(size=size).astype(np.float32) for _ in range(2))
    config = pp.resolve(RULES, [layer]).with_sparsity(0.9)
    params, grads = {"w": jnp.asarray(weight)}, {"w": jnp.asarray(slope)}
    masks = pp.random_pruning(params, 0, config)
    params = pp.apply_masks(params, masks)
    active = n - config.counts["fc"]
    moves = int(0.3 * active)

    @jax.jit
    def ours(params: Any, grads: Any, masks: Any) -> Any:
        return pp.rewire(params, grads, masks, config, {"fc": moves})["w"]

    @jax.jit
    def by_argsort(params: Any, grads: Any, masks: Any) -> Any:
        mask = masks["w"].reshape(-1)
        size_of = jnp.where(mask, jnp.abs(params["w"].reshape(-1)), -1.0)
        ranks = jnp.argsort(jnp.argsort(-size_of))
        kept = ranks < active - moves
        growing = jnp.where(kept, -1.0, jnp.abs(grads["w"].reshape(-1)))
        return (kept | (jnp.argsort(jnp.argsort(-growing)) < moves)).reshape(size)

    given = (params, grads, masks)
    assert np.array_equal(np.asarray(ours(*given)), np.asarray(by_argsort(*given)))
    calls = {
        "ours": lambda: jax.block_until_ready(ours(*given)),
        "argsort": lambda: jax.block_until_ready(by_argsort(*given)),
    }
    return in_turns(calls, least=3, most=5)


def transposable(size: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    times, share = run(_transposable, size)
    ratio = times["blocks"]["cpu_s"] / (times["ours"]["cpu_s"] * share)
    return {
        "title": f"transposable 2:4 of {size[0]} x {size[1]}",
        "ours": {"pp.transposable": {"time": times["ours"]}},
        "instead": {
            f"block by block, {round(share * size[0] * size[1] / 16)} of them": {
                "time": times["blocks"]
            }
        },
        "checks": [at_least("block by block / CPU time, of as many blocks", ratio, 10.0)],
    }


def _transposable(size: tuple[int, int]) -> Any:
    import jax.numpy as jnp
    from scipy.optimize import linprog

    layer = _layer(*size)
    weight = np.random.default_rng(0).integers(-99, 100, size).astype(np.float32)
    config = _config(layer, NM(2, 4))
    params, few = {"w": jnp.asarray(weight)}, min(20, size[0] * size[1] // 16)
    blocks = weight.reshape(size[0] // 4, 4, size[1] // 4, 4).transpose(0, 2, 1, 3)
    blocks = blocks.reshape(-1, 4, 4)[:few]
    # The paper's flow problem of a block, whose vertices are whole: every row and column has two.
    lines = np.zeros((8, 16))
    for i, j in itertools.product(range(4), range(4)):
        lines[i, 4 * i + j] = lines[4 + j, 4 * i + j] = 1

    def by_block() -> list[float]:
        return [
            -linprog(-np.abs(b).reshape(-1), A_eq=lines, b_eq=np.full(8, 2), bounds=(0, 1)).fun
            for b in blocks
        ]

    mask = np.asarray(pp.transposable(params, None, config)["w"])
    kept = (np.abs(weight) * mask).reshape(size[0] // 4, 4, size[1] // 4, 4)
    kept = kept.transpose(0, 2, 1, 3).reshape(-1, 16).sum(1)[:few]
    assert np.allclose(kept, by_block()), "a block keeps less than it could"
    calls = {
        "ours": lambda: np.asarray(pp.transposable(params, None, config)["w"]),
        "blocks": by_block,
    }
    return in_turns(calls, least=3, most=7), few * 16 / weight.size
