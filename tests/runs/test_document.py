"""Every example configuration of auptimizer's document, as it stands there, done to small tasks."""

import json

import numpy as np
import pytest

import purepruning as pp
from purepruning.masks import by_path, to_numpy
from purepruning.trees import flatten
from purepruning_interop.recipes import read_recipe
from purepruning_interop.runs import Settings, run_recipe
from tests.recipes.seed_recipes import SEEDS
from tests.runs import conv_tasks

pytestmark = [
    pytest.mark.usefixtures("standard_promotion", "rank_promotion", "unoptimized"),
    pytest.mark.filterwarnings("ignore:bnn.activations. the output of:UserWarning"),
]

TASKS = {"flax": conv_tasks.linen, "tensorflow": conv_tasks.keras, "torch": conv_tasks.of_torch}
#: The document's are for days of training; what a file says besides its configuration is its own.
FEW = {
    "simulated_annealing": {"cool_down_rate": 0.4},
    "net_adapt": {"sparsity_per_iteration": 0.25},
    "sensitivity": {"sparsity_per_iter": 0.25},
    "admm": {"num_iterations": 2, "training_epochs": 1},
    "auto_compress": {
        "num_iterations": 1,
        "admm_num_iterations": 1,
        "admm_training_epochs": 1,
        "cool_down_rate": 0.1,
    },
    "amc": {
        "train_episode": 2,
        "warmup": 1,
        "channel_round": 2,
        "hidden1": 8,
        "hidden2": 8,
        "bsize": 2,
    },
}
LEVELS = {"naive": 255, "qat": 256, "dorefa": 256, "bnn": 2}
#: Weights that are pruned, biases and statistics aside.
CHANNELS = 4 * 9 + 8 * 72
LEVEL = 57 + 921 + 1638 + 256
PRUNED = {
    "level": LEVEL,
    "slim": 6,
    "agp": LEVEL,
    "lottery_ticket": 57 + 921,
    **dict.fromkeys(
        [
            "fpgm",
            "l1_filter",
            "l2_filter",
            "activation_apoz_rank_filter",
            "activation_mean_rank_filter",
            "taylor_fo_weight_filter",
            "admm",
        ],
        CHANNELS,
    ),
}
QUICK = {("torch", "l1_filter"), ("torch", "taylor_fo_weight_filter")}


def test_the_table_is_the_whole_document():
    assert {*PRUNED, *LEVELS, "net_adapt", "simulated_annealing", "sensitivity"} | {
        "amc",
        "auto_compress",
    } == {*SEEDS}
    assert len(SEEDS) == 20


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        pytest.param(f, n, marks=[pytest.mark.full] * ((f, n) not in QUICK))
        for f in TASKS
        for n in SEEDS
    ],
)
def test_a_run_of_every_example(framework, name, tmp_path):
    task = TASKS[framework]()
    content = {**SEEDS[name]["compression"], "framework": framework, "args": FEW.get(name, {})}
    out = tmp_path / "run"
    found = run_recipe(read_recipe(content), task, out, Settings(epochs=1))
    assert all(row["score"] is not None for row in found.history)
    if name in LEVELS:
        read = pp.load_quantized(found.files["quantized"], found.state.params)
        leaves = flatten(read.params).leaves
        (path,) = (x.weight for x in task.layers if x.name.endswith("conv2"))
        assert len(np.unique(to_numpy(leaves[path]))) <= LEVELS[name]
        assert any("conv2" in x for x in json.loads((out / "quantized.json").read_text()))
        return
    masks = by_path(found.state.masks, found.state.params)
    leaves = flatten(found.state.params).leaves
    gone = {
        path: int((~np.broadcast_to(to_numpy(mask), leaves[path].shape)).sum())
        for path, mask in masks.items()
        if mask is not None
    }
    weights = {x.weight: int(np.prod(x.shape)) for x in task.layers if x.weight in gone}
    total = sum(gone[path] for path in weights)
    if name in PRUNED:
        assert total == PRUNED[name]
    elif name in ("amc", "auto_compress"):
        assert total > 0
    else:
        assert total >= sum(weights.values()) / 2
    if name == "auto_compress":
        sizes = json.loads((out / "small.json").read_text())["params"]
        assert sizes[1] <= sizes[0] / 2
    for path, n in gone.items():
        assert int((to_numpy(leaves[path]) == 0).sum()) >= n
