"""Training under the masks of a coupled pruner ends in the function that shrink returns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen
from torch import nn

import purepruning as pp
from purepruning_interop import linen as ppl
from purepruning_interop import torch as ppt
from tests.fast import jit_once, some_key

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")

rng = np.random.default_rng(0)
X = rng.normal(size=(16, 1, 8, 8)).astype(np.float32)
Y = rng.integers(0, 3, 16)
RULES = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]


class TorchNet(nn.Module):
    """Convolutions, one of them added to another, with norms whose shifts are not zero."""

    def __init__(self, act):
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.three = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.norm2, self.out = nn.BatchNorm2d(12), nn.Linear(12, 3)
        self.act = act

    def forward(self, x):
        x = self.act(self.norm(self.one(x)))
        x = self.act(self.norm2(self.two(x) + self.three(x)))
        return self.out(x.mean((2, 3)))


def torch_net(act):
    torch.manual_seed(0)
    net = TorchNet(act)
    for norm in (net.norm, net.norm2):
        nn.init.uniform_(norm.bias, 0.5, 1)
    return net.eval()


def torch_train(net, step=lambda i: None, steps=6):
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    net.train()
    x, y = torch.tensor(X), torch.tensor(Y)
    for i in range(steps):
        step(i, optimizer)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()


@pytest.mark.parametrize("act", [torch.relu, torch.sigmoid], ids=["relu", "sigmoid"])
@pytest.mark.parametrize("extra", ["own", "none"])
def test_torch(act, extra):
    net, x = torch_net(act), torch.tensor(X)
    coupling = ppt.couple(net, x)
    rules = [*RULES, {"op_names": ["three"], "sparsity": 0.3}]
    config = pp.resolve(rules, ppt.layers(net), coupling=coupling, extra=extra)
    masks = pp.l1_norm(dict(net.named_parameters()), None, config)

    def keep(i, optimizer):
        if i == 0:
            ppt.apply_(net, masks)
            ppt.keep_pruned(net, masks, optimizer)

    torch_train(net, keep)
    small = ppt.shrink(net, masks, coupling, x)
    assert small.model.one.out_channels == 4
    assert small.model.two.out_channels == 12 - 3
    torch.testing.assert_close(small.model(x), net(x), rtol=1e-5, atol=1e-5)


def test_torch_takes_the_complete_masks_of_a_report():
    """They name running means and variances as well."""
    net, x = torch_net(torch.relu), torch.tensor(X)
    coupling = ppt.couple(net, x)
    config = pp.resolve(RULES, ppt.layers(net), coupling=coupling)
    masks = pp.l1_norm(dict(net.named_parameters()), None, config)
    small = ppt.shrink(net, masks, coupling, x)
    complete = small.report.masks
    assert "norm.running_mean" in complete
    torch.testing.assert_close(ppt.masked_call(net, complete, x), small.model(x))

    ppt.apply_(net, complete)
    torch.testing.assert_close(net(x), small.model(x))
    torch_train(net, lambda i, optimizer: i or ppt.keep_pruned(net, complete, optimizer))
    small = ppt.shrink(net, complete, coupling, x)
    torch.testing.assert_close(small.model(x), net(x), rtol=1e-5, atol=1e-5)


def test_torch_with_a_schedule():
    net, x = torch_net(torch.relu), torch.tensor(X)
    coupling = ppt.couple(net, x)
    config = pp.resolve(RULES, ppt.layers(net), coupling=coupling)
    schedule = pp.agp(end_step=4)
    state, kept, masks = schedule.init(config), [], {}

    def prune(i, optimizer):
        nonlocal state, masks
        state, event = schedule.step(state)
        if event.due:
            now = config.with_counts(event.counts).with_masks(masks)
            masks = pp.l1_norm(dict(net.named_parameters()), None, now)
            if not kept:
                kept.append(ppt.keep_pruned(net, masks, optimizer))
            kept[0].set_masks(masks)

    torch_train(net, prune, steps=8)
    small = ppt.shrink(net, masks, coupling, x)
    assert small.model.two.out_channels == 6
    torch.testing.assert_close(small.model(x), net(x), rtol=1e-5, atol=1e-5)


class LinenNet(linen.Module):
    """The same in Flax."""

    @linen.compact
    def __call__(self, x, train=False):
        norm = lambda name: linen.BatchNorm(not train, momentum=0.9, name=name)  # noqa: E731
        x = linen.sigmoid(norm("norm")(linen.Conv(8, (3, 3), name="one")(x)))
        x = linen.Conv(12, (3, 3), name="two")(x) + linen.Conv(12, (1, 1), name="three")(x)
        return linen.Dense(3, name="out")(linen.relu(norm("norm2")(x)).mean((1, 2)))


@pytest.mark.parametrize("how", ["keep_pruned", "prune_on_schedule", "lottery"])
def test_jax(how):
    net, x = LinenNet(), jnp.asarray(X.transpose(0, 2, 3, 1))
    variables = net.init(some_key(), x)
    for norm in ("norm", "norm2"):
        bias = variables["params"][norm]["bias"]
        variables["params"][norm]["bias"] = jnp.linspace(0.5, 1, len(bias))
    coupling = ppl.couple(net, variables, x)
    config = pp.resolve(RULES, ppl.layers(net, variables, x), coupling=coupling)

    def loss(params, stats):
        both = {"params": params, "batch_stats": stats}
        logits, new = net.apply(both, x, train=True, mutable=["batch_stats"])
        cost = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(Y)).mean()
        return cost, new["batch_stats"]

    def train(tx, variables, opt_state):
        def step(carry, _):
            variables, opt_state = carry
            grads, stats = jax.grad(loss, has_aux=True)(
                variables["params"], variables["batch_stats"]
            )
            # Statistics are moved on by the model, not by the optimizer.
            grads = {"params": grads, "batch_stats": jax.tree.map(jnp.zeros_like, stats)}
            variables = {"params": variables["params"], "batch_stats": stats}
            updates, opt_state = tx.update(grads, opt_state, variables)
            return (optax.apply_updates(variables, updates), opt_state), None

        run = jit_once(lambda carry: jax.lax.scan(step, carry, length=8)[0])
        return run((variables, opt_state))

    def level(variables):
        return pp.l1_norm(variables, None, config)

    if how == "keep_pruned":
        masks = level(variables)
        tx = optax.chain(optax.adam(1e-2), pp.keep_pruned(masks))
        variables, _ = train(tx, pp.apply_masks(variables, masks), tx.init(variables))
    elif how == "prune_on_schedule":
        tx = pp.prune_on_schedule(pp.l1_norm, pp.agp(end_step=4), config, optax.adam(1e-2))
        variables, state = train(tx, variables, tx.init(variables))
        masks = pp.get_masks(state, variables)
    else:
        tickets = pp.lottery(pp.l1_norm, config, rounds=2)
        tx = pp.keep_pruned(pp.expand({}, variables), optax.adam(1e-2))
        run = {"params": variables, "opt_state": tx.init(variables)}
        state = tickets.init(run)
        for _ in range(2):
            trained, opt_state = train(tx, run["params"], run["opt_state"])
            state, run = tickets.step(state, {"params": trained, "opt_state": opt_state})
        masks = state.masks
        variables, _ = train(tx, run["params"], run["opt_state"])
    small = ppl.shrink(net, variables, masks, coupling, x)
    assert small.params["params"]["two"]["kernel"].shape == (3, 3, 4, 6)
    expected = net.apply(variables, x)
    np.testing.assert_allclose(small.fn(small.params, x), expected, rtol=1e-5, atol=1e-5)
