"""Slim, APoZ, mean activation and Taylor against masks that NNI 2.10 and 3.0 made.

``golden/criteria.md`` says what is stored. Masks are compared exactly,
from the importance that NNI itself ranked; where it is known how NNI went wrong, a test says so.
"""

import functools
import json
import pathlib

import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import Layer
from purepruning.stats import activations, gradients
from purepruning.stats.accumulate import Count, Sum
from tests.modes import as_jax, as_numpy, as_torch

GOLDEN = pathlib.Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "criteria.json").read_text())
FRAMEWORKS = pytest.mark.parametrize("framework", [as_jax, as_torch], ids=["jax", "torch"])

PRUNERS = {
    "Slim": pp.slim,
    "ActivationAPoZRank": pp.apoz_rank,
    "ActivationMeanRank": pp.mean_activation_rank,
    "TaylorFOWeight": pp.taylor_fo,
}
#: What is wrong elsewhere than in the masks of weights that NNI makes from the stored importance.
ELSEWHERE = {"bn_bias_not_masked", "only_first_batch_used", "apoz_gelu_rounding"}
CASES = [
    case
    for case in MANIFEST["cases"]
    if case["pruner"] in PRUNERS
    and case["status"] == "ok"
    and case["mode"] in ("normal", "global")  # coupled layers are another matter
    and set(case["suspect"] or ()) <= ELSEWHERE
]


@functools.cache
def arrays(model):
    with np.load(GOLDEN / MANIFEST["models"][model]["file"], allow_pickle=False) as stored:
        return dict(stored)


@functools.cache
def table(model):
    rows = []
    for node in MANIFEST["models"][model]["graph"]:
        path, stored = f"{node['name']}.weight", arrays(model)
        if f"param/{path}" not in stored:
            continue
        norm = node["op"] == "batchnorm2d"
        type_ = {"linear": "Linear", "conv2d": "Conv2d", "batchnorm2d": "BatchNorm2d"}[node["op"]]
        bias = f"{node['name']}.bias"
        rows.append(
            Layer(
                node["name"],
                type_,
                path,
                stored[f"param/{path}"].shape,
                (0,),
                () if norm else (1,),
                groups=node.get("groups", 1),
                bias=bias if f"param/{bias}" in stored else None,
                output_axes=(1,),
            )
        )
    return {layer.name: layer for layer in rows}


def params_of(model):
    prefix = "param/"
    return {k.removeprefix(prefix): v for k, v in arrays(model).items() if k.startswith(prefix)}


def metrics_of(case):
    """The importance of every unit, ``(1, units)`` by layer."""
    values = arrays(case["model"])["values"]
    return {
        name: values[at : at + int(np.prod(shape))].reshape(1, -1)
        for name, (at, shape) in case["metrics"].items()
    }


def masks_of(case):
    info, stored = MANIFEST["models"][case["model"]], arrays(case["model"])
    bits = np.unpackbits(stored["mask_bits"][case["row"]])[: info["mask_bits_per_row"]]
    masks, at = {}, 0
    for path, shape in info["mask_layout"]:
        n = int(np.prod(shape))
        masks[path] = bits[at : at + n].reshape(shape).astype(bool)
        at += n
    return masks


def inputs(case):
    """Parameters and statistics by which our pruner ranks what NNI ranked."""
    params, metrics = params_of(case["model"]), metrics_of(case)
    one = Count(np.int32(0), np.int32(1))
    # So many positions that every stored share of zeros is a whole number of them: up to four
    # batches of 16 images of 8 x 8.
    many = 64 * 64
    if case["pruner"] == "Slim":
        return params | {f"{n}.weight": m[0] for n, m in metrics.items()}, None
    sums = {name: Sum(m, np.zeros_like(m)) for name, m in metrics.items()}
    if case["pruner"] == "TaylorFOWeight":
        return params, gradients.GradientStats(one, sums, {}, {})
    positions, zeros = dict.fromkeys(metrics, one), {}
    if case["pruner"] == "ActivationAPoZRank":
        positions = dict.fromkeys(metrics, Count(np.int32(0), np.int32(many)))
        for name, metric in metrics.items():
            share = np.round((1 - np.float64(metric)) * many)
            np.testing.assert_allclose(1 - share / many, metric, atol=1e-6)
            zeros[name] = Count(np.zeros(metric.shape, np.int32), share.astype(np.int32))
    else:
        zeros = {name: Count(*(np.zeros(m.shape, np.int32),) * 2) for name, m in metrics.items()}
    return params, activations.ActivationStats(positions, positions, zeros, sums, sums, sums)


