"""Outputs of Equinox layers; every expected output is computed by hand from the parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equinox import nn

from purepruning_interop import equinox as adapter
from tests.fast import some_key
from tests.interop.capture import assert_outputs

pytestmark = pytest.mark.usefixtures("unoptimized")

KEY = some_key(0)
X = jnp.array([[1.0, -2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 2.0]])


def dense(layer, x):
    return layer.weight @ x + layer.bias


def batch(function, xs):
    return jnp.stack([function(x) for x in xs])


class Net(eqx.Module):
    first: nn.Linear
    rest: list

    def __init__(self, key=KEY):
        keys = jax.random.split(key, 2)
        self.first = nn.Linear(4, 3, key=keys[0])
        self.rest = [jax.nn.relu, {"last": nn.Linear(3, 2, key=keys[1])}]

    def __call__(self, x):
        return self.rest[1]["last"](self.rest[0](self.first(x)))

    def encode(self, x):
        return self.first(x)


def expected_of(net, x):
    first = dense(net.first, x)
    return {"first": first, "rest.1.last": dense(net.rest[1]["last"], jax.nn.relu(first))}


@pytest.mark.parametrize("wrap", [lambda f: f, eqx.filter_jit])
def test_outputs_are_those_before_the_activation(wrap):
    net = Net()
    function = wrap(lambda net, x: adapter.capture(net, x, layers=adapter.layers(net)))
    y, outputs = function(net, X[0])
    assert_outputs(outputs, expected_of(net, X[0]))
    np.testing.assert_allclose(y, net(X[0]), rtol=1e-6)


def test_over_a_batch_and_over_models():
    net = Net()
    expected = jax.tree.map(lambda *r: jnp.stack(r), *(expected_of(net, x) for x in X))
    names = list(expected)
    outside = jax.vmap(lambda x: adapter.capture(net, x, layers=names)[1])(X)
    assert_outputs(outside, expected)
    _, inside = adapter.capture(net, X, layers=names, method=lambda net, x: jax.vmap(net)(x))
    assert_outputs(inside, expected)

    keys = jax.random.split(jax.random.key(0), 3)  # of a kind that vmap does not change
    nets, stacked = [Net(k) for k in keys], eqx.filter_vmap(Net)(keys)
    found = eqx.filter_vmap(lambda n: adapter.capture(n, X[0], layers=["first"])[1])(stacked)
    assert_outputs(found, {"first": jnp.stack([dense(n.first, X[0]) for n in nets])})


def test_gradient_equals_the_one_by_hand():
    net = Net()

    def loss(net):
        return jnp.sum(adapter.capture(net, X[0], layers=["first"])[1]["first"] ** 2)

    grads = eqx.filter_grad(loss)(net)
    assert jax.tree.structure(grads) == jax.tree.structure(eqx.filter(net, eqx.is_inexact_array))
    np.testing.assert_allclose(
        grads.first.weight, 2 * jnp.outer(dense(net.first, X[0]), X[0]), rtol=1e-5
    )


def test_the_model_is_not_changed():
    net = Net()
    structure, leaves = jax.tree.structure(net), jax.tree.leaves(net)
    adapter.capture(net, X[0], layers=["first", "rest.1.last", ""])
    assert jax.tree.structure(net) == structure
    assert all(a is b for a, b in zip(jax.tree.leaves(net), leaves, strict=True))
    assert type(net.first) is nn.Linear


class Stateful(eqx.Module):
    first: nn.Linear
    norm: nn.BatchNorm

    def __init__(self):
        self.first = nn.Linear(4, 3, key=KEY)
        self.norm = nn.BatchNorm(3, "batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(self.first(x), state)


def test_batch_norm_in_training_mode():
    net, state = nn.make_with_state(Stateful)()

    def forward(net, x, state):
        return jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    (y, new), outputs = adapter.capture(net, X, state, layers=["first", "norm"], method=forward)
    first = batch(lambda x: dense(net.first, x), X)
    normed = (first - first.mean(0)[None]) / jnp.sqrt(first.var(0)[None] + 1e-5)
    np.testing.assert_allclose(y, normed, rtol=1e-4)
    np.testing.assert_allclose(outputs["norm"][0], normed, rtol=1e-4)
    assert_outputs({"first": outputs["first"]}, {"first": first})
    # the state after the norm, which is the same for the whole batch
    assert outputs["norm"][1].get(net.norm.batch_state_index)[0].shape == (3,)
    assert new.get(net.norm.batch_state_index)[0].shape == (3,)
    assert not state.get(net.norm.batch_state_index)[0].any()


class Scanned(eqx.Module):
    steps: nn.Linear
    remat: bool

    def __init__(self, remat):
        self.steps = eqx.filter_vmap(lambda k: nn.Linear(4, 4, key=k))(jax.random.split(KEY, 3))
        self.remat = remat

    def __call__(self, x):
        arrays, static = eqx.partition(self.steps, eqx.is_array)

        def step(x, arrays):
            return jax.nn.relu(eqx.combine(arrays, static)(x)), None

        return jax.lax.scan(eqx.filter_checkpoint(step) if self.remat else step, x, arrays)[0]


@pytest.mark.parametrize("wrap", [lambda f: f, eqx.filter_jit])
@pytest.mark.parametrize("remat", [False, True])
def test_scan_and_checkpoint_stack_the_outputs(remat, wrap):
    net = Scanned(remat)
    _, outputs = wrap(lambda n, x: adapter.capture(n, x, layers=adapter.layers(n)))(net, X[0])
    x, expected = X[0], []
    for weight, bias in zip(net.steps.weight, net.steps.bias, strict=True):
        expected.append(weight @ x + bias)
        x = jax.nn.relu(expected[-1])
    assert_outputs(outputs, {"steps": jnp.stack(expected)})


class Twice(eqx.Module):
    layer: nn.Linear
    attention: nn.MultiheadAttention

    def __init__(self):
        self.layer = nn.Linear(4, 4, key=KEY)
        self.attention = nn.MultiheadAttention(2, 4, key=KEY)

    def __call__(self, x):
        x = jax.vmap(self.layer)(jax.vmap(self.layer)(x))
        return self.attention(x, x, x)


def test_layer_called_twice_and_attention():
    net = Twice()
    names = ["layer", "attention.query_proj", "attention.output_proj", "attention"]
    y, outputs = adapter.capture(net, X, layers=names)
    first = batch(lambda x: dense(net.layer, x), X)
    second = batch(lambda x: dense(net.layer, x), first)
    expected = {
        "layer": [first, second],
        "attention.query_proj": second @ net.attention.query_proj.weight.T,
        "attention.output_proj": y,
        "attention": y,
    }
    assert_outputs(outputs, expected)


class Tied(eqx.Module):
    shared: nn.Shared

    def __init__(self):
        pair = nn.Embedding(7, 4, key=KEY), nn.Linear(4, 7, use_bias=False, key=KEY)
        self.shared = nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

    def __call__(self, i):
        embedding, head = self.shared()
        return head(embedding(i))


def test_tied_weights_are_two_layers():
    net = Tied()
    table = net.shared.pytree[0].weight
    i = jnp.array(3)
    names = ["shared.pytree.0", "shared.pytree.1"]
    _, outputs = adapter.capture(net, i, layers=names)
    assert_outputs(outputs, {names[0]: table[3], names[1]: table @ table[3]})


class Jitted(eqx.Module):
    """Two layers that the same jitted method calls."""

    a: "Inner"
    b: "Inner"

    def __call__(self, x):
        return self.b(self.a(x))


class Inner(eqx.Module):
    layer: nn.Linear

    @eqx.filter_jit
    def __call__(self, x):
        return self.layer(x)


def test_modules_under_one_jitted_method_are_told_apart():
    net = Jitted(*(Inner(nn.Linear(4, 4, key=k)) for k in jax.random.split(KEY)))
    net(X[0])  # traced without marks
    first = dense(net.a.layer, X[0])
    second = dense(net.b.layer, first)
    expected = {"a.layer": first, "b.layer": second, "b": second}
    assert_outputs(adapter.capture(net, X[0], layers=list(expected))[1], expected)
    np.testing.assert_allclose(net(X[0]), second, rtol=1e-5)


class Branches(eqx.Module):
    layer: nn.Linear

    def __call__(self, x):
        return jax.lax.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: x, x)


def test_errors():
    net = Net()
    with pytest.raises(ValueError, match=r"layer 'layer' is called inside jax\.lax\.cond"):
        adapter.capture(Branches(nn.Linear(4, 4, key=KEY)), X[0], layers=["layer"])
    with pytest.raises(ValueError, match="no layer 'frist'; nearest: 'first'"):
        adapter.capture(net, X[0], layers=["frist"])
    with pytest.raises(ValueError, match=r"layer 'rest\.1\.last' is never called"):
        adapter.capture(net, X[0], layers=["first", "rest.1.last"], method="encode")
    with pytest.raises(TypeError, match="layers must list layer names"):
        adapter.capture(net, X[0], layers=net)
    with pytest.raises(TypeError, match=r"model must be an equinox\.Module"):
        adapter.capture(X, X, layers=["first"])
