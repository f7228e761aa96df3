"""Every method of a compressor, in every framework."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from purepruning.masks import to_numpy
from purepruning.trees import flatten
from purepruning_interop.recipes import create_compressor
from tests.messages import raises
from tests.recipes import nets
from tests.recipes.seed_recipes import SEEDS
from tests.recipes.test_jax_compressors import CHANNELS, LEVEL, model_of

pytestmark = pytest.mark.usefixtures("standard_promotion", "rank_promotion", "unoptimized")

FRAMEWORKS = ("torch", "linen", "nnx", "equinox", "tensorflow")
X = nets.digits()[0][0][:20]


def made(name, framework):
    recipe = {**SEEDS[name]["compression"], "framework": framework}
    if framework == "torch":
        return create_compressor(nets.torch_net().eval(), recipe, inputs=(torch.from_numpy(X[:1]),))
    (model,), given = model_of(framework)
    return create_compressor(model, recipe, **given)


def arrays(compressor):
    """Weights by the layer's name, channels last in their shape whatever the framework."""
    leaves = flatten(compressor._params()).leaves
    named = {}
    for path, x in leaves.items():
        parts = path.replace("/", ".").split(".")
        for layer in ("conv1", "conv2", "fc1", "fc2"):
            if layer in parts and parts[-1] in ("kernel", "weight"):
                named[layer] = to_numpy(x)
    return named


def zeros(compressor):
    return {name: int((x == 0).sum()) for name, x in arrays(compressor).items()}


def call(compressor, model):
    """What the model puts out for the images; ``model`` is what methods returned."""
    name = compressor._name
    with torch.no_grad():
        if name == "torch":
            return np.asarray(model(torch.from_numpy(X)))
    x = jnp.asarray(X)
    if name == "linen":
        return np.asarray(nets.Linen().apply(model, x))
    return np.asarray(jax.vmap(model)(x) if name == "equinox" else model(x))


def ones(compressor):
    """Moves all weights to one; returns the model."""
    tree = flatten(compressor._params())
    moved = {n: 0 * x + 1 for n, x in tree.leaves.items()}
    compressor._write(tree.rebuild(moved))
    return compressor.model


def compress(framework):
    compressor = made("l1_filter", framework)
    model = compressor.compress()
    assert sum(zeros(compressor).values()) == CHANNELS
    assert call(compressor, model).shape == (20, 10)


def update_epoch(framework):
    compressor = made("agp", framework)
    model = compressor.compress()
    share = 0.8 - 0.8 * (1 - 3 / 9) ** 3
    for epoch in (1, 2, 3):
        model = compressor.update_epoch(epoch, model)
    assert zeros(compressor)["fc1"] == int(2048 * share + 1e-9)
    assert call(compressor, model).shape == (20, 10)
    compressor.update_epoch(10, model)
    assert sum(zeros(compressor).values()) == LEVEL


def get_prune_iterations(framework):
    compressor = made("lottery_ticket", framework)
    compressor.compress()
    assert list(compressor.get_prune_iterations()) == [0, 1, 2, 3, 4, 5]
    with raises(ValueError, "get_prune_iterations is of 'lottery_ticket'", "'level'"):
        made("level", framework).get_prune_iterations()


def prune_iteration_start(framework):
    compressor = made("lottery_ticket", framework)
    model = compressor.compress()
    first = arrays(compressor)["conv2"].copy()
    model = compressor.prune_iteration_start(model)
    assert zeros(compressor)["conv2"] == 0
    model = ones(compressor)
    compressor.prune_iteration_start(model)
    now = arrays(compressor)["conv2"]
    assert int((now == 0).sum()) == int(1152 * (1 - 0.2 ** (1 / 5)) + 1e-9)
    np.testing.assert_array_equal(now[now != 0], first[now != 0])


def step(framework):
    compressor = made("level", framework)
    compressor.compress()
    before = zeros(compressor)
    moved = ones(compressor)
    assert sum(zeros(compressor).values()) == 0
    compressor.step(moved)
    assert zeros(compressor) == before
    assert sum(before.values()) == LEVEL


def apply_speedup(framework):
    compressor = made("l1_filter", framework)
    model = compressor.compress()
    want = call(compressor, model)
    small = compressor.apply_speedup()
    if framework == "linen":
        assert small.model is None
        found = np.asarray(small.fn(small.params, jnp.asarray(X)))
    else:
        found = call(compressor, small)
    np.testing.assert_allclose(found, want, atol=1e-5)
    with raises(ValueError, "nothing is pruned yet", "call compress first"):
        made("l1_filter", framework).apply_speedup()


def count_flops_params(framework):
    compressor = made("l1_filter", framework)
    shape = (1, 8, 8) if framework == "equinox" else (1, 1, 8, 8)
    macs, params, rows = compressor.count_flops_params(shape)
    assert macs == 16 * 8 * 9 + 4 * 16 * 72 + 64 * 32 + 32 * 10
    assert params == 80 + 16 * (framework != "equinox") + 1168 + 2080 + 330
    assert len(rows) >= 4


def export_model(framework, folder):
    compressor = made("l1_filter", framework)
    compressor.compress()
    files = compressor.export_model("model.pth", "mask.pth", folder_name=str(folder))
    assert {*files} == {"model", "masks", "report"}
    written = safetensors.numpy.load_file(files["model"])
    kernels = [x for n, x in written.items() if n.endswith(("kernel", "weight")) and x.ndim > 1]
    assert sum(int((x == 0).sum()) for x in kernels) == CHANNELS
    masks = safetensors.numpy.load_file(files["masks"])
    assert any("conv2" in name for name in masks)
    files = compressor.export_model("small.pth", folder_name=str(folder), speedup=True)
    small = safetensors.numpy.load_file(files["model"])
    (conv2,) = (x for n, x in small.items() if "conv2" in n and n.endswith(("kernel", "weight")))
    assert conv2.size == 8 * 4 * 9


METHODS = [
    compress,
    update_epoch,
    get_prune_iterations,
    prune_iteration_start,
    step,
    apply_speedup,
    count_flops_params,
    export_model,
]


QUICK = [("linen", step), ("linen", export_model)]


@pytest.mark.parametrize(
    ("framework", "method"),
    [
        pytest.param(f, m, marks=[pytest.mark.full] * (f != "torch" and (f, m) not in QUICK))
        for f in FRAMEWORKS
        for m in METHODS
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_a_method_does_what_it_says(framework, method, tmp_path):
    method(framework, *((tmp_path,) if method is export_model else ()))