def config_of(case):
    rule = {"op_names": case["targets"], "allow_empty": True}
    if case["mode"] == "global":
        default = 0.99 if case["nni_version"] == "2.10" else 1.0
        rule["max_sparsity_per_layer"] = case.get("max_sparsity_per_layer", default)
    config = pp.resolve(
        [rule],
        table(case["model"]).values(),
        scope="layer" if case["mode"] == "normal" else "global",
        granularity="element" if case["pruner"] == "Slim" else "output_channel",
    )
    return config.with_sparsity(case["sparsity"])  # so that cases share compiled functions


def pruned(case, framework):
    params, stats = inputs(case)
    masks = as_numpy(PRUNERS[case["pruner"]](framework(params), stats, config_of(case)))
    shapes = {path: x.shape for path, x in params.items()}
    return {path: np.broadcast_to(mask, shapes[path]) for path, mask in masks.items()}


@FRAMEWORKS
@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_masks_are_those_of_nni(case, framework):
    ours, theirs, metrics = pruned(case, framework), masks_of(case), metrics_of(case)
    quirks = case.get("quirks") or ()
    if "rounds_up_to_unit" in quirks:  # NNI prunes the unit that crosses the target too
        extra = {p: ours[p] & ~theirs[p] for p in ours}
        crossing = [(p, i) for p in extra for i in np.flatnonzero(one_per_unit(extra[p]))]
        crossing = [(p, i) for p, i in crossing if p.endswith(".weight")]
        assert len(crossing) <= 1
        for path, i in crossing:
            worst = max(
                float(m[0][~one_per_unit(theirs[f"{n}.weight"])].max(initial=-np.inf))
                for n, m in metrics.items()
            )
            assert metrics[path.removesuffix(".weight")][0, i] == worst
            theirs = {p: m.copy() for p, m in theirs.items()}
            for p in (path, path.replace("weight", "bias")):
                if p in theirs:
                    theirs[p][i] = True
        budget = int(case["sparsity"] * case["total"]["elements"])
        gone = sum(int(np.sum(~ours[f"{n}.weight"])) for n in metrics)
        assert gone <= budget == case["total"]["asked"]
    for name, metric in metrics.items():
        paths = [p for p in (f"{name}.weight", f"{name}.bias") if p in ours]
        if "tie_positions_arbitrary" in quirks:
            keep, other = (one_per_unit(m[paths[0]]) for m in (ours, theirs))
            assert keep.sum() == other.sum()
            # They differ in units of one and the same importance at most.
            assert len(set(metric[0][keep != other])) <= 1
            if np.array_equal(keep, other):
                assert all(np.array_equal(ours[p], theirs[p]) for p in paths)
            continue
        if "bn_bias_not_masked" in (case["suspect"] or ()):
            assert theirs[f"{name}.bias"].all()
            theirs[f"{name}.bias"] = theirs[f"{name}.weight"]
        for path in paths:
            np.testing.assert_array_equal(ours[path], theirs[path])


def one_per_unit(mask):
    """Which units (along the first axis) stay."""
    return mask.reshape(mask.shape[0], -1).any(axis=1)


def test_the_cases_are_the_ones_expected():
    counts = {}
    for case in CASES:
        key = (case["pruner"], case["nni_version"], case["mode"])
        counts[key] = counts.get(key, 0) + 1
    assert counts == {
        ("Slim", "2.10", "normal"): 6,
        ("Slim", "2.10", "global"): 7,
        ("Slim", "3.0", "normal"): 6,
        ("Slim", "3.0", "global"): 6,
        ("ActivationAPoZRank", "2.10", "normal"): 18,
        ("ActivationMeanRank", "2.10", "normal"): 18,
        ("TaylorFOWeight", "2.10", "normal"): 10,
        ("TaylorFOWeight", "2.10", "global"): 8,
        ("TaylorFOWeight", "3.0", "normal"): 10,
        ("TaylorFOWeight", "3.0", "global"): 1,
    }


# From data to statistics: the forward pass and the gradients that NNI saw.


def outputs_of(model, x):
    """The output of every layer, from the graph in the manifest."""
    p = {path: torch.from_numpy(v) for path, v in params_of(model).items()}
    stored = {k: torch.from_numpy(v) for k, v in arrays(model).items() if k.startswith("buffer/")}
    f, values = torch.nn.functional, {"input": torch.from_numpy(x)}
    for node in MANIFEST["models"][model]["graph"]:
        name, ins = node["name"], [values[i] for i in node["inputs"]]
        w, b = p.get(f"{name}.weight"), p.get(f"{name}.bias")
        match node["op"]:
            case "linear":
                values[name] = f.linear(ins[0], w, b)
            case "conv2d":
                values[name] = f.conv2d(
                    ins[0], w, b, node["stride"], node["padding"], groups=node["groups"]
                )
            case "batchnorm2d":
                mean, var = (stored[f"buffer/{name}.running_{s}"] for s in ("mean", "var"))
                values[name] = f.batch_norm(ins[0], mean, var, w, b, eps=node["eps"])
            case "relu":
                values[name] = f.relu(ins[0])
            case "add":
                values[name] = ins[0] + ins[1]
            case "concat":
                values[name] = torch.cat(ins, node["axis"])
            case "global_avg_pool":
                values[name] = ins[0].mean((2, 3), keepdim=True)
            case "flatten":
                values[name] = ins[0].flatten(1)
    return {name: values[name].numpy() for name in table(model)}


