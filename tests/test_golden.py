"""The masks of Microsoft NNI 2.10 and 3.0: the same where they are defined, and why not elsewhere.

``golden/README.md`` says what the data are. Every case is run from torch parameters and from the
same weights in the layouts of Flax.
"""

import collections

import jax
import numpy as np
import pytest

import purepruning as pp
from purepruning import Block, resolve
from tests import nni
from tests.messages import raises
from tests.modes import as_jax, as_numpy, as_torch
from tests.nni import DATA, asked, config_of, expected_of, model, turn, turn_back

PRUNERS = {"Level": pp.level, "L1Norm": pp.l1_norm, "L2Norm": pp.l2_norm, "FPGM": pp.fpgm}


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Linux lets a process map only so many regions, and every compiled function takes some."""
    yield
    jax.clear_caches()


def cases(condition):
    return nni.cases(lambda case: case["pruner"] in PRUNERS and condition(case))


def prune(case, granularity=None, *, layers=None, counts=None):
    """This library's masks, whole and in torch's layout, from torch and from Flax parameters.

    Among ties the first in the parameter's own layout go, so that these two may then differ.
    """
    m, results, layers = model(case["model"]), {}, layers or case["pruned"]
    start = m.masks(case["start_row"]) if "start_row" in case else {}
    for framework, convert in (("torch", as_torch), ("flax", as_jax)):
        params = dict(m.params[framework])
        for path, mask in start.items():
            params[path] = params[path] * (mask if framework == "torch" else turn(mask))
        table = [layer for layer in m.tables[framework] if layer.name in layers]
        config = config_of(case, table, granularity)
        config = config.with_counts(counts) if counts else config.with_sparsity(asked(case))
        masks = as_numpy(PRUNERS[case["pruner"]](convert(params), None, config))
        whole = {p: np.broadcast_to(x, params[p].shape) for p, x in masks.items()}
        back = {p: turn_back(x) for p, x in whole.items()}
        results[framework] = whole if framework == "torch" else back
    return results


def assert_same(case, results):
    for framework, masks in results.items():
        for path, mask in expected_of(case).items():
            got = masks.get(path, np.ones_like(mask))
            np.testing.assert_array_equal(got, mask, err_msg=f"{framework}: {path}")


def pruned_weights(masks):
    """How many weights are gone; biases do not count."""
    return sum(int(np.sum(~x)) for path, x in masks.items() if path.endswith("weight"))


def scores(case, layer):
    """What a case ranks, in float64."""
    weight = model(case["model"]).params["torch"][layer].astype(np.float64)
    if case["pruner"] == "Level":
        return np.abs(weight)
    rows = weight.reshape(len(weight), -1)
    if case["pruner"] == "FPGM":
        return np.linalg.norm(rows[:, None] - rows[None, :], axis=2).sum(axis=1)
    return np.linalg.norm(rows, ord=1 if case["pruner"] == "L1Norm" else 2, axis=1)


#: Asked for more than the bounds on each layer allow, NNI silently prunes less.
UNREACHABLE = {
    "2.10.edge.Level.global.allocator_swapped.s0.999",
    "3.0.mlp.Level.global.max0.6_below_target.s0.8",
    "3.0.rescnn.Level.global.max0.6_below_target.s0.8",
}
#: Which of several equally large weights 2.10 protects from being the last one is arbitrary too.
TIED_AT_THE_CAP = {
    "2.10.edge.Level.global.allocator_swapped.s0.8",
    "2.10.edge.Level.global.allocator_swapped.s0.99",
}


def kind(case):
    """What is compared: of most cases, whole masks."""
    if case["status"] != "ok" or case.get("suspect"):
        return "suspect" if case.get("suspect") else "refused"
    if case["id"] in UNREACHABLE:
        return "unreachable"
    if case["id"] in TIED_AT_THE_CAP or case.get("tied"):
        return "tied"
    return case["mode"] if case["mode"] == "threshold" else case["granularity"]


# Where the answer is defined.


@cases(lambda c: kind(c) in ("element", "out_channel"))
def test_masks_are_those_of_nni(case):
    assert_same(case, prune(case))


@cases(lambda c: kind(c) == "in_channel")
def test_input_channels_are_those_of_nni(case):
    """NNI's input channel of a grouped convolution is one index into every group at once.

    Here each group has input channels of its own, as the layer before has output channels. What
    NNI prunes there is a block.
    """
    groups = DATA["models"][case["model"]]["groups"]
    plain = prune(case, "input_channel", layers=set(case["pruned"]) - set(groups))
    grouped = prune(case, Block((-1, 1, -1, -1)), layers=groups) if groups else {}
    both = {framework: plain[framework] | grouped.get(framework, {}) for framework in plain}
    assert_same(case, both)


@cases(lambda c: kind(c) == "threshold")
def test_a_threshold_is_a_count(case):
    counts = {
        layer: int(np.sum(scores(case, f"{layer}.weight") < case["sparse_threshold"]))
        for layer in case["pruned"]
    }
    assert counts == case["pruned"]
    assert_same(case, prune(case, counts=counts))


@cases(lambda c: kind(c) == "unreachable")
def test_what_the_bounds_do_not_reach_is_an_error(case):
    """NNI prunes every layer to its bound, and less than was asked for, without a word."""
    with raises(ValueError, "max_sparsity_per_layer"):
        prune(case)
    weights = [x for p, x in model(case["model"]).params["torch"].items() if p[-6:] == "weight"]
    done = sum(case["pruned"].values())
    assert done < case["sparsity"] * sum(x.size for x in weights if x.ndim > 1)
    # What it did do is what that smaller number gives.
    assert_same_but_for_ties(case, prune(case, counts={"rule 0": done}))


def test_a_refusal():
    """NNI's balance mode refuses blocks that do not divide; so does N:M, which it amounts to."""
    (case,) = [c for c in DATA["cases"] if c["status"] != "ok" and kind(c) == "refused"]
    assert "not aligned" in case["error"]
    for table in model(case["model"]).tables.values():
        with raises(ValueError, "'fc1'", "13", "groups of 4"):
            resolve([{"op_types": ["default"]}], table, granularity=pp.NM(2, 4))


