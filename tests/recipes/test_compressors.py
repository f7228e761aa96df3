"""Every example of the document, by its own call, on a small network: what is left, counted."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import purepruning as pp
from purepruning_interop.recipes import create_compressor, read_recipe
from tests.messages import raises
from tests.recipes import nets
from tests.recipes.seed_recipes import SEEDS

X = torch.from_numpy(nets.digits()[0][0][:1])
#: Weights that are zero, by layer: half of the channels, or 0.8 of each weight.
CHANNELS = {"conv1.weight": 4 * 9, "conv2.weight": 8 * 72}
LEVEL = {"conv1.weight": 57, "conv2.weight": 921, "fc1.weight": 1638, "fc2.weight": 256}
PRUNED = {
    "level": LEVEL,
    "slim": {"norm.weight": 6},
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
    "agp": LEVEL,
    "lottery_ticket": {"conv1.weight": 57, "conv2.weight": 921},
}


def trainer(model, optimizer, criterion, epoch, callback):
    nets.torch_epoch(model, optimizer, callback)


def tuner(model):
    x, y = nets.torch_batches()[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def arguments(name, optimizer):
    """What the document's call gives after model and config, with fewer iterations."""
    if name in ("net_adapt",):
        return (tuner, nets.torch_accuracy), {"sparsity_per_iteration": 0.25}
    if name == "simulated_annealing":
        return (nets.torch_accuracy,), {"cool_down_rate": 0.1}
    if name == "auto_compress":
        few = {"num_iterations": 1, "admm_num_iterations": 1, "admm_training_epochs": 1}
        return (trainer, nets.torch_accuracy, X), {**few, "cool_down_rate": 0.1}
    if name == "amc":
        few = {"train_episode": 3, "warmup": 1, "channel_round": 2, "hidden1": 8, "hidden2": 8}
        evaluate = lambda loader, model: nets.torch_accuracy(model)  # noqa: E731
        return (evaluate, [(X, None)]), {**few, "bsize": 2, "model_type": "mobilenet"}
    if name == "admm":
        return (trainer,), {"num_iterations": 2, "training_epochs": 1}
    if name == "sensitivity":
        return (nets.torch_accuracy,), {"finetuner": tuner, "sparsity_per_iter": 0.25}
    return (optimizer,), {}


@pytest.mark.parametrize("name", PRUNED)
def test_every_pruner_of_the_document_prunes_what_it_says(name):
    model = nets.torch_net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    args, kwargs = arguments(name, optimizer)
    compressor = create_compressor(model, SEEDS[name], *args, **kwargs)
    assert compressor.compress() is model
    if name == "agp":
        for epoch in range(10):
            compressor.update_epoch(epoch)
    if name == "lottery_ticket":
        for _ in compressor.get_prune_iterations():
            compressor.prune_iteration_start()
    # Pruned weights stay at zero while training goes on.
    nets.torch_epoch(model, optimizer)
    nets.torch_epoch(model, optimizer)
    if name == "admm":
        compressor.step()
    for path, count in PRUNED[name].items():
        assert int((~compressor.masks[path].expand_as(model.get_parameter(path))).sum()) == count
        assert int((model.get_parameter(path) == 0).sum()) >= count
    untouched = {p for p, m in compressor.masks.items() if m is not None} - {*PRUNED[name]}
    assert all(path.endswith("bias") for path in untouched)


# Sensitivity and AMC are among the loops.
@pytest.mark.parametrize(
    "name",
    [
        "net_adapt",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("simulated_annealing", "sensitivity", "amc")
        ),
    ],
)
def test_every_search_of_the_document_meets_its_budget(name):
    model = nets.torch_net()
    args, kwargs = arguments(name, None)
    compressor = create_compressor(model, SEEDS[name], *args, **kwargs)
    assert compressor.compress() is model
    assert compressor.history
    assert all(row["error"] is None for row in compressor.history)
    weights = 8 * 9 + 16 * 72
    masks = compressor.masks
    kept = {n: int(masks[n].expand_as(p).sum()) for n, p in model.named_parameters() if n in masks}
    if name == "amc":
        small = compressor.apply_speedup()
        macs, before = (
            create_compressor(m, SEEDS["l1_filter"]).count_flops_params((1, 1, 8, 8))[0]
            for m in (small, nets.torch_net())
        )
        assert macs <= 0.5 * before
    else:
        assert kept["conv1.weight"] + kept["conv2.weight"] <= weights // 2


