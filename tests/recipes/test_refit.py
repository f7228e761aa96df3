"""AMC's refit in recipes: outputs come back where what is pruned can be made of what is kept."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from purepruning_interop.recipes import create_compressor, read_recipe
from purepruning_interop.runs import Settings, run_recipe
from tests.messages import raises
from tests.runs import tasks

pytestmark = pytest.mark.usefixtures("standard_promotion", "unoptimized")
RNG = np.random.default_rng(0)
HALF = RNG.normal(size=(4, 5)).astype(np.float32)
#: The last four channels are multiples of the first four, which have the lowest norms.
FIRST = np.concatenate([HALF, 9 * HALF[::-1]])
LAST = RNG.normal(size=(3, 8)).astype(np.float32)
X = RNG.normal(size=(40, 5)).astype(np.float32)
RULES = [{"op_names": ["one"]}]
FEW = {
    "train_episode": 2,
    "warmup": 5,
    "channel_round": 4,
    "hidden1": 8,
    "hidden2": 8,
    "bsize": 2,
    "lbound": 0.5,
}


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.one = nnx.Linear(5, 8, use_bias=False, rngs=rngs)
        self.two = nnx.Linear(8, 3, rngs=rngs)
        self.one.kernel[...], self.two.kernel[...] = jnp.asarray(FIRST.T), jnp.asarray(LAST.T)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x)))


def of_torch(make, taps):
    model = torch.nn.Sequential()
    model.add_module("one", make(5, 8, bias=False))
    model.add_module("relu", torch.nn.ReLU())
    model.add_module("two", make(8, 3))
    with torch.no_grad():
        for layer, weight in ((model.one, FIRST), (model.two, LAST)):
            layer.weight.copy_(torch.from_numpy(weight).reshape(*weight.shape, *taps))
    return model


CASES = {
    "linear": (lambda: of_torch(torch.nn.Linear, ()), torch.from_numpy(X)),
    "convolution": (
        lambda: of_torch(lambda a, b, **more: torch.nn.Conv2d(a, b, 1, **more), (1, 1)),
        torch.from_numpy(X.reshape(10, 2, 2, 5)).movedim(3, 1),
    ),
    "nnx": (Nnx, jnp.asarray(X)),
}


def outputs(model, x):
    with torch.no_grad():
        return np.asarray(model(x))


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        pytest.param(name, n, marks=[pytest.mark.full] * ((name, n) != ("convolution", 2)))
        for name in CASES
        for n in (0, 2)
    ],
)
def test_outputs_come_back(name, batches):
    make, x = CASES[name]
    model, scores = make(), []
    before = outputs(model, x)
    assert np.ptp(before) > 1

    def evaluator(loader, model):
        scores.append(np.abs(outputs(model, x) - before).max())
        return -float(scores[-1])

    recipe = {"purepruning": 1, "steps": [{"use": "amc", "rules": RULES}]}
    loader = [(part, None) for part in (x[: len(x) // 2], x[len(x) // 2 :])]
    found = create_compressor(
        model,
        recipe,
        evaluator,
        loader,
        n_calibration_batches=batches,
        n_points_per_layer=4,
        inputs=(x[:1],),
        **FEW,
    )
    found.compress()
    apart = np.abs(outputs(model, x) - before).max()
    assert (apart < 1e-3) == (batches > 0)
    # The evaluator has seen the refitted model too.
    assert (max(scores) < 1e-3) == (batches > 0)
    weights = np.asarray(
        found._params()["two"]["kernel"][...].T if name == "nnx" else model.two.weight.detach()
    )
    weights = weights.reshape(3, 8)
    if batches:
        assert (weights[:, :4] == 0).all()
    else:
        np.testing.assert_array_equal(weights, LAST)


def test_a_run_refits(tmp_path):
    task = tasks.repeating()
    step = {"use": "amc", "rules": [{"op_names": ["w"]}], "args": FEW}
    scores = []
    for n in (0, 2):
        args = {**FEW, "n_calibration_batches": n}
        recipe = read_recipe({"purepruning": 1, "steps": [{**step, "args": args}]})
        found = run_recipe(recipe, task, tmp_path / str(n), Settings(epochs=0))
        assert found.history[-1]["density"] == 0.5
        scores.append(-found.history[-1]["score"])
    assert scores[0] > 0.1
    assert scores[1] < 1e-3


def test_what_is_wrong_with_a_refit(tmp_path):
    step = {"use": "amc", "rules": RULES, "args": {"n_points_per_layer": 0}}
    with raises(ValueError, "args: n_points_per_layer must be at least 1, got 0"):
        read_recipe({"purepruning": 1, "steps": [step]})
    step = {"use": "amc", "rules": [{"op_names": ["w"]}], "args": FEW}
    recipe = read_recipe({"purepruning": 1, "steps": [step]})
    with raises(ValueError, "step 0 (amc)", "'capture'", "add it"):
        run_recipe(recipe, tasks.without(tasks.repeating(), "capture"), tmp_path / "run")