# Ties at the cut: NNI takes arbitrary ones, this library those that come first.


@cases(lambda c: kind(c) == "tied")
def test_among_ties_the_counts_are_those_of_nni(case):
    assert_same_but_for_ties(case, prune(case))


def assert_same_but_for_ties(case, results):
    """The same number of units of every layer, and the same ones but for those that tie."""
    for framework, masks in results.items():
        for layer, count in case["pruned"].items():
            path = f"{layer}.weight"
            ours, theirs, score = masks[path], expected_of(case)[path], scores(case, path)
            if case["pruner"] != "Level":
                ours, theirs = (x.reshape(len(x), -1).any(axis=1) for x in (ours, theirs))
            elif framework == "flax":
                ours, theirs, score = turn(ours), turn(theirs), turn(score)
            assert np.sum(~ours) == np.sum(~theirs) == count
            # FPGM's scores are sums of rounded roots, equal only up to the last bits.
            cut = np.sort(score.reshape(-1))[max(count - 1, 0)]
            np.testing.assert_allclose(score[ours != theirs], cut, rtol=1e-6)
            if case["pruner"] != "FPGM":
                tied = np.isclose(score.reshape(-1), cut, rtol=1e-7)
                assert np.all(np.diff(ours.reshape(-1)[tied].astype(int)) >= 0)


# What looks wrong in NNI, code by code, and what this library does.


def of(code):
    return cases(lambda c: code in (c.get("suspect") or ()))


@cases(lambda c: "float_floor" in (c.get("suspect") or ()) and c["mode"] == "normal")
def test_float_floor(case):
    """NNI prunes ``int(s * n)``, so that 0.29 of 100 is 28. Here it is 29, and nothing else."""
    counts = {layer: count + 1 for layer, count in case["pruned"].items()}
    assert set(counts.values()) == {round(case["sparsity"] * 100)}
    expected = expected_of(case)["plain.weight"]  # the layer without ties
    for masks in prune(case).values():
        assert {x: int(np.sum(~masks[f"{x}.weight"])) for x in counts} == counts
        assert np.sum(expected & ~masks["plain.weight"]) == 1
        assert np.all(masks["plain.weight"] <= expected)


@of("global_ties_over_pruned")
def test_global_ties_over_pruned(case):
    """2.10 prunes all that equal the threshold. Here it is exactly as many as asked for."""
    expected = expected_of(case)
    for masks in prune(case).values():
        assert pruned_weights(masks) == round(case["sparsity"] * 400) < pruned_weights(expected)
        assert np.all(expected["plain.weight"] <= masks["plain.weight"])


