"""The document's loops, as they stand there, on digits: AGP, lottery tickets, sensitivity, AMC."""

import types

import numpy as np
import pytest
import torch

from purepruning_interop import recipes
from tests.recipes import nets
from tests.recipes.seed_recipes import CALLS, SEEDS

#: auptimizer's package, as the document calls it.
aup = types.SimpleNamespace(compression=recipes, create_compressor=recipes.create_compressor)
args = types.SimpleNamespace(epochs=10)


@pytest.mark.parametrize(
    "name",
    # Couplings and searches are compiled.
    [
        pytest.param(n, marks=[pytest.mark.full] * (n in ("amc", "auto_compress", "net_adapt")))
        for n in CALLS
    ],
)
def test_every_example_of_a_creation(name):
    x = torch.from_numpy(nets.digits()[0][0][:1])
    model = nets.torch_net()
    names = {
        "aup": aup,
        "model": model,
        "config": SEEDS[name],
        "config_list": SEEDS[name],
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "evaluator": lambda *args: 0.0,
        "trainer": lambda *args, **kwargs: None,
        "short_term_fine_tuner": lambda *args: None,
        "val_loader": [(x, None)],
        "dummy_input": x,
    }
    compressor = eval(CALLS[name], names)
    assert compressor.config is not None


def test_agp():
    model, config = nets.torch_net(), SEEDS["agp"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruned = []

    compressor = aup.compression.create_compressor(model, config, optimizer=optimizer)
    model = compressor.compress()

    for epoch in range(1, args.epochs + 1):
        nets.torch_epoch(model, optimizer)
        compressor.update_epoch(epoch)
        pruned.append(int((model.fc1.weight == 0).sum()))

    # NNI 2.0's numbers: 0.8 - 0.8 (1 - e/9)^3 of 2048 weights, and no more after epoch 9.
    shares = [0.8 - 0.8 * (1 - min(epoch, 9) / 9) ** 3 for epoch in range(1, 11)]
    assert pruned == [int(2048 * s + 1e-9) for s in shares]
    assert nets.torch_accuracy(model) > 0.85


def test_lottery_ticket():
    model, config = nets.torch_net(), SEEDS["lottery_ticket"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    first = {n: x.clone() for n, x in model.state_dict().items()}
    left, rates = [], []
    args = types.SimpleNamespace(epochs=2)

    compressor = aup.compression.create_compressor(
        model, config, optimizer=optimizer, lr_scheduler=scheduler
    )
    model = compressor.compress()

    for _ in compressor.get_prune_iterations():
        compressor.prune_iteration_start()
        rates.append(scheduler.get_last_lr()[0])
        kept = model.conv2.weight != 0
        left.append(int(kept.sum()))
        # Back at its first weights, statistics and optimizer.
        assert torch.equal(model.conv2.weight[kept], first["conv2.weight"][kept])
        assert torch.equal(model.norm.running_mean, first["norm.running_mean"])
        assert not optimizer.state
        for epoch in range(1, args.epochs + 1):  # noqa: B007
            nets.torch_epoch(model, optimizer)
        scheduler.step()

    shares = [1 - 0.2 ** (i / 5) for i in range(6)]
    assert left == [1152 - int(1152 * s + 1e-9) for s in shares]
    assert rates == [1e-2] * 6
    assert int((model.conv2.weight != 0).sum()) <= left[-1]
    assert nets.torch_accuracy(model) > 0.6


def test_sensitivity():
    model, config = nets.torch_net(), SEEDS["sensitivity"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        nets.torch_epoch(model, optimizer)
    before, seen = nets.torch_accuracy(model), []

    def evaluator(model):
        seen.append(int((model.conv2.weight == 0).sum()))
        return nets.torch_accuracy(model)

    def short_term_fine_tuner(model):
        nets.torch_epoch(model, torch.optim.Adam(model.parameters(), 1e-2))

    compressor = aup.compression.create_compressor(
        model, config, finetuner=short_term_fine_tuner, evaluator=evaluator
    )
    model = compressor.compress(eval_args=[model], finetune_args=[model])

    # The evaluator has seen the pruned model, through the argument that the caller gave.
    assert len(set(seen)) > 3
    assert int((~compressor.masks["conv2.weight"]).sum()) > 0
    kept = sum(
        int(compressor.masks[f"conv{i}.weight"].expand(shape).sum())
        for i, shape in ((1, (8, 1, 3, 3)), (2, (16, 8, 3, 3)))
    )
    assert kept <= (72 + 1152) // 2
    # What is returned is the model that was tuned and scored last, weights and statistics.
    tuned = [row["score"] for row in compressor.history if row["stage"] == 1]
    assert np.isclose(nets.torch_accuracy(model), tuned[-1])
    assert tuned[-1] > before - 0.1


@pytest.mark.full
def test_amc():
    model, config = nets.torch_net(), SEEDS["amc"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        nets.torch_epoch(model, optimizer)
    loader = [(torch.from_numpy(x), y) for x, y in [nets.digits()[1]]]
    before = {n: x.clone() for n, x in model.state_dict().items()}

    def evaluator(val_loader, model):
        assert val_loader is loader
        return nets.torch_accuracy(model)

    few = {"train_episode": 6, "warmup": 2, "hidden1": 16, "hidden2": 16, "bsize": 4}
    compressor = aup.create_compressor(
        model, config, evaluator, loader, channel_round=2, seed=1, **few
    )
    assert compressor.compress() is model

    assert len(compressor.history) == 6
    scores = np.asarray([row["score"] for row in compressor.history])
    assert np.isclose(nets.torch_accuracy(model), scores.max())
    # Kept weights are what they were.
    kept = model.conv2.weight != 0
    assert torch.equal(model.conv2.weight[kept], before["conv2.weight"][kept])


@pytest.mark.full
def test_agp_in_flax():
    """The same loop on Linen's variables."""
    model, config = nets.Linen(), {**SEEDS["agp"]["compression"], "framework": "flax"}
    inputs = (nets.digits()[0][0][:1],)
    compressor = aup.create_compressor(
        model, config, variables=nets.linen_variables(), inputs=inputs
    )
    variables = compressor.compress()
    for epoch in range(1, 10 + 1):
        variables = nets.linen_epoch(variables, compressor.step)
        variables = compressor.update_epoch(epoch, variables)
    assert int((variables["params"]["fc1"]["kernel"] == 0).sum()) == 1638
    assert nets.linen_accuracy(variables) > 0.7
