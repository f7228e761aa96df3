"""Outputs of NNX layers; every expected output is computed by hand from the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from purepruning_interop import nnx as adapter
from tests.fast import some_key
from tests.interop.capture import assert_outputs

pytestmark = pytest.mark.usefixtures("unoptimized")

X = jnp.array([[1.0, -2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 2.0]])


def dense(layer, x):
    return x @ layer.kernel[...] + layer.bias[...][None]


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(some_key(seed))
        self.first = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(nnx.relu(self.first(x)))))

    def encode(self, x):
        return self.first(x)


def numbers(model):
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
    return jax.tree.map(np.array, state)


def normed(x):
    x = np.maximum(x, 0)
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_outputs_are_those_before_the_activation(jit):
    net = Net()
    net.eval()

    def function(net, x):
        return adapter.capture(net, x, layers=adapter.layers(net))

    y, outputs = (nnx.jit(function) if jit else function)(net, X)
    first = dense(net.first, X)
    norm = nnx.relu(first) / np.sqrt(1 + 1e-5)
    assert_outputs(outputs, {"first": first, "norm": norm, "last": dense(net.last, norm)})
    np.testing.assert_allclose(y, net(X), rtol=1e-6)


def modules(net):
    return [node for _, node in nnx.iter_graph(net) if isinstance(node, nnx.Module)]


def test_nothing_of_the_call_is_seen_in_the_model():
    net = Net()
    before, classes = numbers(net), [type(m) for m in modules(net)]
    _, outputs = adapter.capture(net, X, layers=["norm", "first"])
    assert_outputs(
        outputs, {"first": dense(net.first, X), "norm": normed(np.asarray(dense(net.first, X)))}
    )
    jax.tree.map(np.testing.assert_array_equal, before, numbers(net))
    assert [type(m) for m in modules(net)] == classes
    assert not any("purepruning" in name for m in modules(net) for name in vars(m))


def test_state_is_returned_where_asked_for():
    net, twin = Net(), Net()
    (y, state), _ = adapter.capture(net, X, layers=["first"], mutable=nnx.Any(nnx.BatchStat))
    x = np.maximum(dense(net.first, X), 0)
    np.testing.assert_allclose(state["norm"]["mean"][...], 0.01 * x.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(net.norm.mean[...], np.zeros(3))
    nnx.update(net, state)
    np.testing.assert_allclose(y, twin(X), rtol=1e-6)
    np.testing.assert_allclose(net.norm.mean[...], twin.norm.mean[...], rtol=1e-6)


def test_under_jax_jit_with_split_and_merge_and_vmap_over_stacked_parameters():
    nets = [Net(0), Net(1)]
    graphdef, params, rest = nnx.split(nets[0], nnx.Param, ...)
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *(nnx.state(n, nnx.Param) for n in nets))

    def function(params):
        return adapter.capture(nnx.merge(graphdef, params, rest), X, layers=["first"])[1]

    assert_outputs(jax.jit(function)(params), {"first": dense(nets[0].first, X)})
    expected = jnp.stack([dense(n.first, X) for n in nets])
    assert_outputs(jax.jit(jax.vmap(function))(stacked), {"first": expected})


def test_gradient_equals_the_one_by_hand():
    net = Net()

    def loss(net):
        return jnp.sum(adapter.capture(net, X, layers=["first"])[1]["first"] ** 2)

    grads = nnx.grad(loss)(net)
    y = dense(net.first, X)
    np.testing.assert_allclose(grads["first"]["kernel"][...], 2 * X.T @ y, rtol=1e-5)
    np.testing.assert_array_equal(grads["last"]["kernel"][...], np.zeros((3, 2)))


class Scanned(nnx.Module):
    def __init__(self, remat):
        self.remat = remat

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.steps = make(nnx.Rngs(some_key()))

    def __call__(self, x):
        def step(x, layer):
            return nnx.relu(layer(x))

        step = nnx.remat(step) if self.remat else step
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.steps)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_scan_and_remat_stack_the_outputs(jit, remat):
    net = Scanned(remat)

    def function(net, x):
        return adapter.capture(net, x, layers=adapter.layers(net))

    _, outputs = (nnx.jit(function) if jit else function)(net, X)
    x, expected = X, []
    for kernel, bias in zip(net.steps.kernel[...], net.steps.bias[...], strict=True):
        expected.append(x @ kernel + bias[None])
        x = nnx.relu(expected[-1])
    assert_outputs(outputs, {"steps": jnp.stack(expected)})


class Shared(nnx.Module):
    def __init__(self):
        self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(some_key()))
        self.b = self.a

    def __call__(self, x):
        return self.b(self.a(x))


def test_shared_module_gives_the_list_of_its_outputs_under_each_name():
    net = Shared()
    _, outputs = adapter.capture(net, X, layers=["b", "a", "a.kernel"])
    first = dense(net.a, X)
    expected = [first, dense(net.a, first)]
    assert_outputs(outputs, {"a": expected, "b": expected, "a.kernel": expected})


class Jitted(nnx.Module):
    """Two layers that the same jitted function calls."""

    def __init__(self):
        self.a, self.b = (nnx.Linear(4, 4, rngs=nnx.Rngs(some_key(i))) for i in range(2))

    def __call__(self, x):
        return self.apply(self.b, self.apply(self.a, x))

    @staticmethod
    @nnx.jit
    def apply(layer, x):
        return layer(x)


def test_modules_under_one_jitted_function_are_told_apart():
    net = Jitted()
    net(X)  # traced without marks
    first = dense(net.a, X)
    expected = {"a": first, "b": dense(net.b, first)}
    assert_outputs(adapter.capture(net, X, layers=["a", "b"])[1], expected)
    assert_outputs(adapter.capture(net, X, layers=["b"])[1], {"b": expected["b"]})
    np.testing.assert_allclose(net(X), expected["b"], rtol=1e-5)


class NoPytree(nnx.Module, pytree=False):
    def __init__(self):
        self.layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(some_key()))]

    def __call__(self, x):
        return self.layers[0](x)


def test_module_that_is_no_pytree():
    net = NoPytree()
    _, outputs = adapter.capture(net, X, layers=["layers.0", ""])
    y = dense(net.layers[0], X)
    assert_outputs(outputs, {"layers.0": y, "": y})


@pytest.mark.parametrize("method", ["encode", Net.encode, lambda net, x: net.encode(x)])
def test_method_and_what_it_does_not_reach(method):
    net = Net()
    _, outputs = adapter.capture(net, X, layers=["first"], method=method)
    assert_outputs(outputs, {"first": dense(net.first, X)})
    with pytest.raises(ValueError, match="layer 'last' is never called in this forward pass"):
        adapter.capture(net, X, layers=["first", "last"], method=method)


class Branches(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(some_key()))

    def __call__(self, x):
        return nnx.cond(x.sum() > 0, lambda m, x: m.layer(x), lambda m, x: x, self, x)


def test_errors():
    with pytest.raises(ValueError, match=r"layer 'layer' is called inside jax\.lax\.cond"):
        adapter.capture(Branches(), X, layers=["layer"])
    with pytest.raises(ValueError, match="no layer 'frist'; nearest: 'first'"):
        adapter.capture(Net(), X, layers=["frist"])
    with pytest.raises(TypeError, match="layers must list layer names"):
        adapter.capture(Net(), X, layers="first")
    with pytest.raises(TypeError, match=r"must be a flax\.nnx\.Module instance, got GraphDef"):
        adapter.capture(nnx.split(Net())[0], X, layers=["first"])