@pytest.mark.full
def test_auto_compress_returns_a_smaller_model():
    model = nets.torch_net()
    args, kwargs = arguments("auto_compress", None)
    compressor = create_compressor(model, SEEDS["auto_compress"], *args, **kwargs)
    small = compressor.compress()
    size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert size(small) <= size(nets.torch_net()) / 2
    assert small(X).shape == (1, 10)


@pytest.mark.parametrize("name", ["naive", "qat", "dorefa", "bnn"])
@pytest.mark.filterwarnings("ignore:bnn.activations. the output of:UserWarning")
def test_every_quantizer_of_the_document_quantises(name, tmp_path):
    model = nets.torch_net()
    compressor = create_compressor(model, SEEDS[name])
    quantised = compressor.compress()
    assert {id(p) for p in quantised.parameters()} == {id(p) for p in model.parameters()}
    before = model.conv1.weight.detach().clone()
    optimizer = torch.optim.SGD(quantised.parameters(), 0.01)
    nets.torch_epoch(quantised, optimizer)
    compressor.step()
    assert not torch.equal(before, model.conv1.weight)
    if name == "bnn":
        assert float(model.conv1.weight.detach().abs().max()) <= 1
    if name == "qat":
        assert int(compressor.state.step) == 12
    quantised.eval()
    weights = compressor._quantizer.weights(dict(model.named_parameters()), compressor.state)
    levels = {"naive": 255, "qat": 256, "dorefa": 256, "bnn": 2}[name]
    assert len(weights["conv2.weight"].unique()) <= levels
    params = {**dict(model.named_buffers()), **weights}
    if name != "bnn" and name != "qat":
        expected = torch.func.functional_call(model, params, X)
        torch.testing.assert_close(quantised(X), expected)
    files = compressor.export_model("model.pth", folder_name=str(tmp_path))
    read = pp.load_quantized(files["model"], dict(model.named_parameters()))
    torch.testing.assert_close(read.params["conv2.weight"], weights["conv2.weight"].detach())


def test_export_and_speedup(tmp_path):
    model = nets.torch_net()
    compressor = create_compressor(model, SEEDS["l1_filter"], dummy_input=X)
    compressor.compress()
    model.eval()
    before = model(X)
    files = compressor.export_model("model.pth", "mask.pth", folder_name=str(tmp_path / "out"))
    assert set(files) == {"model", "masks", "report"}
    fresh = nets.torch_net()
    fresh.load_state_dict(load_file(files["model"]))
    torch.testing.assert_close(fresh.eval()(X), before)
    masks = pp.load_masks(files["masks"], dict(model.named_parameters()))
    assert torch.equal(masks["conv1.weight"], compressor.masks["conv1.weight"])
    macs, params, _ = compressor.count_flops_params((1, 1, 8, 8))
    assert macs == 16 * 8 * 9 + 4 * 16 * 72 + 64 * 32 + 32 * 10
    assert params == 80 + 16 + 1168 + 2080 + 330
    files = compressor.export_model("small.v1", folder_name=str(tmp_path), speedup=True)
    assert files["model"] == str(tmp_path / "small.v1.safetensors")
    small = compressor.apply_speedup(X)
    torch.testing.assert_close(small(X), before)
    assert load_file(files["model"])["conv2.weight"].shape == (8, 4, 3, 3)
    macs, params, _ = compressor.count_flops_params((1, 1, 8, 8))
    assert macs == 16 * 4 * 9 + 4 * 8 * 36 + 32 * 32 + 32 * 10


