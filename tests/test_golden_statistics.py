"""Slim, APoZ, mean activation and Taylor: the masks of Microsoft NNI 2.10 and 3.0, and its data.

``golden/README.md`` says what the data are. Masks come from the importance that NNI itself ranked;
that statistics of the same data give this importance is tested apart.
"""

import collections

import jax
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.stats import activations, gradients
from purepruning.stats.accumulate import CompensatedSum, WideCount
from tests import nni
from tests.modes import as_jax, as_numpy, as_torch, moved
from tests.nni import DATA, config_of, expected_of, model, turn_back

FRAMEWORKS = pytest.mark.parametrize("framework", [as_jax, as_torch], ids=["jax", "torch"])
PRUNERS = {
    "Slim": pp.slim,
    "ActivationAPoZRank": pp.apoz_rank,
    "ActivationMeanRank": pp.mean_activation_rank,
    "TaylorFOWeight": pp.taylor_fo,
}
# So many positions that every stored share of zeros is a whole number of them: up to four batches
# of 16 images of 8 x 8.
POSITIONS = 64 * 64


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Linux lets a process map only so many regions, and every compiled function takes some."""
    yield
    jax.clear_caches()


def cases(condition=lambda case: True):
    return nni.cases(lambda case: case["pruner"] in PRUNERS and condition(case))


def importance(case):
    """What NNI ranked: ``(1, channels)`` by layer."""
    m = model(case["model"])
    sizes = {name: len(m.params["torch"][f"{name}.weight"]) for name in case["pruned"]}
    values = m.statistics["importance"]
    return {n: values[at : at + sizes[n]].reshape(1, -1) for n, at in case["importance"].items()}


def inputs(case, params):
    """Parameters and statistics of which our pruner makes the importance that NNI ranked."""
    ranked, one = importance(case), WideCount(np.zeros((), np.int32), np.ones((), np.int32))
    if case["pruner"] == "Slim":
        return params | {f"{name}.weight": x[0] for name, x in ranked.items()}, None
    sums = {name: CompensatedSum(x, np.zeros_like(x)) for name, x in ranked.items()}
    if case["pruner"] == "TaylorFOWeight":
        return params, gradients.GradientStats(one, sums, {}, {})
    if case["pruner"] == "ActivationMeanRank":
        ones = dict.fromkeys(ranked, one)
        zeros = {name: WideCount(*[np.zeros(x.shape, np.int32)] * 2) for name, x in ranked.items()}
        return params, activations.ActivationStats(ones, ones, zeros, sums, sums, sums)
    positions, zeros = dict.fromkeys(ranked, WideCount(one.high, one.low * POSITIONS)), {}
    for name, x in ranked.items():
        count = np.round((1 - np.float64(x)) * POSITIONS)
        np.testing.assert_allclose(1 - count / POSITIONS, x, atol=1e-6)
        zeros[name] = WideCount(np.zeros(x.shape, np.int32), count.astype(np.int32))
    return params, activations.ActivationStats(positions, positions, zeros, sums, sums, sums)


def prune(case):
    """This library's masks, whole and in torch's layout, from torch and from Flax parameters."""
    m, results = model(case["model"]), {}
    for framework, convert in (("torch", as_torch), ("flax", as_jax)):
        params, stats = inputs(case, m.params[framework])
        table = [layer for layer in m.tables[framework] if layer.name in case["pruned"]]
        # So that all sparsities share one compiled function.
        config = config_of(case, table).with_sparsity(case["sparsity"])
        pruner = PRUNERS[case["pruner"]]
        masks = as_numpy(pruner(convert(params), moved(convert, stats), config))
        whole = {p: np.broadcast_to(x, params[p].shape) for p, x in masks.items()}
        results[framework] = (
            whole if framework == "torch" else {p: turn_back(x) for p, x in whole.items()}
        )
    return results


def kept(mask):
    """Which units (along the first axis) stay."""
    return mask.reshape(len(mask), -1).any(axis=1)


@cases()
def test_masks_are_those_of_nni(case):
    expected, ranked = expected_of(case), importance(case)
    for masks in prune(case).values():
        theirs = unit_that_crosses(case, masks, expected) if case.get("rounds_up") else expected
        for name, scores in ranked.items():
            weight, bias = f"{name}.weight", f"{name}.bias"
            ours, other = kept(masks[weight]), kept(theirs[weight])
            assert ours.sum() == other.sum()
            # Among ties NNI takes arbitrary ones.
            assert len(set(scores[0][ours != other])) <= (1 if case.get("tied") else 0)
            np.testing.assert_array_equal(masks[weight].reshape(len(ours), -1).all(axis=1), ours)
            if bias in masks:
                np.testing.assert_array_equal(masks[bias], ours)
                # 3.0 leaves the bias of a pruned norm in place, so that the channel is not zero.
                unmasked = "bn_bias_not_masked" in (case.get("suspect") or ())
                np.testing.assert_array_equal(theirs[bias], unmasked | other)


def unit_that_crosses(case, ours, theirs):
    """NNI's masks without the unit that crosses the target, which 3.0 prunes too."""
    ranked, theirs = importance(case), {p: m.copy() for p, m in theirs.items()}
    crossing = [
        (name, i)
        for name in ranked
        for i in np.flatnonzero(kept(ours[f"{name}.weight"]) & ~kept(theirs[f"{name}.weight"]))
    ]
    assert len(crossing) <= 1
    for name, i in crossing:
        gone = [s[0][~kept(theirs[f"{n}.weight"])].max(initial=-np.inf) for n, s in ranked.items()]
        assert ranked[name][0, i] == max(gone)
        for path in (f"{name}.weight", f"{name}.bias"):
            if path in theirs:
                theirs[path][i] = True
    sizes = [ours[f"{name}.weight"].size for name in ranked]
    pruned = sum(int(np.sum(~ours[f"{name}.weight"])) for name in ranked)
    assert pruned <= int(case["sparsity"] * sum(sizes))
    return theirs


