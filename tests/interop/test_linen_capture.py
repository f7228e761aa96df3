"""Outputs of Linen layers; every expected output is computed by hand from the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

from purepruning_interop import linen
from tests.fast import some_key
from tests.interop.capture import assert_outputs

pytestmark = pytest.mark.usefixtures("unoptimized")

X = jnp.array([[1.0, -2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 2.0]])


def init(module, *inputs):
    return module.init({"params": some_key(0), "dropout": some_key(1)}, *inputs)


def dense(params, x):
    return x @ params["kernel"] + params["bias"][None]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(3, name="first")(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(2, name="last")(x)


@pytest.mark.parametrize("jit", [False, True])
def test_outputs_are_those_before_the_activation(jit):
    net = Net()
    variables = init(net, X)
    params = variables["params"]

    def function(variables, x):
        return linen.capture(net, variables, x, layers=linen.layers(net, variables, x))

    y, outputs = (jax.jit(function) if jit else function)(variables, X)
    first = dense(params["first"], X)
    norm = nn.relu(first) / np.sqrt(1 + 1e-5)
    assert_outputs(outputs, {"first": first, "norm": norm, "last": dense(params["last"], norm)})
    np.testing.assert_allclose(y, net.apply(variables, X), rtol=1e-6)


def test_only_what_is_asked_for_in_the_order_asked():
    net = Net()
    variables = init(net, X)
    _, outputs = linen.capture(net, variables, X, layers=["last", "first", "last"])
    assert list(outputs) == ["last", "first"]


@pytest.mark.parametrize("form", [lambda v: v, freeze, lambda v: v["params"]])
def test_forms_of_variables(form):
    net = nn.Sequential([nn.Dense(3), nn.relu])
    variables = init(net, X)
    _, outputs = linen.capture(net, form(variables), X, layers=["layers_0"])
    assert_outputs(outputs, {"layers_0": dense(variables["params"]["layers_0"], X)})


def test_updated_collections_are_returned_and_arguments_left_alone():
    net = Net()
    variables = init(net, X)
    before = jax.tree.map(np.array, variables)
    (y, updated), outputs = linen.capture(
        net,
        variables,
        X,
        train=True,
        layers=["norm", "first"],
        mutable=["batch_stats"],
        rngs={"dropout": some_key(7)},
    )
    x = np.maximum(dense(variables["params"]["first"], X), 0)
    mean, var = x.mean(0), x.var(0)
    normed = (x - mean) / np.sqrt(var + 1e-5)
    assert_outputs(outputs, {"first": dense(variables["params"]["first"], X), "norm": normed})
    stats = updated["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], 0.01 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.99 + 0.01 * var, rtol=1e-5)
    expected, _ = net.apply(
        variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": some_key(7)}
    )
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, before, variables)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(4)(x)), None


class Scanned(nn.Module):
    """The steps' parameters stand on ``axis``; optionally rematerialised."""

    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        step = nn.remat(Step) if self.remat else Step
        scan = nn.scan(
            step, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return scan(name="steps")(x, None)[0]


def scanned_by_hand(params, axis, x):
    found = []
    for i in range(3):
        one = jax.tree.map(lambda p, i=i: jnp.take(p, i, axis=axis), params["steps"]["Dense_0"])
        found.append(dense(one, x))
        x = nn.relu(found[-1])
    return jnp.stack(found)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_scan_and_remat_stack_the_outputs(axis, remat, jit):
    net = Scanned(axis, remat)
    variables = init(net, X)

    def function(variables):
        return linen.capture(net, variables, X, layers=linen.layers(net, variables, X))

    y, outputs = (jax.jit(function) if jit else function)(variables)
    expected = scanned_by_hand(variables["params"], axis, X)
    assert_outputs(outputs, {"steps.Dense_0": expected})
    np.testing.assert_allclose(y, nn.relu(expected[-1]), rtol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_through_scanned_outputs_equals_the_one_by_hand(remat):
    net = Scanned(remat=remat)
    params = init(net, X)["params"]

    def loss(params):
        _, outputs = linen.capture(net, params, X, layers=["steps.Dense_0"])
        return jnp.sum(outputs["steps.Dense_0"] ** 2)

    found = jax.grad(loss)(params)
    expected = jax.grad(lambda params: jnp.sum(scanned_by_hand(params, 0, X) ** 2))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


def test_scanned_and_remat_modules_themselves():
    """Of a lifted class the module inside counts: what a step returned, not what the scan did."""
    net = Scanned()
    variables = init(net, X)
    _, outputs = linen.capture(net, variables, X, layers=["steps"])
    carry, nothing = outputs["steps"]
    np.testing.assert_allclose(
        carry, nn.relu(scanned_by_hand(variables["params"], 0, X)), rtol=1e-6
    )
    assert nothing is None


class Broadcast(nn.Module):
    """A layer in a scan whose input is the same at every step: Flax computes it once, outside."""

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, carry, x):
                return carry + nn.Dense(4)(x), None

        scan = nn.scan(
            Body,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=nn.broadcast,
            length=3,
        )
        return scan(name="steps")(x, x)[0]


def test_layer_that_does_not_depend_on_the_loop_is_one_call_per_step():
    net = Broadcast()
    variables = init(net, X)
    _, outputs = linen.capture(net, variables, X, layers=["steps.Dense_0"])
    y = dense(variables["params"]["steps"]["Dense_0"], X)
    assert_outputs(outputs, {"steps.Dense_0": jnp.stack([y, y, y])})


class Jitted(nn.Module):
    """Modules that nn.jit cannot tell apart, one of them called twice."""

    @nn.compact
    def __call__(self, x):
        make = nn.jit(nn.Dense)
        a, b = make(4, name="a"), make(4, name="b")
        return b(a(a(x)))


def test_modules_under_one_trace_are_told_apart():
    net = Jitted()
    variables = init(net, X)
    p = variables["params"]
    net.apply(variables, X)  # traced without marks
    first = dense(p["a"], X)
    second = dense(p["a"], first)
    expected = {"a": [first, second], "b": dense(p["b"], second)}
    _, outputs = linen.capture(net, variables, X, layers=["a", "b"])
    assert_outputs(outputs, expected)
    for name in ("a", "b"):
        _, outputs = linen.capture(net, variables, X, layers=[name])
        assert_outputs(outputs, {name: expected[name]})
    np.testing.assert_allclose(net.apply(variables, X), expected["b"], rtol=1e-5)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        return Inside(layer)(layer(x))


class Inside(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


def test_shared_module_gives_the_list_of_its_outputs():
    net = Shared()
    variables = init(net, X)
    _, outputs = linen.capture(net, variables, X, layers=["layer"])
    first = dense(variables["params"]["layer"], X)
    assert_outputs(outputs, {"layer": [first, dense(variables["params"]["layer"], first)]})


def test_vmapped_layer_has_the_copies_on_a_leading_axis():
    net = nn.vmap(
        nn.Dense,
        variable_axes={"params": 1},
        split_rngs={"params": True},
        in_axes=None,
        out_axes=2,
        axis_size=5,
    )(3)
    variables = init(net, X)
    p = variables["params"]
    y, outputs = linen.capture(net, variables, X, layers=["kernel"])  # of the root
    assert y.shape == (2, 3, 5)
    expected = jnp.einsum("bi,ick->cbk", X, p["kernel"]) + p["bias"].T[:, None]
    assert_outputs(outputs, {"kernel": expected})


def test_vmap_over_stacked_parameters():
    net = Net()
    several = [init(net, X * k) for k in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    _, outputs = jax.vmap(lambda v: linen.capture(net, v, X, layers=["first"]))(stacked)
    assert_outputs(outputs, {"first": jnp.stack([dense(v["params"]["first"], X) for v in several])})


class Setup(nn.Module):
    def setup(self):
        self.used, self.idle = nn.Dense(4), nn.Dense(4)

    def __call__(self, x):
        return self.idle(self.used(x))

    def encode(self, x):
        return self.used(x)


def test_method_and_what_it_does_not_reach():
    net = Setup()
    variables = init(net, X)
    for method in ("encode", Setup.encode):
        _, outputs = linen.capture(net, variables, X, layers=["used"], method=method)
        assert_outputs(outputs, {"used": dense(variables["params"]["used"], X)})
    with pytest.raises(ValueError, match="layer 'idle' is never called in this forward pass"):
        linen.capture(net, variables, X, layers=["used", "idle"], method="encode")


def test_parts_of_an_optimized_lstm_cell_are_no_layers_that_are_called():
    net = nn.RNN(nn.OptimizedLSTMCell(3, name="cell"))
    x = jnp.ones((2, 5, 4))
    variables = init(net, x)
    (y, (_, outputs)) = (net.apply(variables, x), linen.capture(net, variables, x, layers=["cell"]))
    _, steps = outputs["cell"]
    np.testing.assert_allclose(jnp.moveaxis(steps, 0, 1), y, rtol=1e-6)
    with pytest.raises(ValueError, match=r"layer 'cell\.ii' is never called"):
        linen.capture(net, variables, x, layers=["cell.ii"])


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        if self.is_initializing():
            return layer(x)
        return nn.cond(x.sum() > 0, lambda m, x: layer(x), lambda m, x: x, self, x)


def test_branch_is_refused_with_the_layer_s_name():
    net = Branches()
    variables = init(net, X)
    with pytest.raises(ValueError, match=r"layer .layer. is called inside jax\.lax\.cond"):
        linen.capture(net, variables, X, layers=["layer"])


def test_parameterless_modules_have_names_too():
    net = Net()
    variables = init(net, X)
    _, outputs = linen.capture(net, variables, X, layers=["Dropout_0", "norm"])
    np.testing.assert_array_equal(outputs["Dropout_0"], outputs["norm"])


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["frist"], ValueError, "no layer 'frist'; nearest: 'first'"),
        (["first", "fi"], ValueError, "no layer 'fi'"),
        ("first", TypeError, "layers must list layer names"),
        ([0], TypeError, "layers must list layer names .*got 0"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_wrong_layers(layers, error, message):
    net = Net()
    with pytest.raises(error, match=message):
        linen.capture(net, init(net, X), X, layers=layers)


def test_wrong_arguments():
    net = Net()
    variables = init(net, X)
    with pytest.raises(TypeError, match=r"capture\(model, .*\): model must be"):
        linen.capture(Net, variables, X, layers=["first"])
    with pytest.raises(TypeError, match="do not fit Net"):
        linen.capture(net, variables, layers=["first"])


def test_no_tracer_is_left_behind():
    net = Scanned(remat=True)
    variables = init(net, X)
    with jax.checking_leaks():
        jax.jit(lambda v: linen.capture(net, v, X, layers=["steps.Dense_0"]))(variables)
