"""Every ``config_list`` of the documents this library starts from, as it stands there.

The dictionaries are those of four documents: NNI's pruner overview of generation v2 (2.5), that of
v1 (2.0), that of the first releases (1.2), and auptimizer's, which embeds NNI 2.0. A fifth, NNI's
page on dependency-aware pruning, has no ``config_list``. Those of quantizers are in
``tests/quantize/test_rules.py``. Each is resolved for a torch model and for
its Flax twin, and has to select the same layers and prune the same numbers of units there.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import resolve
from purepruning.config.rules import Gradual
from purepruning_interop import linen
from purepruning_interop import torch as interop_torch
from tests.messages import raises


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3)
        self.bn1 = torch.nn.BatchNorm2d(16)
        self.relu1 = torch.nn.ReLU()
        self.conv2 = torch.nn.Conv2d(16, 20, 3)
        self.bn2 = torch.nn.BatchNorm2d(20)
        self.relu2 = torch.nn.ReLU6()
        self.fc1 = torch.nn.Linear(320, 50)
        self.relu3 = torch.nn.ReLU()
        self.fc2 = torch.nn.Linear(50, 10)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc2(self.relu3(self.fc1(x.flatten(1))))


class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), padding="VALID", name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn1")(x))
        x = nn.Conv(20, (3, 3), padding="VALID", name="conv2")(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=True, name="bn2")(x))
        x = nn.relu(nn.Dense(50, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="fc2")(x)


#: How a torch weight of so many axes becomes a Flax one: OIHW to HWIO, (out, in) to (in, out).
TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
FLAX_NAMES = {"conv": "kernel", "fc": "kernel", "bn": "scale"}


def twins():
    """Layer tables and parameters of both models, with the same random weights."""
    model, net, x = TorchNet(), FlaxNet(), jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    rng, by_torch, by_flax = np.random.default_rng(0), {}, {}
    for path, p in model.named_parameters():
        name, kind = path.split(".")
        w = rng.normal(size=p.shape).astype(np.float32)
        by_torch[path] = torch.tensor(w)
        leaf = "bias" if kind == "bias" else FLAX_NAMES[name.rstrip("12")]
        by_flax.setdefault(name, {})[leaf] = jnp.asarray(w.transpose(TO_FLAX[w.ndim]))
    assert jax.tree.map(jnp.shape, by_flax) == jax.tree.map(jnp.shape, params)
    tables = {"torch": interop_torch.layers(model), "flax": linen.layers(net, params, x)}
    return tables, {"torch": by_torch, "flax": by_flax}


TABLES, PARAMS = twins()
tables = pytest.mark.parametrize("framework", TABLES)

ELEMENT, CHANNEL = "element", "output_channel"
DEFAULT_80 = {"conv1": 345, "conv2": 2304, "fc1": 12800, "fc2": 400}
CONVS_80, CONVS_50 = {"conv1": 12, "conv2": 16}, {"conv1": 8, "conv2": 10}
NORMS_80 = {"bn1": 12, "bn2": 16}
AGP = Gradual(0.0, 0.8, 0, 10, 1)


class Seed(NamedTuple):
    """One ``config_list``, the way it is used, and what it has to mean for the models above."""

    document: str
    pruner: str
    config_list: list[dict[str, Any]]
    granularity: str
    counts: dict[str, int | None]
    scope: str = "layer"
    gradual: Gradual | None = None
    prune_iterations: int | None = None


V2, V1, V1_2, AUPTIMIZER = "NNI 2.5", "NNI 2.0", "NNI 1.2", "auptimizer"
SEEDS = [
    # NNI's overview of generation v2. The norms under the activation, Taylor and ADMM pruners are
    # the document's; NNI itself refuses them there, and Slim's `sparsity` in its global mode.
    Seed(V2, "Level", [{"sparsity": 0.8, "op_types": ["default"]}], ELEMENT, DEFAULT_80),
    Seed(V2, "L1Norm", [{"sparsity": 0.8, "op_types": ["Conv2d"]}], CHANNEL, CONVS_80),
    Seed(V2, "L2Norm", [{"sparsity": 0.8, "op_types": ["Conv2d"]}], CHANNEL, CONVS_80),
    Seed(V2, "FPGM", [{"sparsity": 0.8, "op_types": ["Conv2d"]}], CHANNEL, CONVS_80),
    Seed(
        V2,
        "Slim",
        [{"sparsity": 0.8, "op_types": ["BatchNorm2d"]}],
        CHANNEL,
        {"rule 0": 28},
        scope="global",
    ),
    Seed(V2, "APoZRank", [{"sparsity": 0.8, "op_types": ["BatchNorm2d"]}], CHANNEL, NORMS_80),
    Seed(V2, "MeanRank", [{"sparsity": 0.8, "op_types": ["BatchNorm2d"]}], CHANNEL, NORMS_80),
    Seed(V2, "TaylorFO", [{"sparsity": 0.8, "op_types": ["BatchNorm2d"]}], CHANNEL, NORMS_80),
    Seed(V2, "ADMM", [{"sparsity": 0.8, "op_types": ["BatchNorm2d"]}], ELEMENT, NORMS_80),
    # NNI's overview of generation v1.
    Seed(V1, "Level TF", [{"sparsity": 0.8, "op_types": ["default"]}], ELEMENT, DEFAULT_80),
    Seed(V1, "Level", [{"sparsity": 0.8, "op_types": ["default"]}], ELEMENT, DEFAULT_80),
    Seed(
        V1,
        "Slim",
        [{"sparsity": 0.8, "op_types": ["BatchNorm2d"]}],
        CHANNEL,
        {"rule 0": 28},
        scope="global",
    ),
    Seed(V1, "FPGM", [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50),
    Seed(V1, "L1Filter", [{"sparsity": 0.8, "op_types": ["Conv2d"]}], CHANNEL, CONVS_80),
    Seed(V1, "L2Filter", [{"sparsity": 0.8, "op_types": ["Conv2d"]}], CHANNEL, CONVS_80),
    Seed(V1, "APoZRank", [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50),
    Seed(V1, "MeanRank", [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50),
    Seed(V1, "TaylorFO", [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50),
    Seed(
        V1,
        "AGP",
        [
            {
                "initial_sparsity": 0,
                "final_sparsity": 0.8,
                "start_epoch": 0,
                "end_epoch": 10,
                "frequency": 1,
                "op_types": ["default"],
            }
        ],
        ELEMENT,
        DEFAULT_80,
        gradual=AGP,
    ),
    Seed(V1, "NetAdapt", [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50),
    Seed(V1, "SimulatedAnnealing", [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50),
    Seed(V1, "AutoCompress", [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50),
    Seed(V1, "AMC", [{"op_types": ["Conv2d", "Linear"]}], CHANNEL, dict.fromkeys(DEFAULT_80)),
    Seed(
        V1,
        "ADMM",
        [
            {"sparsity": 0.8, "op_types": ["Conv2d"], "op_names": ["conv1"]},
            {"sparsity": 0.92, "op_types": ["Conv2d"], "op_names": ["conv2"]},
        ],
        ELEMENT,
        {"conv1": 345, "conv2": 2649},
    ),
    Seed(
        V1,
        "LotteryTicket",
        [{"prune_iterations": 5, "sparsity": 0.8, "op_types": ["default"]}],
        ELEMENT,
        DEFAULT_80,
        prune_iterations=5,
    ),
    Seed(V1, "Sensitivity", [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50),
    # NNI's overview of the first releases: 'default' may be a plain string.
    Seed(V1_2, "Level TF", [{"sparsity": 0.8, "op_types": ["default"]}], ELEMENT, DEFAULT_80),
    Seed(V1_2, "Level", [{"sparsity": 0.8, "op_types": ["default"]}], ELEMENT, DEFAULT_80),
    *(
        Seed(
            V1_2,
            pruner,
            [
                {
                    "initial_sparsity": 0,
                    "final_sparsity": 0.8,
                    "start_epoch": 0,
                    "end_epoch": 10,
                    "frequency": 1,
                    "op_types": "default",
                }
            ],
            ELEMENT,
            DEFAULT_80,
            gradual=AGP,
        )
        for pruner in ("AGP TF", "AGP")
    ),
    Seed(
        V1_2,
        "LotteryTicket",
        [{"prune_iterations": 5, "sparsity": 0.8, "op_types": ["default"]}],
        ELEMENT,
        DEFAULT_80,
        prune_iterations=5,
    ),
    # auptimizer's compressors.
    Seed(AUPTIMIZER, "level", [{"sparsity": 0.8, "op_types": ["default"]}], ELEMENT, DEFAULT_80),
    Seed(
        AUPTIMIZER,
        "slim",
        [{"sparsity": 0.8, "op_types": ["BatchNorm2d"]}],
        CHANNEL,
        {"rule 0": 28},
        scope="global",
    ),
    *(
        Seed(AUPTIMIZER, name, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50)
        for name in (
            "fpgm",
            "l1_filter",
            "l2_filter",
            "activation_apoz_rank_filter",
            "activation_mean_rank_filter",
            "taylor_fo_weight_filter",
        )
    ),
    Seed(
        AUPTIMIZER,
        "agp",
        [
            {
                "initial_sparsity": 0.0,
                "final_sparsity": 0.8,
                "start_epoch": 0,
                "end_epoch": 10,
                "frequency": 1,
                "op_types": ["default"],
            }
        ],
        ELEMENT,
        DEFAULT_80,
        gradual=AGP,
    ),
    *(
        Seed(AUPTIMIZER, name, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50)
        for name in ("net_adapt", "simulated_annealing", "auto_compress")
    ),
    Seed(
        AUPTIMIZER, "amc", [{"op_types": ["Conv2d", "Linear"]}], CHANNEL, dict.fromkeys(DEFAULT_80)
    ),
    Seed(
        AUPTIMIZER,
        "admm",
        [
            {"sparsity": 0.5, "op_types": ["Conv2d"], "op_names": ["conv1"]},
            {"sparsity": 0.5, "op_types": ["Conv2d"], "op_names": ["conv2"]},
        ],
        CHANNEL,
        CONVS_50,
    ),
    Seed(
        AUPTIMIZER,
        "lottery_ticket",
        [{"prune_iterations": 5, "sparsity": 0.8, "op_types": ["Conv2d"]}],
        ELEMENT,
        {"conv1": 345, "conv2": 2304},
        prune_iterations=5,
    ),
    Seed(AUPTIMIZER, "sensitivity", [{"sparsity": 0.5, "op_types": ["Conv2d"]}], CHANNEL, CONVS_50),
]
seeds = pytest.mark.parametrize("seed", SEEDS, ids=lambda s: f"{s.document}-{s.pruner}")


def config_of(seed, framework):
    return resolve(
        seed.config_list, TABLES[framework], scope=seed.scope, granularity=seed.granularity
    )


def test_how_many_each_document_has():
    count = {name: sum(s.document == name for s in SEEDS) for name in (V2, V1, V1_2, AUPTIMIZER)}
    assert count == {V2: 9, V1: 17, V1_2: 5, AUPTIMIZER: 16}


@tables
@seeds
def test_selects_these_layers_and_prunes_so_many_units(seed, framework):
    config = config_of(seed, framework)
    assert config.counts == seed.counts
    assert {pool.gradual for pool in config.pools} <= {seed.gradual}
    assert {pool.prune_iterations for pool in config.pools} <= {seed.prune_iterations}
    names = ["bn1", "bn2"] if "rule 0" in seed.counts else sorted(seed.counts)
    assert [layer.name for layer in config.layers] == names


@pytest.mark.parametrize(
    "seed", [s for s in SEEDS if all(s.counts.values())], ids=lambda s: f"{s.document}-{s.pruner}"
)
def test_prunes_the_same_weights_of_both_models(seed):
    pruner = pp.level if seed.granularity == ELEMENT else pp.l1_norm
    masks = pruner(PARAMS["torch"], None, config_of(seed, "torch"))
    by_flax = pruner(PARAMS["flax"], None, config_of(seed, "flax"))
    for path, mask in masks.items():
        name, kind = path.split(".")
        leaf = "bias" if kind == "bias" else FLAX_NAMES[name.rstrip("12")]
        # Masks keep the axes of their weights.
        other = by_flax[name][leaf]
        np.testing.assert_array_equal(mask.numpy().transpose(TO_FLAX[mask.ndim]), other)
    pruned = {
        name for name, leaves in by_flax.items() if any(m is not None for m in leaves.values())
    }
    assert pruned == {layer.name for layer in config_of(seed, "torch").layers}
    for layer in config_of(seed, "torch").layers:
        if layer.name in seed.counts:
            mask = masks[layer.weight]
            assert int((~mask).sum()) == seed.counts[layer.name]


@tables
@pytest.mark.parametrize("pruner", ["AMC", "amc"])
def test_a_list_without_sparsity_waits_for_one(pruner, framework):
    """AMC finds the sparsities itself; until then there is nothing to prune by."""
    (seed,) = [s for s in SEEDS if s.pruner == pruner]
    config = config_of(seed, framework)
    with raises(ValueError, "rule 0", "'conv1'", "with_sparsity"):
        pp.l1_norm(PARAMS[framework], None, config)
    found = config.with_sparsity({"conv1": 0.25, "conv2": 0.5, "fc1": 0.3, "fc2": 0.0})
    assert found.counts == {"conv1": 4, "conv2": 10, "fc1": 15, "fc2": 0}
    pp.l1_norm(PARAMS[framework], None, found)


@tables
def test_native_names_select_the_same(framework):
    conv, dense = {"torch": ("Conv2d", "Linear"), "flax": ("Conv", "Dense")}[framework]
    config = resolve([{"sparsity": 0.8, "op_types": [conv, dense]}], TABLES[framework])
    assert config.counts == DEFAULT_80


@tables
def test_slimming_ranks_the_norms_of_the_whole_model(framework):
    (seed, *_) = [s for s in SEEDS if s.pruner == "slim"]
    masks = pp.l1_norm(PARAMS[framework], None, config_of(seed, framework))
    flat = masks if framework == "torch" else {n: masks[n]["scale"] for n in ("bn1", "bn2")}
    gammas = [PARAMS["torch"][f"bn{i}.weight"].abs().numpy() for i in (1, 2)]
    cut = np.sort(np.concatenate(gammas))[27]
    for i, gamma in enumerate(gammas, 1):
        mask = flat[f"bn{i}.weight" if framework == "torch" else f"bn{i}"]
        np.testing.assert_array_equal(np.asarray(mask), gamma > cut)
