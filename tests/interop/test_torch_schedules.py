"""Schedules in torch: an ordinary loop, a functional one, and many models at once."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import purepruning as pp
from purepruning_interop import torch as interop
from tests.messages import raises

SCHEDULE = pp.agp(begin_step=1, end_step=7, frequency=3)  # at 1, 4, 7
# 0.8 (1 - (1 - u)^3) at u = 0, 1/2, 1, of 60 weights: 0, 42, 48; of 10: 0, 7, 8.
COUNTS = {"0.weight": [0] * 4 + [42] * 3 + [48] * 3, "2.weight": [0] * 4 + [7] * 3 + [8] * 3}
STEPS = 10


def build(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))


def resolved(model):
    return pp.resolve([{"sparsity": 0.8, "op_types": ["Linear"]}], interop.layers(model))


def batches():
    return torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(1))


def loss(output):
    return ((output - 1) ** 2).mean()


def zeros(params):
    return {name: int((params[name] == 0).sum()) for name in COUNTS}


def ordinary(model, optimizer):
    """What a user writes: epochs or steps, and a line or two when pruning is due."""
    config = resolved(model)
    params = dict(model.named_parameters())
    state, masks, history = SCHEDULE.init(config), {}, []
    with interop.keep_pruned(model, masks, optimizer) as keeper:
        for x in batches():
            state, event = SCHEDULE.step(state)
            if event.due:
                now = config.with_counts(event.counts).with_masks(masks)
                masks = pp.level(params, None, now)
                keeper.set_masks(masks)
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()
            history.append(zeros(params))
    return masks, history


def test_an_ordinary_loop():
    model = build()
    masks, history = ordinary(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    assert {name: [row[name] for row in history] for name in COUNTS} == COUNTS
    assert zeros(masks) == zeros(dict(model.named_parameters()))


def functional(params, config, step_of):
    state = SCHEDULE.init(config)
    masks = {name: torch.ones_like(params[name], dtype=torch.bool) for name in COUNTS}
    history = []
    for x in batches():
        state, event = SCHEDULE.step(state)
        if event.due:
            masks = step_of.prune(params, masks, event.counts)
        params = step_of.train(params, masks, x)
        history.append(params)
    return params, masks, history


class Functions:
    """The pure steps of a functional loop, and the same over a stack of models."""

    def __init__(self, model, config):
        def prune(params, masks, counts):
            new = pp.level(params, None, config.with_counts(counts).with_masks(masks))
            return {name: new[name] for name in COUNTS}

        def train(params, masks, x):
            grads = torch.func.grad(lambda p: loss(interop.masked_call(model, masks, x, params=p)))(
                params
            )
            moved = {name: p - 0.1 * grads[name] for name, p in params.items()}
            return pp.apply_masks(moved, masks)

        self.prune, self.train = prune, train


class Stacked:
    def __init__(self, functions):
        self.prune = torch.func.vmap(functions.prune, in_dims=(0, 0, None))
        self.train = torch.func.vmap(functions.train, in_dims=(0, 0, None))


def detached(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_functional_loop():
    model = build()
    config = resolved(model)
    params, masks, history = functional(detached(model), config, Functions(model, config))
    assert {name: [zeros(row)[name] for row in history] for name in COUNTS} == COUNTS
    assert zeros(masks) == zeros(params)


def test_the_functional_and_the_ordinary_loop_prune_the_same():
    model = build()
    config = resolved(model)
    _, expected, _ = functional(detached(model), config, Functions(model, config))
    masks, _ = ordinary(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for name in COUNTS:
        assert torch.equal(masks[name], expected[name])


def test_many_models_in_one_functional_loop():
    models = [build(seed) for seed in range(3)]
    config = resolved(models[0])
    functions = Functions(models[0], config)
    params = {
        name: torch.stack([p, *(detached(m)[name] for m in models[1:])])
        for name, p in detached(models[0]).items()
    }
    together, masks, _ = functional(params, config, Stacked(functions))
    for i, model in enumerate(models):
        alone, kept, _ = functional(detached(model), config, functions)
        for name in COUNTS:
            assert torch.equal(masks[name][i], kept[name])
            torch.testing.assert_close(together[name][i], alone[name])


def test_counts_and_masks_are_those_of_jax():
    """The same network, data and steps in Optax: the same masks after every event."""
    model = build()
    torch_masks, _ = ordinary(model, torch.optim.SGD(model.parameters(), lr=0.1))
    start = {name: jnp.asarray(p.numpy()) for name, p in detached(build()).items()}
    tx = optax.chain(optax.sgd(0.1), pp.prune_on_schedule(pp.level, SCHEDULE, resolved(model)))

    def jax_loss(p, x):
        hidden = jnp.tanh(x @ p["0.weight"].T + p["0.bias"][None])
        return jnp.mean((hidden @ p["2.weight"].T + p["2.bias"][None] - 1) ** 2)

    def step(carry, x):
        params, state = carry
        updates, state = tx.update(jax.grad(jax_loss)(params, x), state, params)
        return (optax.apply_updates(params, updates), state), None

    data = jnp.asarray(batches().numpy())
    (params, state), _ = jax.lax.scan(step, (start, tx.init(start)), data)
    masks = pp.get_masks(state, params)
    for name, mask in torch_masks.items():
        np.testing.assert_array_equal(np.asarray(masks[name]), mask.numpy())
    for name, p in model.named_parameters():
        np.testing.assert_allclose(params[name], p.detach().numpy(), atol=1e-5)


def test_mistakes_raise():
    model = build()
    config = resolved(model)
    _, event = SCHEDULE.step(SCHEDULE.init(config))
    with raises(KeyError, "no pool is called '1'", "'0', '2'"):
        config.with_counts({"1": 0})
    with raises(KeyError, "no parameter is called 'weight'"):
        now = config.with_counts(event.counts).with_masks({"weight": torch.ones(1).bool()})
        pp.level(dict(model.named_parameters()), None, now)
    with raises(ValueError, "(10, 6)", "(7,)"):
        now = config.with_counts(event.counts).with_masks({"0.weight": torch.ones(7).bool()})
        pp.level(dict(model.named_parameters()), None, now)
    with raises(TypeError, "JAX", "torch"):
        now = config.with_counts(event.counts).with_masks({"0.weight": jnp.ones((10, 6), bool)})
        pp.level(dict(model.named_parameters()), None, now)


def test_torch_reads_states_without_being_told_to_trust_them():
    model = torch.nn.Linear(4, 3)
    config = pp.resolve([{"op_types": ["Linear"], "sparsity": 0.5}], interop.layers(model))
    clock = pp.agp(end_step=4).init(config)
    tickets = pp.lottery(pp.level, config, rounds=2).init({"params": dict(model.state_dict())})
    file = io.BytesIO()
    torch.save({"clock": clock, "tickets": tickets}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert jax.tree.structure(found) == jax.tree.structure({"clock": clock, "tickets": tickets})
    state, event = pp.agp(end_step=4).step(found["clock"])
    assert int(state.step) == 1
    assert bool(event.due)
