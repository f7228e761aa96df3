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


# Shrinking between rounds: three dense layers, 12 and 8 channels between them.

INPUTS = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
WIDTHS = {"a": 12, "b": 8}


def weights():
    """Kernels ``(in, out)`` of the three layers."""
    rng = np.random.default_rng(1)
    shapes = {"a": (5, 12), "b": (12, 8), "c": (8, 3)}
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}


class InJax:
    """A state is the kernels."""

    def begin(self):
        return weights()

    def kernels(self, state):
        return state

    @staticmethod
    def fn(params, x):
        x = jnp.maximum(x @ params["a"], 0.0)
        return jnp.maximum(x @ params["b"], 0.0) @ params["c"]

    def config(self, state):
        coupling = pp.couple(self.fn, state, INPUTS)
        layers = [pp.make_layer(state, n, "Linear", name=n, out_axes=1, in_axes=0) for n in WIDTHS]
        return pp.resolve([{"op_types": ["Linear"]}], layers, coupling=coupling)

    def outputs(self, state):
        return np.asarray(self.fn(state, INPUTS))

    def shrink(self, state, masks, coupling):
        small = pp.shrink(self.fn, state, masks, coupling, INPUTS).params
        return {n: np.asarray(w) for n, w in small.items()}


class InTorch:
    """A state is the state dict of a model, whose widths are read off its arrays."""

    def begin(self):
        return {f"{n}.weight": torch.tensor(w.T.copy()) for n, w in weights().items()}

    def kernels(self, state):
        return {n.removesuffix(".weight"): w.numpy().T for n, w in state.items()}

    def model(self, state):
        parts = {}
        for name, weight in state.items():
            outputs, inputs = weight.shape
            parts[name.removesuffix(".weight")] = torch.nn.Linear(inputs, outputs, bias=False)
            parts[f"relu_{len(parts)}"] = torch.nn.ReLU()
        parts.popitem()
        model = torch.nn.Sequential()
        for name, part in parts.items():
            model.add_module(name, part)
        model.load_state_dict(state)
        return model

    def config(self, state):
        model = self.model(state)
        coupling = interop.couple(model, torch.tensor(INPUTS))
        rules = [{"op_names": list(WIDTHS)}]
        return pp.resolve(rules, interop.layers(model), coupling=coupling)

    def outputs(self, state):
        with torch.no_grad():
            return self.model(state)(torch.tensor(INPUTS)).numpy()

    def shrink(self, state, masks, coupling):
        small = interop.shrink(self.model(state), masks, coupling, torch.tensor(INPUTS)).model
        return {n: w.detach().clone() for n, w in small.state_dict().items()}


def cut(side, state, counts, config):
    """Returns the smaller state, which computes what the masked one does."""
    masks = pp.l1_norm(state, None, config.with_counts(counts))
    small = side.shrink(state, masks, config.allocation.coupling)
    masked = side.outputs(pp.apply_masks(state, masks))
    np.testing.assert_allclose(side.outputs(small), masked, rtol=1e-5, atol=1e-5)
    return small


def widths(side, state):
    return {n: w.shape[1] for n, w in side.kernels(state).items() if n in WIDTHS}


def by_hand(kernels, wanted):
    """Returns the channels of largest L1 norm, in their order, with the rows that read them."""
    keep = {n: np.sort(np.argsort(np.abs(kernels[n]).sum(0))[-k:]) for n, k in wanted.items()}
    a, b, c = (kernels[n] for n in "abc")
    return {"a": a[:, keep["a"]], "b": b[keep["a"]][:, keep["b"]], "c": c[keep["b"]]}, keep


