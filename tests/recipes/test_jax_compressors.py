"""The document's examples on Flax and Equinox models: what is left, and quantised calls."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx

import purepruning as pp
from purepruning.trees import flatten
from purepruning_interop.keras import KeepPruned
from purepruning_interop.recipes import create_compressor
from tests.messages import raises
from tests.recipes import nets
from tests.recipes.seed_recipes import SEEDS

pytestmark = pytest.mark.usefixtures("standard_promotion", "rank_promotion", "unoptimized")

X, Y = (jnp.asarray(part[:20]) for part in nets.digits()[0])
LOSSES = {
    "linen": nets.linen_loss,
    "nnx": nets.nnx_loss,
    "equinox": nets.equinox_loss,
    "tensorflow": nets.keras_loss,
}
CHANNELS = 4 * 9 + 8 * 72
LEVEL = 57 + 921 + 1638 + 256
#: Pruned weights; kernels only.
PRUNED = {
    "level": LEVEL,
    "slim": 0,
    "fpgm": CHANNELS,
    "l1_filter": CHANNELS,
    "l2_filter": CHANNELS,
    "activation_apoz_rank_filter": CHANNELS,
    "activation_mean_rank_filter": CHANNELS,
    "taylor_fo_weight_filter": CHANNELS,
    "agp": LEVEL,
    "admm": CHANNELS,
    "lottery_ticket": 57 + 921,
}
SEARCHES = ["net_adapt", "simulated_annealing", "sensitivity", "amc"]


def model_of(framework):
    """Arguments that give a fresh model."""
    if framework == "linen":
        return (nets.Linen(),), {"variables": nets.linen_variables(), "inputs": (X[:1],)}
    if framework == "nnx":
        return (nets.Nnx(),), {"inputs": (X[:1],)}
    if framework == "tensorflow":
        return (nets.keras_net(),), {"inputs": (X[:1],)}
    return (nets.Equinox(),), {"inputs": (X[0],)}


def seed(name, framework):
    return {**SEEDS[name]["compression"], "framework": framework}


def options(name, framework):
    if name in SEARCHES:
        given = {"evaluator": lambda *args: 0.5}
        if name == "amc":
            few = {"train_episode": 2, "warmup": 1, "channel_round": 2, "hidden1": 8, "hidden2": 8}
            given |= {"val_loader": [(X[:1], None)], "bsize": 2, **few}
        if name == "sensitivity":
            given["sparsity_per_iter"] = 0.25
        return given
    if name == "admm":
        asked = {"num_iterations": 1, "training_epochs": 1}
        return {"trainer": lambda model, penalty, epoch: [penalty(model), None][1], **asked}
    if name == "taylor_fo_weight_filter":
        return {"data": [(X, Y)], "loss": LOSSES[framework]}
    return {"data": [(X,)]} if name.startswith("activation") else {}


def made(name, framework):
    (model,), given = model_of(framework)
    return create_compressor(model, seed(name, framework), **given, **options(name, framework))


def kernels(tree):
    leaves = flatten(tree).leaves.items()
    return {n: np.asarray(x) for n, x in leaves if n.endswith(("kernel", "weight"))}


def gone(compressor):
    masks = flatten(compressor.masks).leaves
    tree = kernels(compressor._params())
    return sum(
        int((~np.broadcast_to(masks[n], x.shape)).sum())
        for n, x in tree.items()
        if masks.get(n) is not None
    )


QUICK = ["level", "l1_filter", "lottery_ticket", "qat"]


def case(framework, name):
    """A few of each framework, which share all but a few lines, and the rest with ``--full``."""
    full = name not in (QUICK if framework != "tensorflow" else QUICK[:1])
    return pytest.param(framework, name, marks=[pytest.mark.full] * full)


CASES = [
    case(framework, name)
    for framework in ("linen", "nnx", "equinox", "tensorflow")
    for name in PRUNED
    if (framework, name) != ("equinox", "slim")  # that network has no batch norm
]


@pytest.mark.parametrize(("framework", "name"), CASES)
def test_every_pruner_prunes_what_it_says(framework, name):
    compressor = made(name, framework)
    model = compressor.compress()
    if name == "agp":
        model = compressor.update_epoch(9, model)
    if name == "lottery_ticket":
        for _ in compressor.get_prune_iterations():
            model = compressor.prune_iteration_start(model)
    assert gone(compressor) == PRUNED[name]
    # An update that moves all weights, and a step that puts pruned ones back to zero.
    if framework == "linen":
        compressor.step(jax.tree.map(lambda x: x + jnp.ones_like(x), model))
    zeros = sum(int((x == 0).sum()) for x in kernels(compressor._params()).values())
    assert zeros == PRUNED[name]
    if name == "slim":
        scales = flatten(compressor.masks).leaves
        assert (
            sum(int((~m).sum()) for n, m in scales.items() if n.endswith(("scale", "gamma"))) == 6
        )


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        pytest.param(f, n, marks=[pytest.mark.full] * ((f, n) != ("linen", "sensitivity")))
        for f in ("linen", "nnx", "equinox", "tensorflow")
        for n in ("net_adapt", "simulated_annealing", "sensitivity")
    ],
)
def test_every_search_meets_its_budget(framework, name):
    compressor = made(name, framework)
    compressor.compress()
    assert all(row["error"] is None for row in compressor.history)
    assert gone(compressor) >= (8 * 9 + 16 * 72) // 2


@pytest.mark.parametrize("framework", ["linen", pytest.param("equinox", marks=pytest.mark.full)])
def test_evaluators_get_the_pruned_model_in_the_place_of_the_given_one(framework):
    (model,), given = model_of(framework)
    seen = []

    def evaluator(model):
        seen.append(sum(int((x == 0).sum()) for x in kernels(model).values()))
        return 0.5

    few = {"evaluator": evaluator, "sparsity_per_iter": 0.25}
    create_compressor(model, seed("sensitivity", framework), **given, **few).compress()
    assert max(seen) >= (8 * 9 + 16 * 72) // 2


@pytest.mark.full
@pytest.mark.parametrize("framework", ["linen", "nnx", "tensorflow"])
def test_amc(framework):
    compressor = made("amc", framework)
    compressor.compress()
    small = compressor.apply_speedup()
    macs = 16 * 8 * 9 + 4 * 16 * 72 + 64 * 32 + 32 * 10
    assert compressor._small.report.macs[1] <= 0.5 * macs
    assert small is not None


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        case(f, n)
        for f in ("linen", "nnx", "equinox", "tensorflow")
        for n in ("naive", "qat", "dorefa", "bnn")
    ],
)
@pytest.mark.filterwarnings("ignore:bnn.activations. the output of:UserWarning")
def test_every_quantizer_quantises(framework, name, tmp_path):
    compressor = made(name, framework)
    forward = compressor.compress()
    x = X[0] if framework == "equinox" else X[:1]
    outputs, seen = forward(compressor.model, compressor.state, x)
    assert outputs.shape in ((10,), (1, 10))
    compressor.update_state(seen)
    if name == "qat":
        assert int(compressor.state.step) == 1
    files = compressor.export_model("model", folder_name=str(tmp_path))
    read = pp.load_quantized(files["model"], compressor._params())
    levels = {"naive": 255, "qat": 256, "dorefa": 256, "bnn": 2}[name]
    largest = max(kernels(read.params).values(), key=np.size)
    assert len(np.unique(largest)) <= levels


def test_arguments_of_torch_are_refused():
    with raises(TypeError, "optimizer", "compressor.step"):
        create_compressor(nets.Nnx(), seed("level", "flax"), object())
    with raises(TypeError, "variables=", "inputs="):
        create_compressor(nets.Linen(), seed("level", "flax"))
    with raises(ValueError, "auto_compress", "Linen"):
        (model,), given = model_of("linen")
        evaluate, train = (lambda *args: 0.5), (lambda *args, **kwargs: None)
        create_compressor(
            model, seed("auto_compress", "flax"), train, evaluate, X[:1], **given
        ).compress()


def test_fit_keeps_a_keras_model_pruned():
    model = nets.keras_net()
    level = seed("level", "tensorflow")
    with raises(ValueError, "compile it with KeepPruned", "model.optimizer"):
        create_compressor(model, level, object()).compress()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(KeepPruned(keras.optimizers.Adam(0.01)), loss)
    compressor = create_compressor(model, level, model.optimizer)
    assert compressor.compress() is model
    before = kernels(compressor._params())
    model.fit(np.asarray(X), np.asarray(Y), verbose=0)
    after = kernels(compressor._params())
    assert sum(int((x == 0).sum()) for x in after.values()) == LEVEL
    assert all((before[path] != x).any() for path, x in after.items())


@pytest.mark.full
@pytest.mark.parametrize("framework", ["nnx", "tensorflow"])
def test_auto_compress_returns_a_smaller_model(framework):
    whole = nets.Nnx if framework == "nnx" else nets.keras_net
    compressor = create_compressor(
        whole(),
        seed("auto_compress", framework),
        lambda model, penalty, epoch: None,
        lambda model: 0.5,
        X[:1],
        num_iterations=1,
        admm_num_iterations=1,
        admm_training_epochs=1,
        cool_down_rate=0.1,
    )
    small = compressor.compress()
    size = lambda m: sum(x.size for x in kernels(compressor._edge.params(m)).values())  # noqa: E731
    assert size(small) <= size(whole()) / 2 + 64
    assert small(X).shape == (20, 10)


@pytest.mark.parametrize("framework", ["linen", "nnx", "equinox"])
@pytest.mark.parametrize("given", [False, True])
def test_evaluators_are_handed_the_model_as_it_is(framework, given):
    """Not the one that the compressor was made of, which a pure framework leaves as it was."""
    seen = []

    def evaluate(model, *rest):
        tree = nnx.state(model, nnx.Param) if framework == "nnx" else model
        (weight,) = (x for n, x in kernels(tree).items() if "fc1" in n and x.ndim == 2)
        seen.append(float((weight == 0).mean()))
        assert rest == (("left", "as it is") if given else ())
        return 1 - seen[-1]

    (model,), extra = model_of(framework)
    recipe = {"sparsity": 0.5, "op_types": ["Linear"], "op_names": ["fc1"]}
    recipe = {"purepruning": 1, "steps": [{"use": "sensitivity", "rules": [recipe]}]}
    compressor = create_compressor(
        model, recipe, evaluator=evaluate, sparsity_per_iter=0.25, **extra
    )
    first = extra.get("variables", model)
    arguments = {"eval_args": (first, "left", "as it is")} if given else {}
    compressor.compress(**arguments)
    assert seen[0] == 0
    assert {0, 1, 2} <= {round(4 * x) for x in seen}