@FRAMEWORKS
@pytest.mark.parametrize("model", ["mlp", "rescnn"])
def test_activation_statistics_are_those_of_nni(model, framework):
    stored = arrays(model)
    layers = [x for x in table(model).values() if f"act_zero_frac/{x.name}" in stored]
    stats = activations.init(framework(params_of(model)), layers)
    for x in stored["x"]:
        outputs = framework(outputs_of(model, x))
        stats = activations.update(stats, outputs, layers, activation="relu")
    for layer in layers:
        n = int(stats.positions[layer.name].low)
        zeros = np.asarray(stats.zeros[layer.name].low)[0] / n
        means = np.asarray(stats.sums[layer.name].high)[0] / n
        # An output of magnitude 1e-7 may have the other sign.
        np.testing.assert_allclose(
            zeros, stored[f"act_zero_frac/{layer.name}"].mean(0), atol=1.5 / n
        )
        np.testing.assert_allclose(
            means, stored[f"act_relu_mean/{layer.name}"].mean(0), rtol=1e-5, atol=1e-7
        )
        assert int(stats.samples[layer.name].low) == 64


def as_shipped(case):
    return case["status"] == "ok" and case["settings"].get("lr") == 0.0


TAYLOR = [
    case
    for case in MANIFEST["cases"]
    if case["pruner"] == "TaylorFOWeight" and case["tag"] == "all4" and as_shipped(case)
]


@FRAMEWORKS
@pytest.mark.parametrize("version", ["2.10", "3.0"])
@pytest.mark.parametrize("model", ["mlp", "rescnn"])
def test_taylor_importance_is_that_of_nni(model, version, framework):
    cases = [c for c in TAYLOR if c["model"] == model and c["nni_version"] == version]
    case = next(c for c in cases if c["mode"] == "normal")
    config, params = config_of(case), framework(params_of(model))
    stats = gradients.init(params, config)
    for step in range(4):
        grads = {x.weight: arrays(model)[f"grad/{x.weight}"][step] for x in config.layers}
        stats = gradients.update(stats, params, framework(grads), config)
    for name, metric in metrics_of(case).items():
        score = np.asarray(stats.squares[name].high) / (4 if version == "3.0" else 1)
        np.testing.assert_allclose(score, metric, rtol=2e-5)
    masks = as_numpy(pp.taylor_fo(params, stats, config))
    for layer in config.layers:
        got = np.broadcast_to(masks[layer.weight], layer.shape)
        np.testing.assert_array_equal(got, masks_of(case)[layer.weight])


# What NNI gets wrong.


def suspected(code, **fields):
    cases = [c for c in CASES if code in (c["suspect"] or ())]
    cases = [c for c in cases if all(c[k] == v for k, v in fields.items())]
    return pytest.mark.parametrize("case", cases, ids=[c["id"] for c in cases])


@suspected("only_first_batch_used")
def test_nni_counts_the_first_batch_only(case):
    stored = arrays(case["model"])
    kind = "act_zero_frac" if case["pruner"] == "ActivationAPoZRank" else "act_relu_mean"
    differs = False
    for name, metric in metrics_of(case).items():
        batches = stored[f"{kind}/{name}"]
        first, all4 = batches[0], batches.mean(0)
        if kind == "act_zero_frac":
            first, all4 = 1 - first, 1 - all4
        np.testing.assert_allclose(metric[0], first, rtol=1e-4, atol=1e-6)
        differs |= not np.allclose(metric[0], all4, rtol=1e-4, atol=1e-6)
    assert differs


@suspected("apoz_gelu_rounding", model="rescnn")
def test_nni_counts_zeros_of_a_gelu_that_are_none(case):
    layers = [table(case["model"])[name] for name in case["targets"]]
    stats, true = activations.init(as_torch(params_of(case["model"])), layers), 0
    for x in arrays(case["model"])["x"]:
        outputs = outputs_of(case["model"], x)
        true += sum(int(np.sum(outputs[layer.name] == 0)) for layer in layers)
        stats = activations.update(stats, as_torch(outputs), layers, activation="gelu")
    positions = {name: int(total.low) for name, total in stats.positions.items()}
    ours = sum(int(np.asarray(total.low).sum()) for total in stats.zeros.values())
    theirs = sum(np.sum((1 - m) * positions[name]) for name, m in metrics_of(case).items())
    assert ours == true < theirs - 100