EXPECTED = {  # count_of(12, s) and count_of(8, s) of these sparsities are gone
    "linear": ((0.25, 0.5, 0.75), [(9, 6), (6, 4), (3, 2)]),
    "agp": ((0.5278, 0.7222, 0.75), [(6, 4), (4, 3), (3, 2)]),
    "lottery": ((0.37, 0.6031, 0.75), [(8, 6), (5, 4), (3, 2)]),
}
CASES = [("linear", InJax), ("agp", InTorch), ("lottery", InJax)]
CASES = [
    pytest.param(kind, side, marks=() if (kind, side) in CASES else pytest.mark.full)
    for kind in EXPECTED
    for side in (InJax, InTorch)
]


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_rounds_may_shrink_and_go_on_from_smaller_arrays(kind, side, tmp_path):
    side, (shares, sizes) = side(), EXPECTED[kind]
    sparsities = pp.search.totals(kind, 0.75, 3)
    assert sparsities == pytest.approx(shares, abs=1e-4)

    def prune(state, sparsity):
        now = widths(side, state)
        gone = {n: now[n] - (k - pp.count_of(sparsity, k)) for n, k in WIDTHS.items()}
        return cut(side, state, gone, side.config(state))

    def run(**options):
        seen = []

        def evaluate(state):
            seen.append(tuple(widths(side, state).values()))
            return -abs(seen[-1][1] - 4.0)

        start = side.begin()
        return pp.search.run_rounds(sparsities, start, prune, evaluate=evaluate, **options), seen

    whole, seen = run()
    assert seen == sizes
    kernels, best = side.kernels(side.begin()), None
    for size in sizes:
        kernels, _ = by_hand(kernels, dict(zip(WIDTHS, size, strict=True)))
        best = kernels if size[1] == 4 and best is None else best
    jax.tree.map(np.testing.assert_array_equal, side.kernels(whole.state), kernels)
    jax.tree.map(np.testing.assert_array_equal, side.kernels(whole.best), best)
    run(folder=tmp_path, max_rounds=2)
    rest, seen = run(folder=tmp_path)
    assert seen == sizes[2:]
    for name in ("state", "best"):
        found, wanted = (side.kernels(getattr(x, name)) for x in (rest, whole))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("side", [InTorch, pytest.param(InJax, marks=pytest.mark.full)])
def test_tickets_that_are_shrunk_go_back_to_the_first_weights_of_what_is_kept(side):
    """NNI's ``reset_weight`` with speed-up: a state has the channels of the first one it keeps."""
    side = side()
    all_channels = {n: np.arange(k) for n, k in WIDTHS.items()}

    def tune(state):
        return {**state, "weights": {n: -2 * w for n, w in state["weights"].items()}}

    def prune(state, sparsity):
        now = widths(side, state["weights"])
        counts = {n: now[n] - (k - pp.count_of(sparsity, k)) for n, k in WIDTHS.items()}
        _, keep = by_hand(side.kernels(state["weights"]), {n: now[n] - counts[n] for n in now})
        small = cut(side, state["weights"], counts, side.config(state["weights"]))
        return {"weights": small, "kept": {n: state["kept"][n][i] for n, i in keep.items()}}

    def reset(start, state):
        a, b = (state["kept"][n] for n in WIDTHS)
        old = side.kernels(start["weights"])
        new = {"a": old["a"][:, a], "b": old["b"][a][:, b], "c": old["c"][b]}
        if isinstance(side, InTorch):
            new = {f"{n}.weight": torch.tensor(w.T.copy()) for n, w in new.items()}
        return {**state, "weights": new}

    start = {"weights": side.begin(), "kept": all_channels}
    sparsities = pp.search.totals("lottery", 0.75, 2)
    run = pp.search.run_rounds(sparsities, start, prune, tune=tune, reset=reset)
    kernels = side.kernels(side.begin())
    for size in ((6, 4), (3, 2)):
        kernels, _ = by_hand(kernels, dict(zip(WIDTHS, size, strict=True)))
    jax.tree.map(np.testing.assert_array_equal, side.kernels(run.state["weights"]), kernels)


@pytest.mark.parametrize("side", [InJax, pytest.param(InTorch, marks=pytest.mark.full)])
def test_a_search_may_divide_what_every_round_prunes(side):
    """Annealing in each round, on what the one before has left."""
    side = side()
    wanted = side.outputs(side.begin())
    dense = pp.search.problem(side.config(side.begin()), {"macs": 1.0}).dense()["macs"]
    left = []

    def prune(state, sparsity):
        config = side.config(state)
        of = pp.search.problem(config, {"macs": int(dense * (1 - sparsity))})
        search = pp.search.annealing(of, max_proposals=4)

        def score(trial):
            masks = pp.l1_norm(state, None, config.with_counts(trial.counts))
            found = side.outputs(pp.apply_masks(state, masks))
            return -float(np.square(found - wanted).mean())

        key = jax.random.key(len(left))
        counts = pp.search.run_search(search, search.init(key), score).best
        small = cut(side, state, counts, config)
        left.append(pp.search.problem(side.config(small), {"macs": 1.0}).dense()["macs"])
        return small

    run = pp.search.run_rounds(pp.search.totals("linear", 0.6, 2), side.begin(), prune)
    assert 0.55 * dense < left[0] <= 0.7 * dense
    assert 0.25 * dense < left[1] <= 0.4 * dense
    a, b = widths(side, run.state).values()
    assert left[1] == len(INPUTS) * (5 * a + a * b + b * 3)


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