def test_names_are_checked_before_anything_is_done():
    model = nets.torch_net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    recipe = {"purepruning": 1, "steps": [{"use": "level", "rules": []}]}
    recipe["steps"][0]["rules"] = [
        {"sparsity": 0.5, "op_types": ["Linear"]},
        {"sparsity": 0.5, "op_names": ["conv3"]},
    ]
    with raises(ValueError, "recipe: step 0 (level): rule 1: op_names", "'conv3'", "'conv1'"):
        create_compressor(model, recipe)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "words"),
    [
        ("net_adapt", (), {}, ["needs 'evaluator'"]),
        ("admm", (), {}, ["needs 'trainer'"]),
        ("level", (None, 3), {}, ["at most 1"]),
        ("level", (None,), {"optimizer": None}, ["'optimizer'", "twice"]),
        ("level", (), {"optimiser": None}, ["'optimiser'", "'optimizer'"]),
        ("agp", (None,), {"pruning_algorithm": "lvel"}, ["pruning_algorithm", "'lvel'"]),
        ("level", (), {"step": 1}, ["1 steps", "step=1"]),
        ("simulated_annealing", (len,), {"cool_down_rate": "a"}, ["cool_down_rate", "'a'"]),
        ("amc", (len, [(X,)]), {"dataset": "mnist"}, ["dataset", "no effect"]),
        ("fpgm", (), {"dependency_aware": True}, ["inputs="]),
    ],
)
def test_arguments_that_are_wrong(name, args, kwargs, words):
    with raises((TypeError, ValueError, KeyError), *words):
        create_compressor(nets.torch_net(), SEEDS[name], *args, **kwargs)


def test_frameworks_are_refused_by_name():
    level = SEEDS["level"]["compression"]
    with raises(ValueError, "'tensorflow'", "'torch'", "change the recipe"):
        create_compressor(nets.torch_net(), {**level, "framework": "tensorflow"})
    with raises(ValueError, "'nnx'", "'torch'"):
        create_compressor(nets.torch_net(), {**level, "framework": "nnx"})
    with raises(TypeError, "function"):
        create_compressor(len, {**level})


def test_dependency_aware_masks_agree():
    compressor = create_compressor(
        nets.torch_net(), SEEDS["fpgm"], dependency_aware=True, dummy_input=X
    )
    compressor.compress()
    assert int((~compressor.masks["conv1.weight"].reshape(8, -1)[:, 0]).sum()) == 4


def test_statistics_of_given_data():
    model = nets.torch_net()
    data = nets.torch_batches()[:2]
    loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    recipe = read_recipe(SEEDS["taylor_fo_weight_filter"])
    compressor = create_compressor(model, recipe, statistics_batch_num=2, data=data, loss=loss)
    compressor.compress()
    # By hand: the sum over channels of (w g)^2 over both batches.
    fresh = nets.torch_net()
    scores = 0
    for batch in data:
        (grad,) = torch.autograd.grad(loss(fresh, batch), fresh.conv2.weight)
        scores = scores + ((grad * fresh.conv2.weight) ** 2).sum((1, 2, 3)).detach()
    gone = (~compressor.masks["conv2.weight"]).reshape(16, -1).all(1)
    assert set(np.flatnonzero(gone)) == set(np.argsort(scores.numpy())[:8])
    with raises(ValueError, "statistics_batch_num", "3"):
        create_compressor(model, recipe, statistics_batch_num=3, data=data, loss=loss).compress()
    with raises(TypeError, "data="):
        create_compressor(model, recipe).compress()


def test_a_step_that_shrinks_what_the_step_before_pruned():
    rule = {"sparsity": 0.5, "op_types": ["Conv2d"]}
    steps = {"purepruning": 1, "steps": [{"use": "l1_filter", "rules": [rule]}, {"use": "shrink"}]}
    model = create_compressor(nets.torch_net().eval(), steps, step=0).compress()
    small = create_compressor(model, steps, step=1, inputs=(X,)).compress()
    assert small.conv2.weight.shape == (8, 4, 3, 3)
    torch.testing.assert_close(small(X), model(X))
    steps["steps"][1]["rules"] = [rule]
    with raises(ValueError, "step 1 (shrink)", "leave them out"):
        read_recipe(steps)
    with raises(ValueError, "there is no 'shrink'"):
        read_recipe({"type": "pruning", "compressor": "shrink", "config_list": [rule]})
