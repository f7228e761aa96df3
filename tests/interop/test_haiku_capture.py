"""Outputs of Haiku layers; every expected output is computed by hand from the parameters."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purepruning_interop import haiku as adapter
from tests.fast import some_key
from tests.interop.capture import assert_outputs

pytestmark = pytest.mark.usefixtures("unoptimized")

KEY = some_key(0)
X = jnp.array([[1.0, -2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 2.0]])


def dense(params, x):
    return x @ params["w"] + params["b"][None]


def net(x):
    return hk.Linear(2, name="last")(hk.nets.MLP([3], activate_final=True)(x))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("key", [True, False])
def test_outputs_are_those_before_the_activation(key, wrap):
    model = hk.transform(net) if key else hk.without_apply_rng(hk.transform(net))
    params = model.init(KEY, X)
    function = wrap(lambda p, x: adapter.capture(model, p, x, layers=adapter.layers(model, p, x)))
    y, outputs = function(params, X)
    first = dense(params["mlp/~/linear_0"], X)
    last = dense(params["last"], jax.nn.relu(first))
    assert_outputs(outputs, {"mlp.linear_0": first, "last": last})
    np.testing.assert_allclose(y, last, rtol=1e-5)


def test_vmap_over_parameters_and_gradient():
    model = hk.transform(net)
    several = [model.init(k, X) for k in jax.random.split(KEY)]
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *several)

    def first(params):
        return adapter.capture(model, params, X, layers=["mlp.linear_0"])[1]

    expected = jnp.stack([dense(p["mlp/~/linear_0"], X) for p in several])
    assert_outputs(jax.vmap(first)(stacked), {"mlp.linear_0": expected})
    grads = jax.grad(lambda p: jnp.sum(first(p)["mlp.linear_0"] ** 2))(several[0])
    np.testing.assert_allclose(grads["mlp/~/linear_0"]["w"], 2 * X.T @ expected[0], rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")  # Haiku's moving average needs it
def test_state_and_key_are_passed_on():
    def normed(x):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(3)(x), is_training=True)
        return x + jax.random.normal(hk.next_rng_key(), x.shape)

    model = hk.transform_with_state(normed)
    params, state = model.init(KEY, X)
    names = ["linear", "batch_norm"]
    variables = {"params": params, "state": state}
    (y, new), outputs = adapter.capture(model, variables, X, layers=names, rng=KEY)
    first = np.asarray(dense(params["linear"], X))
    norm = (first - first.mean(0)) / np.sqrt(first.var(0) + 1e-5)
    assert_outputs(outputs, {"linear": first, "batch_norm": norm}, rtol=1e-4)
    expected, _ = model.apply(params, state, KEY, X)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    average = new["batch_norm/~/mean_ema"]["average"]
    np.testing.assert_allclose(average, first.mean(0)[None], rtol=1e-4)


def steps_by_hand(params, x, n):
    found = []
    for i in range(n):
        found.append(dense(jax.tree.map(lambda p, i=i: p[i], params), x))
        x = jax.nn.relu(found[-1])
    return jnp.stack(found)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("remat", [False, True])
def test_layer_stack_and_remat_stack_the_outputs(remat, wrap):
    """The layer outside the stack has the name that the one inside has there."""

    def stack(x):
        def layer(x):
            linear = hk.Linear(4)
            return jax.nn.relu(hk.remat(linear)(x) if remat else linear(x))

        return hk.layer_stack(3, name="stack")(layer)(hk.Linear(4)(x))

    model = hk.transform(stack)
    params = model.init(KEY, X)
    names = ["linear", "stack.linear"]
    _, outputs = wrap(lambda p: adapter.capture(model, p, X, layers=names))(params)
    first = dense(params["linear"], X)
    steps = steps_by_hand(params["stack/linear"], first, 3)
    assert_outputs(outputs, {"linear": first, "stack.linear": steps})
    _, outputs = adapter.capture(model, params, X, layers=["linear"])
    assert_outputs(outputs, {"linear": first})


def test_lifted_members_have_the_copies_on_a_leading_axis():
    def ensemble(x):
        member = hk.transform(lambda x: hk.Linear(3)(x))
        make = hk.lift(jax.vmap(member.init, in_axes=(0, None), out_axes=-1), name="members")
        params = make(hk.next_rng_keys(5) if hk.running_init() else None, x)
        return jax.vmap(member.apply, in_axes=(-1, None, None), out_axes=1)(params, None, x)

    model = hk.transform(ensemble)
    params = model.init(KEY, X)
    y, outputs = adapter.capture(model, params, X, layers=["members.linear"])
    assert y.shape == (2, 5, 3)
    p = params["members/linear"]
    expected = jnp.einsum("bi,ick->kbc", X, p["w"]) + p["b"].T[:, None]
    assert_outputs(outputs, {"members.linear": expected})


def test_layer_called_twice_and_custom_getters_of_the_model():
    def twice(x):
        def halve(next_getter, value, context):
            return next_getter(value / 2)

        layer = hk.Linear(4, name="layer")
        with hk.custom_getter(halve):
            x = layer(x)
        return layer(x)

    model = hk.transform(twice)
    params = model.init(KEY, X)
    _, outputs = adapter.capture(model, params, X, layers=["layer", "layer.w"])
    first = dense(jax.tree.map(lambda p: p / 2, params["layer"]), X)
    expected = [first, dense(params["layer"], first)]
    assert_outputs(outputs, {"layer": expected, "layer.w": expected})


def test_recurrent_core_is_stacked_over_time():
    def recurrent(x):
        core = hk.VanillaRNN(3)
        return hk.dynamic_unroll(core, x, core.initial_state(2))[0]

    model = hk.transform(recurrent)
    x = jnp.ones((5, 2, 4))
    params = model.init(KEY, x)
    _, outputs = adapter.capture(model, params, x, layers=["vanilla_rnn.linear"])
    inputs = dense(params["vanilla_rnn/linear"], x[0])
    assert_outputs(outputs, {"vanilla_rnn.linear": jnp.stack([inputs] * 5)})


def test_errors():
    model = hk.transform(net)
    params = model.init(KEY, X)
    with pytest.raises(ValueError, match="no layer 'lst'; nearest: 'last'"):
        adapter.capture(model, params, X, layers=["lst"])
    with pytest.raises(ValueError, match="layer 'more' is never called in this forward pass"):
        adapter.capture(model, {**params, "more": params["last"]}, X, layers=["more"])
    with pytest.raises(TypeError, match="layers must list layer names"):
        adapter.capture(model, params, X, layers="last")
    with pytest.raises(TypeError, match=r"model must be what hk\.transform returns"):
        adapter.capture(net, params, X, layers=["last"])
    with pytest.raises(TypeError, match="variables must be what"):
        adapter.capture(model, [params], X, layers=["last"])
    with pytest.raises(TypeError, match="takes no state, but one was passed"):
        adapter.capture(model, {"params": params, "state": {}}, X, layers=["last"])
    with pytest.raises(TypeError, match="takes no rng, but one was passed"):
        adapter.capture(hk.without_apply_rng(model), params, X, layers=["last"], rng=KEY)
    with pytest.raises(TypeError, match="has a state; pass variables as"):
        adapter.capture(hk.transform_with_state(net), params, X, layers=["last"])


def test_parameter_of_no_module_and_branch():
    def free(x):
        w = hk.get_parameter("w", (4, 4), init=jnp.ones)
        linear = hk.Linear(4)
        if hk.running_init():
            return linear(x)
        return hk.cond(x.sum() > 0, linear, lambda x: x, x @ w)

    model = hk.transform(free)
    params = model.init(KEY, X)
    with pytest.raises(ValueError, match="layer 'w' is never called"):
        adapter.capture(model, params, X, layers=["w"])
    with pytest.raises(ValueError, match=r"layer 'linear' is called inside jax\.lax\.cond"):
        adapter.capture(model, params, X, layers=["linear"])