@of("global_ties_under_pruned")
def test_global_ties_under_pruned(case):
    """3.0 keeps all that equal the threshold. Here it is exactly as many as asked for."""
    expected = expected_of(case)
    for masks in prune(case).values():
        assert pruned_weights(masks) == round(case["sparsity"] * 400) > pruned_weights(expected)
        assert all(np.all(mask <= expected[path]) for path, mask in masks.items())


@of("global_mixed_unit_sizes")
def test_global_mixed_unit_sizes(case):
    """3.0 loses count where units differ in size. Here the lowest go, as long as they fit."""
    for masks in prune({k: v for k, v in case.items() if k != "max_sparse_ratio"}).values():
        weights = {p: x.reshape(len(x), -1) for p, x in masks.items() if p[-6:] == "weight"}
        total = sum(x.size for x in weights.values())
        assert pruned_weights(masks) == case["plain_walk"] <= case["sparsity"] * total
        kept = [s for p, x in weights.items() for s in scores(case, p)[x.all(axis=1)]]
        gone = [s for p, x in weights.items() for s in scores(case, p)[~x.any(axis=1)]]
        assert max(gone) <= min(kept)


@of("bounds_ignored")
def test_bounds_ignored(case):
    """3.0 ranks as if there were none. Here ``max_sparsity_per_layer`` holds for every layer."""

    def shares(masks):
        return [np.mean(~masks[f"{layer}.weight"]) for layer in case["pruned"]]

    theirs = shares(expected_of(case))
    assert max(theirs) > case["max_sparse_ratio"] or min(theirs) < case["min_sparse_ratio"]
    for masks in prune(case).values():
        assert max(shares(masks)) <= case["max_sparse_ratio"]
        if case["pruner"] == "Level":
            assert pruned_weights(masks) == int(case["sparsity"] * sum(masks_sizes(case)))


def masks_sizes(case):
    return [expected_of(case)[f"{layer}.weight"].size for layer in case["pruned"]]


@of("global_full_ratio_prunes_nothing")
def test_global_full_ratio_prunes_nothing(case):
    """3.0 reads a missing bound as 0 there. Here everything goes, where the rule allows that."""
    assert all(mask.all() for mask in expected_of(case).values())
    assert not any(mask.any() for masks in prune(case).values() for mask in masks.values())
    for table in model(case["model"]).tables.values():
        with raises(ValueError, "rule 0", "allow_empty"):
            resolve([{"op_types": ["default"], "sparsity": 1.0}], table, scope="global")


@of("total_sparsity_per_layer")
def test_total_sparsity_per_layer(case):
    """2.10's Level takes ``total_sparsity`` for that of each layer. Here that is an error."""
    assert_same(case, prune(case))  # what "sparsity" means
    for table in model(case["model"]).tables.values():
        with raises(ValueError, "rule 0", "total_sparsity", "'global'"):
            resolve([{"op_types": ["default"], "total_sparsity": 0.5}], table)


@of("crash")
def test_crash(case):
    """2.10 fails to prune nothing in global mode. Here nothing is pruned."""
    assert case["status"] == "error"
    for masks in prune(case, layers=["rounded", "equal", "zeros", "plain"]).values():
        assert all(mask.all() for mask in masks.values())


# Nothing is left out.


def test_every_case_is_in_one_of_these_tests():
    ours = [c for c in DATA["cases"] if c["pruner"] in PRUNERS]
    codes = collections.Counter(code for c in ours for code in c.get("suspect") or ())
    assert codes == {
        "float_floor": 12,
        "global_ties_over_pruned": 6,
        "global_ties_under_pruned": 6,
        "global_mixed_unit_sizes": 16,
        "bounds_ignored": 4,
        "global_full_ratio_prunes_nothing": 1,
        "total_sparsity_per_layer": 2,
        "crash": 1,
    }
    assert all(f"test_{code}" in globals() for code in codes)
    assert collections.Counter(kind(case) for case in ours) == {
        "element": 37,
        "in_channel": 6,
        "out_channel": 66,
        "refused": 1,
        "suspect": 41,
        "threshold": 2,
        "tied": 36,
        "unreachable": 3,
    }
    assert len(ours) == 192
