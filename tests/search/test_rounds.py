"""Pruning in rounds: totals, resuming, tickets, and AutoCompress in both frameworks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning_interop import torch as interop
from tests.messages import raises
from tests.search import nets

pytestmark = pytest.mark.usefixtures("unoptimized")

PARAMS = {"w": np.arange(1.0, 41).reshape(4, 10).astype(np.float32)}
LAYERS = [pp.Layer("w", "Linear", "w", (4, 10), (0,), (1,))]
CONFIG = pp.resolve([{"op_types": ["Linear"]}], LAYERS)


def prune(state, sparsity):
    masks = pp.level(state, None, CONFIG.with_sparsity(sparsity))
    return pp.apply_masks(state, masks)


def zeros(state):
    return int((np.asarray(state["w"]) == 0).sum())


def test_totals_are_those_of_nni():
    assert pp.search.totals("linear", 0.5, 5) == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5))
    assert pp.search.totals("agp", 0.5, 5) == pytest.approx((0.244, 0.392, 0.468, 0.496, 0.5))
    expected = (0.2752, 0.4747, 0.6193, 0.7241, 0.8)
    assert pp.search.totals("lottery", 0.8, 5) == pytest.approx(expected, abs=1e-4)


def test_rounds_prune_tune_and_keep_the_best():
    calls = []

    def tune(state):
        calls.append(zeros(state))
        return {"w": state["w"] * 2}

    scores = iter([1.0, 3.0, 2.0, float("nan")])
    run = pp.search.run_rounds(
        pp.search.totals("linear", 0.8, 4),
        PARAMS,
        prune,
        tune=tune,
        evaluate=lambda _: next(scores),
    )
    assert calls == [8, 16, 24, 32]
    assert zeros(run.best) == 16
    assert zeros(run.state) == 32
    assert float(run.state["w"].max()) == 40 * 16
    assert [row["score"] for row in run.history] == [1.0, 3.0, 2.0, None]


def test_tickets_go_back_to_where_they_began():
    def reset(start, state):
        return {"w": np.where(state["w"] != 0, start["w"], 0)}

    def tune(state):
        return {"w": state["w"] * 3}

    run = pp.search.run_rounds((0.5, 0.75), PARAMS, prune, tune=tune, reset=reset)
    kept = np.asarray(run.state["w"])
    assert (kept != 0).sum() == 10
    np.testing.assert_array_equal(kept[kept != 0], np.arange(31.0, 41))


def test_rounds_go_on_from_their_folder(tmp_path):
    options = {"evaluate": lambda s: -abs(zeros(s) - 20.0)}
    whole = pp.search.run_rounds((0.25, 0.5, 0.75), PARAMS, prune, **options)
    part = pp.search.run_rounds(
        (0.25, 0.5, 0.75), PARAMS, prune, folder=tmp_path, max_rounds=1, **options
    )
    assert len(part.history) == 1
    rest = pp.search.run_rounds((0.25, 0.5, 0.75), PARAMS, prune, folder=tmp_path, **options)
    assert [r["score"] for r in rest.history] == [r["score"] for r in whole.history]
    np.testing.assert_array_equal(rest.best["w"], whole.best["w"])
    assert zeros(rest.best) == 20
    with raises(ValueError, "sparsities", "ascend"):
        pp.search.run_rounds((0.5, 0.25), PARAMS, prune)
    with raises(ValueError, "run_rounds", "[0.25, 0.5, 0.75]", "[0.2, 0.5, 0.8]"):
        pp.search.run_rounds((0.2, 0.5, 0.8), PARAMS, prune, folder=tmp_path)
    other = {"v": PARAMS["w"]}
    with raises(ValueError, "another run", "'v'"):
        pp.search.run_rounds((0.25, 0.5, 0.75), other, prune, folder=tmp_path)


def test_rounds_may_shrink_and_go_on_from_smaller_arrays(tmp_path):
    """Two dense layers with 12 channels between them; of these a share of the first 12 goes."""

    def fn(params, x):
        return jnp.maximum(x @ params["a"], 0.0) @ params["b"]

    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in (("a", (5, 12)), ("b", (12, 3)))}
    x = rng.normal(size=(4, 5)).astype(np.float32)
    outputs = []

    def prune(state, sparsity):
        coupling = pp.couple(fn, state, x)
        width = state["a"].shape[1]
        layer = pp.Layer("a", "Linear", "a", (5, width), (1,), (0,))
        config = pp.resolve([{"op_types": ["Linear"]}], [layer], coupling=coupling)
        gone = width - (12 - pp.count_of(sparsity, 12))
        masks = pp.l1_norm(state, None, config.with_counts({"a": gone}))
        small = pp.shrink(fn, state, masks, coupling, x).params
        masked = pp.apply_masks(state, masks)
        outputs.append((fn(masked, x), fn(small, x)))
        return {n: np.asarray(w) for n, w in small.items()}

    def run(**options):
        widths = []

        def evaluate(state):
            widths.append(state["a"].shape[1])
            return -abs(state["a"].shape[1] - 6.0)

        found = pp.search.run_rounds((0.25, 0.5, 0.75), params, prune, evaluate=evaluate, **options)
        return found, widths

    whole, widths = run()
    assert widths == [9, 6, 3]
    assert whole.best["a"].shape == (5, 6)
    # What stays are the columns of largest L1 norm, in their order, and the rows that read them.
    kept = np.sort(np.argsort(np.abs(params["a"]).sum(0))[-3:])
    np.testing.assert_array_equal(whole.state["a"], params["a"][:, kept])
    np.testing.assert_array_equal(whole.state["b"], params["b"][kept])
    for masked, small in outputs:
        np.testing.assert_allclose(small, masked, rtol=1e-5, atol=1e-5)
    run(folder=tmp_path, max_rounds=2)
    rest, widths = run(folder=tmp_path)
    assert widths == [3]
    jax.tree.map(np.testing.assert_array_equal, rest.state, whole.state)
    jax.tree.map(np.testing.assert_array_equal, rest.best, whole.best)


# AutoCompress.

X = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)


def in_jax():
    """A model is a function and its parameters; the score is how near its outputs stay."""
    params = {
        name: np.asarray(jax.random.normal(jax.random.key(i), shape)) * 0.2
        for i, (name, shape) in enumerate(nets.SHAPES.items())
    }
    outputs = np.asarray(nets.net(params, X))

    @functools.cache
    def of_shapes(fn, shapes):
        params = {name: jnp.zeros(shape) for name, shape in shapes}
        coupling = pp.couple(fn, params, X[:1])
        layers = [
            pp.make_layer(params, name, "Conv2d", name=name, out_axes=3, in_axes=2)
            for name in ("conv1", "conv2", "conv3")
        ]
        return pp.resolve([{"op_types": ["Conv2d"]}], layers, coupling=coupling)

    def config(model):
        return of_shapes(model[0], tuple((n, w.shape) for n, w in model[1].items()))

    def masks(model, counts):
        return pp.l1_norm(model[1], None, config(model).with_counts(counts))

    def evaluate(model, counts):
        fn, params = model
        if any(counts.values()):
            params = pp.apply_masks(params, masks(model, counts))
        return -float(np.square(np.asarray(fn(params, X)) - outputs).mean())

    def compress(model, counts):
        """Some steps of ADMM towards the plan, and then it is cut."""
        fn, params = model
        of = config(model).with_counts(counts)
        state = pp.admm.init(params, of)
        state, _ = pp.admm.step(params, state, of, pruner=pp.l1_norm)

        def loss(params):
            misfit = jnp.mean(jnp.square(fn(params, X) - outputs))
            return misfit + pp.admm.penalty(params, state, of, 0.01)

        grads = jax.grad(loss)(params)
        params = jax.tree.map(lambda w, g: w - 0.01 * g, params, grads)
        pruned = pp.admm.masks(params, state, of, pruner=pp.l1_norm)
        small = pp.shrink(fn, params, pruned, of.allocation.coupling, X[:1])
        return small.fn, small.params

    return (nets.net, params), config, evaluate, compress


def in_torch():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, padding=1, bias=False),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    )
    x = torch.asarray(X).permute(0, 3, 1, 2)
    with torch.no_grad():
        outputs = model(x)

    @functools.cache
    def config(model):
        coupling = interop.couple(model, x[:1])
        rules = [{"op_types": ["Conv2d"]}]
        return pp.resolve(rules, interop.layers(model), coupling=coupling)

    def masks(model, of, counts):
        return pp.l1_norm(dict(model.named_parameters()), None, of.with_counts(counts))

    def evaluate(model, counts):
        params = dict(model.named_parameters())
        if any(counts.values()):
            params = pp.apply_masks(params, masks(model, config(model), counts))
        with torch.no_grad():
            found = torch.func.functional_call(model, params, x)
        return -float((found - outputs).square().mean())

    def compress(model, counts):
        of = config(model)
        pruned = masks(model, of, counts)
        return interop.shrink(model, pruned, of.allocation.coupling, x[:1]).model

    return model, config, evaluate, compress


@pytest.mark.parametrize("framework", [pytest.param(in_jax, marks=pytest.mark.full), in_torch])
def test_auto_compress_shrinks_from_round_to_round(framework):
    model, config, evaluate, compress = framework()
    found = pp.search.auto_compress(
        model,
        {"macs": 0.4},
        problem=lambda model, budget: pp.search.problem(config(model), budget),
        evaluate=evaluate,
        compress=compress,
        key=jax.random.key(0),
        rounds=2,
        max_proposals=3,
    )
    dense = pp.search.problem(config(model), {"macs": 1.0}).dense()["macs"]
    left = [row["left"]["macs"] for row in found.history]
    aims = [row["budget"]["macs"] for row in found.history]
    assert aims == [int(dense * 0.4**0.5 + 1e-9), int(dense * 0.4 + 1e-9)]
    assert all(a <= b for a, b in zip(left, aims, strict=True))
    assert left[1] < left[0] < dense
    assert left[1] > 0.3 * dense
    # What is left is what the last model really has.
    assert pp.search.problem(config(found.model), {"macs": 1.0}).dense()["macs"] == left[1]


def test_purification_takes_what_nothing_reads():
    params = {name: np.ones(shape, np.float32) for name, shape in nets.SHAPES.items()}
    params["conv2"][:, :, [1, 4], :] = 0  # nothing reads channels 1 and 4 of conv1
    params["fc"][3] = 1e-9
    coupling = pp.couple(nets.net, params, X[:1])
    for tolerance, conv3 in ((0.0, 16), (1e-6, 15)):
        units = pp.search.useless_units(coupling, params, tolerance=tolerance)
        masks = coupling.masks(units, params)
        small = pp.shrink(nets.net, params, masks, coupling, X[:1])
        assert small.params["conv1"].shape[-1] == 6
        assert small.params["conv3"].shape[-1] == conv3
        np.testing.assert_allclose(
            small.fn(small.params, X), nets.net(params, X), rtol=1e-5, atol=1e-4
        )
