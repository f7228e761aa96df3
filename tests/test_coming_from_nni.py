"""NNI's names, and the page that shows what its snippets are here, which is run as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from purepruning import Layer
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("unoptimized")

PAGE = (Path(__file__).parent.parent / "docs" / "coming_from_nni.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def page():
    """What the snippets leave behind, run one after another."""
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for i, block in enumerate(BLOCKS):
            exec(compile(block, f"snippet {i}", "exec"), names)
    return names


def pruned(masks):
    return {name: int((~mask).sum()) for name, mask in masks.items() if mask is not None}


def test_pruning_once(page):
    # 0.8 of 432 and of 5760 weights; 12 of 16 channels.
    masks = pruned(page["level_masks"])
    assert (masks["0.weight"], masks["4.weight"]) == (345, 4608)
    assert pruned(page["l1_masks"]) == {"0.weight": 12, "0.bias": 12}
    assert pruned(page["slim_masks"]) == {"1.weight": 12, "1.bias": 12}


def test_pruners_that_look_at_data(page):
    for name in ("apoz_masks", "mean_masks", "taylor_masks"):
        assert pruned(page[name]) == {"0.weight": 8, "0.bias": 8}


def test_admm(page):
    masks = pruned(page["admm_masks"])
    assert (masks["0.weight"], masks["4.weight"]) == (345, 4608)
    assert len(page["distances"]) == 3
    assert all(0 < distance < np.inf for distance in page["distances"])


def test_costs_from_a_file(page):
    of, name = page["quick"], page["layers"][0].name
    # Sixteen channels take 0.5, eight or fewer 0.2, and half of it may be left.
    assert of.dense()["latency"] == pytest.approx(0.5)
    assert pp.search.fitted(of, dict.fromkeys(of.names, 1.0))[name] == 8


def test_agp(page):
    shares = [0.8 - 0.8 * (1 - epoch / 9) ** 3 for epoch in range(10)]
    assert page["pruned"] == [int(5760 * s + 1e-9) for s in shares]
    assert int((page["jax_params"]["w"] == 0).sum()) == 160


def test_keras(page):
    # 0.8 of 256 and of 128 weights.
    masks = pruned(page["keras_masks"])
    assert {path: n for path, n in masks.items() if path.endswith("kernel")} == {
        "hidden/kernel": 204,
        "out/kernel": 102,
    }
    kernels = [x for x in page["ppk"].params(page["keras_model"]).values() if x.ndim == 2]
    assert [int((np.asarray(x) == 0).sum()) for x in kernels] == [204, 102]
    assert 0 < page["keras_density"] < 1


def test_quantizers(page):
    config, state = page["quantization"], page["qat_state"]
    assert config.bits == {"0:weight": 8, "4:weight": 8, "2:output": 8}
    assert int(state.step) == 4
    assert float(state.averages["2:output"].high) > 0
    for name, weight in page["again"].params.items():
        np.testing.assert_array_equal(weight.detach(), page["weights"][name].detach())
    assert len(page["weights"]["0.weight"].unique()) <= 256


def test_dependency_aware(page):
    masks = pruned(page["aware_masks"])
    assert masks == {"conv1": 3, "conv2": 2}
    one, two = (np.asarray(page["aware_masks"][n]).reshape(-1) for n in ("conv1", "conv2"))
    assert np.all(one <= two)
    assert {n: x.shape for n, x in page["small"].params.items()} == {
        "conv1": (3, 3, 3, 5),
        "conv2": (1, 1, 3, 5),
        "fc": (5, 4),
    }
    again = pp.from_nni(
        "L1NormPruner",
        page["unequal"],
        page["added_layers"],
        mode="dependency_aware",
        coupling=page["coupling"],
        extra="none",
    )
    assert pruned(again.pruner(page["added"], None, again.config)) == {"conv1": 2, "conv2": 2}


def test_modes_that_are_wrong(page):
    arguments = page["unequal"], page["added_layers"]
    with raises(ValueError, "dependency_aware", "coupling"):
        pp.from_nni("l1", *arguments, mode="dependency_aware")
    with raises(ValueError, "'slim'", "dependency-aware"):
        pp.from_nni("slim", *arguments, coupling=page["coupling"])
    with raises(ValueError, "coupling", "mode"):
        pp.from_nni("l1", *arguments, mode="normal", coupling=page["coupling"])
    with raises(ValueError, "mode", "'global'"):
        pp.from_nni("l1", *arguments, mode="global")


def test_lottery_tickets(page):
    shares = [1 - 0.2 ** (i / 5) for i in range(1, 6)]
    assert page["ticket_sizes"] == [5760 - int(5760 * s + 1e-9) for s in shares]
    assert int((page["model"][4].weight == 0).sum()) == 4608
    assert int(page["resumed"]["tickets"].schedule.step) == 5


def left(page, recipe, plan):
    of = page[recipe].problem
    found = of.measure(plan)
    return {name: (found[name], limit) for name, limit in of.budgets.items()}


def test_searches(page):
    counts = page["best"].counts
    total = 27 * int(counts["0"]) + 576 * int(counts["4"])
    assert 0 <= total - (432 + 5760) // 2 < 576
    for recipe, plan in (
        ("annealing", page["found"].best),
        ("adapting", page["adapted"].best),
        ("sensing", page["sensed"].best),
        ("sensing", page["exact"].plan),
        ("agent", page["learnt"].best),
    ):
        for amount, limit in left(page, recipe, plan).values():
            assert amount <= limit
    assert page["table"].startswith("layername,0.1,0.2")
    assert page["squeezing"].options["rounds"] == 2
    assert page["compressed"].history[-1]["left"]["params"] <= 0.5 * (432 + 16 + 32 + 5770)
    assert len(page["learnt"].history) == 4


def test_rounds(page):
    state = page["rounds"].state
    assert int((state["4.weight"] == 0).sum()) >= 4608
    assert [round(row["sparsity"], 4) for row in page["rounds"].history] == [0.563, 0.7704, 0.8]


def test_every_public_name_on_the_page_exists():
    names = re.findall(r"\bpp\.(\w+)", PAGE)
    assert [name for name in names if not hasattr(pp, name)] == []


# Names.

LAYERS = (
    Layer("conv", "Conv2d", "conv", (3, 3, 4, 10), (3,), (2,)),
    Layer("norm", "BatchNorm2d", "norm", (10,), (0,)),
)
NAMES = {
    pp.level: ["level", "LevelPruner"],
    pp.l1_norm: ["l1", "l1_filter", "L1FilterPruner", "L1NormPruner", "l1_norm"],
    pp.l2_norm: ["l2", "l2_filter", "L2FilterPruner", "L2NormPruner"],
    pp.fpgm: ["fpgm", "FPGMPruner"],
    pp.slim: ["slim", "SlimPruner"],
    pp.taylor_fo: [
        "taylorfo",
        "taylor_fo_weight_filter",
        "TaylorFOWeightFilterPruner",
        "TaylorFOWeightPruner",
    ],
    pp.apoz_rank: [
        "apoz",
        "activation_apoz_rank_filter",
        "ActivationAPoZRankFilterPruner",
        "ActivationAPoZRankPruner",
    ],
    pp.mean_activation_rank: [
        "mean_activation",
        "activation_mean_rank_filter",
        "ActivationMeanRankFilterPruner",
        "ActivationMeanRankPruner",
    ],
}


@pytest.mark.parametrize(
    ("pruner", "name"), [(f, name) for f, names in NAMES.items() for name in names]
)
def test_every_name_of_nni(pruner, name):
    rules = [{"sparsity": 0.8, "op_types": ["BatchNorm2d" if pruner is pp.slim else "Conv2d"]}]
    for given in (name, name.upper()):
        recipe = pp.from_nni(given, rules, LAYERS)
        assert recipe.pruner is pruner
        assert recipe.config.granularity == ("element" if pruner is pp.level else "output_channel")
        assert recipe.config.scope == ("global" if pruner is pp.slim else "layer")
        assert recipe.schedule.init(recipe.config).times.tolist() == [0]
    if pruner is not pp.slim:
        gradual = pp.from_nni("agp", rules, LAYERS, pruning_algorithm=name, total_iteration=4)
        assert gradual.pruner is pruner
        assert gradual.schedule.init(gradual.config).times.tolist() == [0, 1, 2, 3, 4]


def test_taylor_ranks_all_layers_together_in_global_mode():
    rules = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    recipe = pp.from_nni("taylorfo", rules, LAYERS, mode="global")
    assert (recipe.pruner, recipe.config.scope) == (pp.taylor_fo, "global")
    with raises(ValueError, "'global'", "Taylor", "'apoz'"):
        pp.from_nni("apoz", rules, LAYERS, mode="global")


SEARCHES = {
    "netadapt": ["netadapt", "net_adapt", "NetAdaptPruner"],
    "sensitivity": ["sensitivity", "SensitivityPruner"],
    "annealing": ["simulatedannealing", "simulated_annealing", "SimulatedAnnealingPruner"],
    "auto_compress": ["autocompress", "auto_compress", "AutoCompressPruner"],
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, some in SEARCHES.items() for n in some])
def test_every_search_of_nni(kind, name):
    rules = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    recipe = pp.from_nni(name, rules, LAYERS)
    assert dict(recipe.problem.budgets) == {"weights": 180}
    assert recipe.pruner is (pp.level if kind == "annealing" else pp.l1_norm)
    assert isinstance(recipe.search, pp.search.Search)
    assert (recipe.options == {}) == (kind != "auto_compress")


@pytest.mark.parametrize(
    ("name", "argument", "words"),
    [
        ("netadapt", "short_term_fine_tuner", "run_search"),
        ("netadapt", "experiment_data_dir", "folder="),
        ("sensitivity", "sparsity_proportion_calc", "search.allocate"),
        ("sensitivity", "checkpoint_dir", "folder="),
        ("sensitivity", "eval_args", "evaluate"),
        ("sensitivity", "finetune_args", "stage"),
        ("simulatedannealing", "evaluator", "evaluate"),
        ("simulatedannealing", "cool_down_rat", "'cool_down_rate'"),
        ("auto_compress", "trainer", "stage"),
        ("level", "evaluator", "only searches"),
    ],
)
def test_arguments_that_mean_something_else_are_refused(name, argument, words):
    rules = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    with raises(TypeError, argument, words):
        pp.from_nni(name, rules, LAYERS, **{argument: 0.5})


def test_searches_take_one_sparsity():
    rules = [{"op_types": ["Conv2d"]}]
    with raises(ValueError, "netadapt", "one sparsity", "none"):
        pp.from_nni("netadapt", rules, LAYERS)
    with raises(ValueError, "amc", "coupling="):
        pp.from_nni("amc", rules, LAYERS)


@pytest.mark.parametrize("name", ["admm", "ADMMPruner"])
def test_admm_by_name(name):
    rules = [{"sparsity": 0.8, "op_types": ["Conv2d"]}]
    pruner, _, config = pp.from_nni(name, rules, LAYERS)
    params = {"conv": jnp.asarray(np.arange(1.0, 361).reshape(3, 3, 4, 10)), "norm": jnp.ones(10)}
    state, _ = pp.admm.step(params, pp.admm.init(params, config), config, pruner=pp.level)
    masks = pruner(params, state, config)
    np.testing.assert_array_equal(masks["conv"], pp.level(params, None, config)["conv"])


@pytest.mark.parametrize("name", ["lottery_ticket", "LotteryTicketPruner"])
def test_lottery_tickets_by_name(name):
    rules = [{"sparsity": 0.8, "op_types": ["Conv2d"], "prune_iterations": 5}]
    pruner, schedule, config = pp.from_nni(name, rules, LAYERS)
    assert pruner is pp.level
    # 360 weights: 0.2752, 0.4747, 0.6193, 0.7241, 0.8.
    assert schedule.init(config).counts["conv"].tolist()[1:] == [0, 99, 170, 222, 260, 288]
    tickets = pp.lottery(pruner, config)
    run = {"params": {"conv": jnp.asarray(np.arange(1.0, 361).reshape(3, 3, 4, 10)), "norm": None}}
    state = tickets.init(run)
    for count in (99, 170, 222, 260, 288):
        state, _ = tickets.step(state, run)
        assert int((~state.masks["conv"]).sum()) == count


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("movement", "pp.movement"),
        ("MovementPruner", "pp.movement"),
        ("TransformerHeadPruner", "coupling="),
    ],
)
def test_names_of_what_is_something_else_here(name, what):
    with raises(KeyError, f"name: {name!r}", what):
        pp.from_nni(name, [], LAYERS)
    with raises(KeyError, f"pruning_algorithm: {name!r}", what):
        pp.from_nni("agp", [], LAYERS, pruning_algorithm=name, total_iteration=2)


@pytest.mark.parametrize(
    ("names", "module"),
    [
        (("naive", "NaiveQuantizer"), pp.quantize.naive),
        (("qat", "QAT_Quantizer", "QATQuantizer"), pp.quantize.qat),
        (("dorefa", "DoReFaQuantizer"), pp.quantize.dorefa),
        (("bnn", "BNNQuantizer"), pp.quantize.bnn),
        (("lsq", "LsqQuantizer"), pp.quantize.lsq),
        (("lsq_plus", "LsqPlusQuantizer"), pp.quantize.lsq_plus),
        (("ptq", "PTQQuantizer", "observer", "ObserverQuantizer"), pp.quantize.ptq),
    ],
)
def test_names_of_quantizers(names, module):
    rules = [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"]}]
    for name in names:
        found = pp.from_nni(name, rules, LAYERS)
        assert found.quantizer is module
        assert found.config == pp.resolve_quantization(rules, LAYERS)
        with raises(KeyError, "pruning_algorithm", repr(name), "quantizer"):
            pp.from_nni("agp", [], LAYERS, pruning_algorithm=name, total_iteration=2)
    with raises(ValueError, "activations are for quantizers", "'level'"):
        pp.from_nni("level", [], LAYERS, activations=[pp.Activation("relu1", "ReLU")])


def test_names_that_are_none():
    rules = [{"sparsity": 0.8, "op_types": ["Conv2d"]}]
    with raises(KeyError, "name", "'lvel'", "nearest", "'level'"):
        pp.from_nni("lvel", rules, LAYERS)
    with raises(KeyError, "pruning_algorithm", "'l3'", "'l1'"):
        pp.from_nni("agp", rules, LAYERS, pruning_algorithm="l3")
    with raises(TypeError, "name", "None"):
        pp.from_nni(None, rules, LAYERS)
    with raises(ValueError, "rule 0", "'Conv2'"):
        pp.from_nni("level", [{"sparsity": 0.5, "op_types": ["Conv2"]}], LAYERS)


def test_recipes(page):
    # 0.8 of 1920 weights, and still after a last epoch of training.
    assert int((page["perceptron"][1].weight == 0).sum()) == 1536