def test_every_case_is_there():
    ours = [case for case in DATA["cases"] if case["pruner"] in PRUNERS]
    counts = collections.Counter((c["pruner"], c["nni_version"], c["mode"]) for c in ours)
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
    assert collections.Counter(code for c in ours for code in c.get("suspect") or ()) == {
        "bn_bias_not_masked": 12,
        "only_first_batch_used": 4,
        "apoz_gelu_rounding": 2,
    }


# From data to statistics: the forward pass and the gradients that NNI saw.


def outputs_of(m, x):
    """The output of every layer of a model, in torch's layout."""
    p, stored = as_torch(m.params["torch"]), as_torch(m.statistics)
    f, values = torch.nn.functional, {"input": torch.from_numpy(x)}
    for node in m.graph:
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
    return {layer.name: values[layer.name].numpy() for layer in m.tables["torch"]}


@FRAMEWORKS
@pytest.mark.parametrize("name", ["mlp", "rescnn"])
def test_activation_statistics_are_those_of_nni(name, framework):
    m = model(name)
    layers = [x for x in m.tables["torch"] if f"act_zero_frac/{x.name}" in m.statistics]
    stats = activations.init(framework(m.params["torch"]), layers)
    for x in m.statistics["x"]:
        outputs = framework(outputs_of(m, x))
        stats = activations.update(stats, outputs, layers, activation="relu")
    for layer in layers:
        n = int(stats.positions[layer.name].low)
        zeros = np.asarray(stats.zeros[layer.name].low)[0] / n
        means = np.asarray(stats.sums[layer.name].high)[0] / n
        expected = m.statistics[f"act_zero_frac/{layer.name}"].mean(0)
        # An output of magnitude 1e-7 may have the other sign.
        np.testing.assert_allclose(zeros, expected, atol=1.5 / n)
        expected = m.statistics[f"act_relu_mean/{layer.name}"].mean(0)
        np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-7)
        assert int(stats.samples[layer.name].low) == 64


@FRAMEWORKS
@cases(
    lambda c: (
        c["pruner"] == "TaylorFOWeight"
        and c["mode"] == "normal"
        and c["data"] == "all4"
        and c["sparsity"] == 0.5
    )
)
def test_taylor_importance_is_that_of_nni(case, framework):
    m = model(case["model"])
    layers = [layer for layer in m.tables["torch"] if layer.name in case["pruned"]]
    config = config_of(case, layers).with_sparsity(0.5)
    params = framework(m.params["torch"])
    stats = gradients.init(params, config)
    for step in range(4):
        grads = {x.weight: m.statistics[f"grad/{x.weight}"][step] for x in layers}
        stats = gradients.update(stats, params, framework(grads), config)
    for name, expected in importance(case).items():
        score = np.asarray(stats.squares[name].high) / (4 if case["nni_version"] == "3.0" else 1)
        np.testing.assert_allclose(score, expected, rtol=2e-5)
    masks = as_numpy(pp.taylor_fo(params, stats, config))
    for layer in layers:
        got = np.broadcast_to(masks[layer.weight], layer.shape)
        np.testing.assert_array_equal(got, expected_of(case)[layer.weight])


# What NNI gets wrong of the data.


def suspected(code, **fields):
    return cases(
        lambda c: code in (c.get("suspect") or ()) and all(c[k] == v for k, v in fields.items())
    )


@suspected("only_first_batch_used")
def test_nni_counts_the_first_batch_only(case):
    stored = model(case["model"]).statistics
    by_zeros, differs = case["pruner"] == "ActivationAPoZRank", False
    for name, ranked in importance(case).items():
        kind = "act_zero_frac" if by_zeros else "act_relu_mean"
        batches = stored[f"{kind}/{name}"]
        batches = 1 - batches if by_zeros else batches
        np.testing.assert_allclose(ranked[0], batches[0], rtol=1e-4, atol=1e-6)
        differs |= not np.allclose(ranked[0], batches.mean(0), rtol=1e-4, atol=1e-6)
    assert differs


@suspected("apoz_gelu_rounding", model="rescnn")
def test_nni_counts_zeros_of_a_gelu_that_are_none(case):
    m = model(case["model"])
    layers = [layer for layer in m.tables["torch"] if layer.name in case["pruned"]]
    stats, true = activations.init(as_torch(m.params["torch"]), layers), 0
    for x in m.statistics["x"]:
        outputs = outputs_of(m, x)
        true += sum(int(np.sum(outputs[layer.name] == 0)) for layer in layers)
        stats = activations.update(stats, as_torch(outputs), layers, activation="gelu")
    positions = {name: int(total.low) for name, total in stats.positions.items()}
    ours = sum(int(np.asarray(total.low).sum()) for total in stats.zeros.values())
    theirs = sum(np.sum((1 - x) * positions[name]) for name, x in importance(case).items())
    assert ours == true < theirs - 100
