"""Rows about exact selection: the k-th smallest, masks of weights and channels, 2:4 masks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from data import (
    convolution_layers,
    different_convolutions,
    fingerprint,
    linear_layers,
    nbytes,
    normal,
    to_jax,
    to_torch,
    transformer,
)
from measure import at_least, at_most, in_turns, memory_of, one_torch_thread, report

import purepruning as pp

FRACTIONS = (0.1, 0.5, 0.9, 0.99)
SPARSITY = 0.9


# The k-th smallest.


def kth(size: int, run: Callable[..., Any]) -> dict[str, Any]:
    timing = run(_kth_timing, size)
    names = ("jax", "torch", "jax, inside jit", "torch.kthvalue", "np.partition")
    memory = {name: run(_kth_memory, name, size) for name in names}
    kthvalue, read = timing["torch.kthvalue"]["cpu_s"], timing["read pass"]["cpu_s"]
    checks = []
    for name in ("jax", "torch"):
        cpu = timing[name]["cpu_s"]
        checks += [
            at_most(f"{name}: read passes, CPU", cpu / read, 6),
            at_least(f"{name}: less CPU time than torch.kthvalue", kthvalue / cpu, 10),
            at_most(f"{name}: extra memory / parameters", memory[name]["ratio"], 0.05),
        ]
    jitted = timing["jax, inside jit"]["cpu_s"]
    checks += [
        at_most("jax, inside jit: read passes, CPU", jitted / read, 12),
        at_most(
            "jax, inside jit: extra memory / parameters", memory["jax, inside jit"]["ratio"], 0.05
        ),
    ]
    costs = {name: {"time": timing[name], "memory": memory[name]} for name in names}
    return {
        "title": f"exact k-th smallest of {_amount(size)} values",
        "ours": {name: costs[name] for name in names[:3]},
        "instead": {"one read pass": {"time": timing["read pass"]}}
        | {name: costs[name] for name in names[3:]},
        "checks": checks,
        "by k": timing["by k"],
    }


def _cut(values: Any, k: Any) -> Any:
    import jax.numpy as jnp

    from purepruning.pruners.magnitude import element
    from purepruning.selection import kth_jax

    return kth_jax.local_cuts([element(values, None)], jnp.stack([k]))


def _host_cut(values: Any, k: int) -> tuple[int, int]:
    """Returns the last key to prune, and how many of its ties, as an eager call finds them."""
    from purepruning.arrays import by_numpy
    from purepruning.pruners.magnitude import element
    from purepruning.selection import kth_host

    def cut(values: np.ndarray) -> tuple[int, int]:
        (found,) = kth_host.local_cuts([element(values, None)], [k])
        assert found is not None, "there is a NaN"
        return found.key[0], found.ties[0]

    return by_numpy(cut, values)


def _kth_timing(size: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import torch

    one_torch_thread()
    values = np.abs(normal((size,)))
    tensor, array = torch.from_numpy(values), jnp.array(values)
    bits, place = values.view(np.int32), np.arange(size, dtype=np.int32)
    ks = {f: max(int(f * size), 1) for f in FRACTIONS}
    compiled = jax.jit(_cut)
    cut = lambda array, k: compiled(array, jnp.int32(k))  # noqa: E731
    read = jax.jit(lambda x: jnp.sum(jnp.abs(x)))
    calls: dict[str, Callable[[], Any]] = {"read pass": lambda: read(array).block_until_ready()}
    for f, k in ks.items():
        calls[f"jax {f}"] = lambda k=k: _host_cut(array, k)
        calls[f"torch {f}"] = lambda k=k: _host_cut(tensor, k)
        calls[f"jax, inside jit {f}"] = lambda k=k: jax.block_until_ready(cut(array, k))
        calls[f"torch.kthvalue {f}"] = lambda k=k: torch.kthvalue(tensor, k).values
        calls[f"np.partition {f}"] = lambda k=k: np.partition(values, k - 1)[k - 1]
        key, index = (int(x[0]) for x in cut(array, k))
        below = (bits < key) | ((bits == key) & (place <= index))
        assert int(below.sum()) == k, f"{int(below.sum())} values are cut off instead of {k}"
        assert values[below].max() == float(calls[f"torch.kthvalue {f}"]())
        assert values[below].max() == calls[f"np.partition {f}"]()
        for found in (calls[f"jax {f}"](), calls[f"torch {f}"]()):
            assert int((bits < found[0]).sum()) + found[1] == k
    times = in_turns(calls, least=3, most=9)
    names = ("jax", "torch", "jax, inside jit", "torch.kthvalue", "np.partition")
    worst = {
        name: {
            key: float(np.median([times[f"{name} {f}"][key] for f in FRACTIONS]))
            for key in ("wall_s", "cpu_s")
        }
        for name in names
    }
    by_k = {n: {f: times[f"{n} {f}"] for f in FRACTIONS} for n in names}
    return {**worst, "read pass": times["read pass"], "by k": by_k}


def _kth_memory(name: str, size: int) -> dict[str, Any]:
    values = np.abs(normal((size,)))
    k, extra = size // 2, {}
    if name == "jax":
        import jax.numpy as jnp

        array = jnp.array(values).block_until_ready()
        del values
        call = lambda: _host_cut(array, k)  # noqa: E731
    elif name == "jax, inside jit":
        import jax
        import jax.numpy as jnp

        values = jnp.array(values)
        run = jax.jit(_cut).lower(values, jnp.int32(k)).compile()
        extra["xla_temporaries"] = run.memory_analysis().temp_size_in_bytes
        call = lambda: jax.block_until_ready(run(values, jnp.int32(k)))  # noqa: E731
    elif name.startswith("torch"):
        import torch

        tensor = torch.from_numpy(values)
        call = lambda: _host_cut(tensor, k)  # noqa: E731
        if name == "torch.kthvalue":
            call = lambda: torch.kthvalue(tensor, k).values  # noqa: E731
    else:
        call = lambda: np.partition(values, k - 1)[k - 1]  # noqa: E731
    if name in ("jax", "torch"):
        _host_cut(np.ones(10, np.float32), 5)  # imports
    return memory_of(call, 4 * size) | extra


# Masks of single elements.


def global_masks(shape: tuple[int, int, int], run: Callable[..., Any]) -> dict[str, Any]:
    return _element_masks("global", shape, run)


def layer_masks(shape: tuple[int, int, int], run: Callable[..., Any]) -> dict[str, Any]:
    result = _element_masks("layer", shape, run)
    sort = run(_sort_timing, sum(w.size for w in transformer(*shape).values()) // 4)
    result["instead"][f"jnp.sort of {_amount(sort.pop('size'))}, no masks yet"] = {"time": sort}
    return result


def _element_masks(
    scope: str, shape: tuple[int, int, int], run: Callable[..., Any]
) -> dict[str, Any]:
    baseline = _BASELINES[scope]
    threads = f"{baseline}, torch's own threads"
    timing = run(_masks_timing, scope, shape, False)
    timing[threads] = run(_masks_timing, scope, shape, True)[baseline]
    bfloat16 = run(_bfloat16_timing, scope, shape)
    memory = {name: run(_masks_memory, name, scope, shape) for name in ("jax", "torch", baseline)}
    prints = {name: memory[name].pop("masks") for name in ("jax", "torch")}
    assert prints["jax"] == prints["torch"], f"masks differ between frameworks: {prints}"
    assert memory[baseline].pop("masks") == prints["torch"][1], "the baseline keeps another number"
    checks = []
    for name in ("jax", "torch"):
        least = min(timing[baseline]["cpu_s"], timing[threads]["cpu_s"])
        times = least / timing[name]["cpu_s"]
        checks.append(at_least(f"{name}: less CPU time", times, 60 if scope == "global" else 40))
        ratio = bfloat16[f"{name}, bfloat16"]["cpu_s"] / bfloat16[name]["cpu_s"]
        checks.append(at_most(f"{name}: bfloat16 / float32, CPU", ratio, 1.3))
        if scope == "global":
            what = f"{name}: extra memory / parameters, masks included"
            checks.append(at_most(what, memory[name]["ratio"], 0.35))
    what = "whole-model" if scope == "global" else "per-layer"
    size, layers = _amount(timing["size"]), timing["layers"]
    jitted = {"jax, inside jit": {"time": timing["jax, inside jit"]}}
    theirs = {"time": timing[baseline], "memory": memory[baseline]}
    return {
        "title": f"{what} masks of {size} weights in {layers} matrices",
        "ours": {f: {"time": timing[f], "memory": memory[f]} for f in ("jax", "torch")} | jitted,
        "instead": {
            f"torch.nn.utils.prune.{baseline}": theirs,
            "the same with torch's own threads": {"time": timing[threads]},
        },
        "checks": checks,
    }


_BASELINES = {"global": "global_unstructured", "layer": "l1_unstructured"}


def _modules(tensors: dict[str, Any]) -> list[tuple[Any, str]]:
    import torch

    modules = []
    for tensor in tensors.values():
        module = torch.nn.Linear(*reversed(tensor.shape), bias=False, device="meta")
        module.weight = torch.nn.Parameter(tensor)
        modules.append((module, "weight"))
    return modules


def _torch_prune(scope: str, config: pp.Config, modules: list[tuple[Any, str]]) -> None:
    from torch.nn.utils import prune

    if scope == "global":
        (count,) = config.counts.values()
        prune.global_unstructured(modules, pruning_method=prune.L1Unstructured, amount=count)
    else:
        for (module, name), count in zip(modules, config.counts.values(), strict=True):
            prune.l1_unstructured(module, name, amount=count)


def _config(weights: dict[str, Any], scope: str) -> pp.Config:
    rules = [{"sparsity": SPARSITY, "op_types": ["Linear"], "max_sparsity_per_layer": 0.99}]
    if scope == "layer":
        del rules[0]["max_sparsity_per_layer"]
    return pp.resolve(rules, linear_layers(weights), scope=scope)


def _masks_timing(scope: str, shape: tuple[int, int, int], threads: bool) -> dict[str, Any]:
    import jax

    if not threads:
        one_torch_thread()
    weights = dict(sorted(transformer(*shape).items()))
    tensors, arrays = to_torch(weights), to_jax(weights)
    config = _config(weights, scope)
    level = jax.jit(pp.level)
    calls: dict[str, Callable[..., Any]] = {
        "jax": lambda: jax.block_until_ready(pp.level(arrays, None, config)),
        "jax, inside jit": lambda: jax.block_until_ready(level(arrays, None, config)),
        "torch": lambda: pp.level(tensors, None, config),
        _BASELINES[scope]: lambda modules: _torch_prune(scope, config, modules),
    }
    setup = {_BASELINES[scope]: lambda: _modules(tensors)}
    if threads:
        calls = {name: calls[name] for name in setup}
    times = in_turns(calls, least=3, most=15, setup=setup)
    return times | {"size": nbytes(weights) // 4, "layers": len(weights)}


def _bfloat16_timing(scope: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import torch

    one_torch_thread()
    weights = dict(sorted(transformer(*shape).items()))
    config = _config(weights, scope)
    arrays, tensors = to_jax(weights), to_torch(weights)
    params = {
        "jax": arrays,
        "jax, bfloat16": {name: x.astype(jnp.bfloat16) for name, x in arrays.items()},
        "torch": tensors,
        "torch, bfloat16": {name: x.to(torch.bfloat16) for name, x in tensors.items()},
    }
    calls = {
        name: lambda some=some: jax.block_until_ready(pp.level(some, None, config))
        for name, some in params.items()
    }
    prints = {fingerprint(calls[name]()) for name in params if name.endswith("bfloat16")}
    assert len(prints) == 1, f"masks of bfloat16 differ between frameworks: {prints}"
    return in_turns(calls, least=3, most=9)


def _masks_memory(name: str, scope: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    weights = dict(sorted(transformer(*shape).items()))
    config = _config(weights, scope)
    size = nbytes(weights)
    if name == "jax":
        import jax

        arrays = to_jax(weights)
        del weights
        jax.block_until_ready(pp.level(arrays, None, config))  # compiles
        masks = lambda: jax.block_until_ready(pp.level(arrays, None, config))  # noqa: E731
        compiled = jax.jit(pp.level).lower(arrays, None, config).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        extra = {"xla_temporaries": temporaries, "xla_temporaries / parameters": temporaries / size}
        return memory_of(masks, size) | extra | {"masks": fingerprint(masks())}
    import torch

    tensors = to_torch(weights)
    torch.zeros(1000).kthvalue(5)
    if name == "torch":
        masks = lambda: pp.level(tensors, None, config)  # noqa: E731
        return memory_of(masks, size) | {"masks": fingerprint(masks())}
    modules = _modules(tensors)
    result = memory_of(lambda: _torch_prune(scope, config, modules), size)
    return result | {"masks": sum(int(module.weight_mask.sum()) for module, _ in modules)}


def _sort_timing(size: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    array, sort = jnp.array(normal((size,))), jax.jit(jnp.sort)
    return in_turns({"": lambda: sort(array).block_until_ready()}, least=1, most=1)[""] | {
        "size": size
    }


# The first call of a process.


def first_shapes(count: int, run: Callable[..., Any]) -> dict[str, Any]:
    """Pruning convolutions of as many shapes, in a process that has pruned nothing before."""
    names = [f"{pruner}, {framework}" for pruner in _PRUNERS for framework in ("jax", "torch")]
    calls = {name: run(_first_shapes, name, count) for name in names}
    theirs = {p: run(_first_shapes, f"{p}, torch.nn.utils.prune", count) for p in _PRUNERS}
    weights = calls[names[0]]["weights"]
    for pruner in _PRUNERS:
        prints = {calls[name].pop("masks") for name in names if name.startswith(pruner)}
        assert len(prints) == 1, f"masks of {pruner} differ between frameworks: {prints}"
    return {
        "title": f"first call: {count} convolutions of {count} shapes, {_amount(weights)} weights",
        "ours": {name: {"time": call} for name, call in calls.items()},
        "instead": {
            f"torch.nn.utils.prune.{_PRUNERS[p][1]}": {"time": call} for p, call in theirs.items()
        },
        "checks": [at_most(f"{name}: CPU seconds", c["cpu_s"], 1) for name, c in calls.items()]
        + [report(f"{name}: second call, ms", c["second"] * 1e3) for name, c in calls.items()],
    }


_PRUNERS = {
    "level": ("element", "l1_unstructured"),
    "l1_norm": ("output_channel", "ln_structured"),
}


def _first_shapes(name: str, count: int) -> dict[str, Any]:
    import jax
    import torch
    from torch.nn.utils import prune

    one_torch_thread()
    pruner, framework = name.split(", ")
    granularity, baseline = _PRUNERS[pruner]
    kernels = different_convolutions(count)
    layers = convolution_layers(kernels)
    config = pp.resolve(
        [{"sparsity": 0.5, "op_types": ["Conv2d"]}], layers, granularity=granularity
    )
    params = (to_jax if framework == "jax" else to_torch)(kernels)
    if framework == "torch.nn.utils.prune":
        modules = [torch.nn.Module() for _ in kernels]
        for module, tensor in zip(modules, params.values(), strict=True):
            module.weight = torch.nn.Parameter(tensor.permute(3, 2, 0, 1).contiguous())
        more = {"n": 1, "dim": 0} if baseline == "ln_structured" else {}

        def call() -> Any:
            for module, k in zip(modules, config.counts.values(), strict=True):
                getattr(prune, baseline)(module, "weight", amount=k, **more)
    else:

        def call() -> Any:
            return jax.block_until_ready(getattr(pp, pruner)(params, None, config))

    cpus, walls, masks = [], [], None
    for _ in range(1 if framework == "torch.nn.utils.prune" else 2):
        wall, cpu = time.perf_counter(), time.process_time()
        masks = call()
        cpus.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - wall)
    result = {"cpu_s": cpus[0], "wall_s": walls[0], "rounds": 1, "weights": nbytes(kernels) // 4}
    if masks is not None:
        result |= {"second": cpus[1], "masks": fingerprint(masks)}
    return result


# 2:4.


def two_of_four(shape: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    timing = run(_nm_timing, shape)
    reason = timing.pop("skipped", None)
    memory = {name: run(_nm_memory, name, shape) for name in ("jax", "torch")}
    result: dict[str, Any] = {
        "title": f"2:4 masks of a {shape[0]} x {shape[1]} matrix",
        "ours": {f: {"time": timing[f]} for f in timing if f != "torchao"},
        "instead": {},
        "checks": [],
    }
    for name in ("jax", "torch"):
        result["ours"][name]["memory"] = memory[name]
    if reason:
        result["skipped"] = reason
        return result
    name = "torchao.sparsity.utils.mask_creator"
    result["instead"][name] = {"time": timing["torchao"]}
    result["checks"] = [
        at_least(f"{f}: less CPU time", timing["torchao"]["cpu_s"] / timing[f]["cpu_s"], 4)
        for f in timing
        if f != "torchao"
    ]
    return result


def _nm_config(weights: dict[str, Any], in_axis: int = 1) -> pp.Config:
    (name,), (shape,) = zip(*((n, tuple(w.shape)) for n, w in weights.items()), strict=True)
    layer = pp.Layer("fc", "Linear", name, shape, out_axes=(1 - in_axis,), in_axes=(in_axis,))
    return pp.resolve([{"op_types": ["Linear"]}], [layer], granularity=pp.NM(keep=2, of=4))


def _nm_timing(shape: tuple[int, int]) -> dict[str, Any]:
    import jax

    one_torch_thread()
    weights = {"fc.weight": normal(shape)}
    across = {"fc.weight": np.ascontiguousarray(weights["fc.weight"].T)}
    tensors, arrays, flax_arrays = to_torch(weights), to_jax(weights), to_jax(across)
    config, flax_config = _nm_config(weights), _nm_config(across, in_axis=0)
    calls: dict[str, Callable[[], Any]] = {
        "jax": lambda: jax.block_until_ready(pp.level(arrays, None, config)),
        "jax, stored (in, out)": lambda: jax.block_until_ready(
            pp.level(flax_arrays, None, flax_config)
        ),
        "torch": lambda: pp.level(tensors, None, config),
    }
    masks = [np.asarray(call()["fc.weight"]) for call in calls.values()]
    masks[1] = masks[1].T
    assert all(np.array_equal(masks[0], mask) for mask in masks), "masks differ between frameworks"
    skipped = {}
    try:
        from torchao.sparsity.utils import mask_creator
    except ImportError as error:
        skipped["skipped"] = f"torchao is not installed ({error})"
    else:
        calls["torchao"] = lambda: mask_creator(tensors["fc.weight"], N=2, M=4)
        theirs = calls["torchao"]().numpy()
        magnitude = np.abs(weights["fc.weight"])
        # Of equal weights either may go, but what is kept weighs the same.
        assert int(theirs.sum()) == int(masks[0].sum())
        assert np.where(masks[0], magnitude, 0).sum(dtype=np.float64) == np.where(
            theirs, magnitude, 0
        ).sum(dtype=np.float64)
    return in_turns(calls, least=5, most=15) | skipped


def _nm_memory(name: str, shape: tuple[int, int]) -> dict[str, Any]:
    weights = {"fc.weight": normal(shape)}
    config, size = _nm_config(weights), nbytes(weights)
    params = to_jax(weights) if name == "jax" else to_torch(weights)
    if name == "jax":
        import jax

        call = lambda: jax.block_until_ready(pp.level(params, None, config))  # noqa: E731
    else:
        call = lambda: pp.level(params, None, config)  # noqa: E731
    call()
    return memory_of(call, size)


def _amount(size: int) -> str:
    return f"{size / 1e6:.3g}M" if size >= 1e5 else f"{size:,}"
