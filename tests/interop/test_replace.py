"""Functions at what layers read and put out, in all adapters."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

from purepruning_interop import equinox, haiku, linen
from purepruning_interop import nnx as ppn
from purepruning_interop import torch as ppt
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("unoptimized")

#: y = relu(x A) B, where the second layer is called twice if ``twice``.
A = np.array([[1.0, -2.0], [0.5, 3.0]], np.float32)
B = np.array([[2.0, 1.0], [-1.0, 0.25]], np.float32)
X = np.array([[1.0, 2.0], [-3.0, 0.5]], np.float32)


class Linen(nn.Module):
    twice: bool = False

    @nn.compact
    def __call__(self, x):
        last = nn.Dense(2, use_bias=False, name="last")
        y = last(nn.relu(nn.Dense(2, use_bias=False, name="first")(x)))
        return last(y) if self.twice else y


class Nnx(nnx.Module):
    def __init__(self, twice):
        self.first = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.twice = twice

    def __call__(self, x):
        y = self.last(nnx.relu(self.first(x)))
        return self.last(y) if self.twice else y


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear
    twice: bool

    def __call__(self, x):
        y = jax.vmap(self.last)(jax.nn.relu(jax.vmap(self.first)(x)))
        return jax.vmap(self.last)(y) if self.twice else y


class Torch(torch.nn.Module):
    def __init__(self, twice):
        super().__init__()
        self.first = torch.nn.Linear(2, 2, bias=False)
        self.relu1 = torch.nn.ReLU(inplace=True)
        self.last = torch.nn.Linear(2, 2, bias=False)
        self.twice = twice

    def forward(self, x):
        y = self.last(self.relu1(self.first(x)))
        return self.last(y) if self.twice else y


def haiku_net(x, twice=False):
    last = hk.Linear(2, with_bias=False, name="last")
    y = last(jax.nn.relu(hk.Linear(2, with_bias=False, name="first")(x)))
    return last(y) if twice else y


def of_linen(twice):
    model = Linen(twice)
    params = {"first": {"kernel": jnp.asarray(A)}, "last": {"kernel": jnp.asarray(B)}}
    return params, lambda p, x, at: linen.replace(model, p, x, at=at)


def of_haiku(twice):
    model = hk.without_apply_rng(hk.transform(haiku_net))
    params = {"first": {"w": jnp.asarray(A)}, "last": {"w": jnp.asarray(B)}}
    return params, lambda p, x, at: haiku.replace(model, p, x, at=at, twice=twice)


def of_nnx(twice):
    model = Nnx(twice)
    model.first.kernel[...], model.last.kernel[...] = jnp.asarray(A), jnp.asarray(B)
    graphdef, params = nnx.split(model)
    return params, lambda p, x, at: ppn.replace(nnx.merge(graphdef, p), x, at=at)


def of_equinox(twice):
    one, two = (eqx.nn.Linear(2, 2, use_bias=False, key=jax.random.key(0)) for _ in range(2))
    first = eqx.tree_at(lambda m: m.weight, one, jnp.asarray(A.T))
    last = eqx.tree_at(lambda m: m.weight, two, jnp.asarray(B.T))
    params, static = eqx.partition(Equinox(first, last, twice), eqx.is_array)
    return params, lambda p, x, at: equinox.replace(eqx.combine(p, static), x, at=at)


def of_torch(twice):
    model = Torch(twice)
    params = {"first.weight": torch.tensor(A.T), "last.weight": torch.tensor(B.T)}
    return params, lambda p, x, at: ppt.replace(model, torch.as_tensor(x), at=at, params=p)


MAKERS = {
    f.__name__.removeprefix("of_"): f for f in (of_linen, of_haiku, of_nnx, of_equinox, of_torch)
}
adapters = pytest.mark.parametrize("adapter", MAKERS)
jax_adapters = pytest.mark.parametrize("adapter", [name for name in MAKERS if name != "torch"])


def at(scale=1.0):
    """Functions at every kind of site; they find what they are given."""
    return {
        "first:input": lambda x: (2 * scale * x, x),
        "first:output": lambda x: (x + 1, x),
        "relu1:output": lambda x: (-x, x),
        "last:input": lambda x: (x - 0.5, x),
        "last:output": lambda x: (10 * x, x),
    }


def by_hand(scale=1.0):
    read = X @ A * 2 * scale
    relu = np.maximum(read + 1, 0)
    return 10 * (-relu - 0.5) @ B, {
        "first:input": X,
        "first:output": read,
        "relu1:output": relu,
        "last:input": -relu,
        "last:output": (-relu - 0.5) @ B,
    }


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for site, value in wanted.items():
        np.testing.assert_allclose(np.asarray(found[site]), value, rtol=1e-6, err_msg=site)


@adapters
def test_values_go_on_as_replaced_and_are_found_as_given(adapter):
    params, call = MAKERS[adapter](False)
    y, found = call(params, X, at())
    wanted, seen = by_hand()
    np.testing.assert_allclose(np.asarray(y), wanted, rtol=1e-6)
    assert_equal(found, seen)
    y, found = call(params, X, {})
    np.testing.assert_allclose(np.asarray(y), np.maximum(X @ A, 0) @ B, rtol=1e-6)
    assert found == {}


@adapters
def test_calls_of_one_layer_are_a_list(adapter):
    params, call = MAKERS[adapter](True)
    y, found = call(
        params, X, {"last:input": lambda x: (x + 1, x), "last:output": lambda y: (2 * y, ())}
    )
    first = np.maximum(X @ A, 0)
    second = 2 * (first + 1) @ B
    np.testing.assert_allclose(np.asarray(y), 2 * (second + 1) @ B, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found["last:input"][0]), first, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found["last:input"][1]), second, rtol=1e-6)
    assert found["last:output"] == [(), ()]


@jax_adapters
def test_under_jit_grad_and_vmap_with_traced_functions(adapter):
    params, call = MAKERS[adapter](False)

    def loss(scale, params, x):
        y, found = call(params, x, at(scale))
        return y.sum(), found

    (value, found), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(1.5, params, X)
    wanted, seen = by_hand(1.5)
    np.testing.assert_allclose(value, wanted.sum(), rtol=1e-5)
    assert_equal(found, seen)
    step = 1e-2
    difference = (by_hand(1.5 + step)[0].sum() - by_hand(1.5 - step)[0].sum()) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-3)
    scales = jnp.array([0.5, 1.5])
    values, _ = jax.vmap(loss, in_axes=(0, None, None))(scales, params, X)
    np.testing.assert_allclose(values, [by_hand(s)[0].sum() for s in (0.5, 1.5)], rtol=1e-5)


def test_torch_under_grad_and_vmap():
    params, call = of_torch(False)

    def loss(scale, x):
        return call(params, x, at(scale))[0].sum()

    scales = torch.tensor([0.5, 1.5])
    x = torch.tensor(X)
    slopes = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(scales, x)
    values = torch.func.vmap(loss, in_dims=(0, None))(scales, x)
    for scale, slope, value in zip(scales, slopes, values, strict=True):
        s, step = float(scale), 1e-2
        np.testing.assert_allclose(float(value), by_hand(s)[0].sum(), rtol=1e-5)
        difference = (by_hand(s + step)[0].sum() - by_hand(s - step)[0].sum()) / (2 * step)
        np.testing.assert_allclose(float(slope), difference, rtol=1e-3)


def test_torch_leaves_no_hook_behind():
    params, call = of_torch(False)
    with pytest.raises(ZeroDivisionError):
        call(params, X, {"last:input": lambda x: 1 / 0})
    y, _ = call(params, X, {})
    np.testing.assert_allclose(y, np.maximum(X @ A, 0) @ B, rtol=1e-6)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(cell, carry, _):
            return nn.relu(cell(carry)), None

        cell = nn.Dense(2, use_bias=False, name="cell")
        scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, length=3)
        y, _ = scan(cell, x, None)
        return nn.relu(y)


def test_inside_a_scan_once_for_every_step():
    params = {"cell": {"kernel": jnp.asarray(A)}}
    functions = {"cell:input": lambda x: (x + 1, x), "relu1:output": lambda x: (0.5 * x, x.max())}
    y, found = jax.jit(lambda p: linen.replace(Scanned(), p, X, at=functions))(params)
    h, seen, largest = X, [], []
    for _ in range(3):
        seen.append(h)
        h = np.maximum((h + 1) @ A, 0)
        largest.append(h.max())
        h = 0.5 * h
    np.testing.assert_allclose(y, h, rtol=1e-6)
    np.testing.assert_allclose(found["cell:input"], seen, rtol=1e-6)
    np.testing.assert_allclose(found["relu1:output"], largest, rtol=1e-6)
    rows = linen.activations(Scanned(), params, X)
    assert [row.name for row in rows] == ["relu1", "relu2"]


class Jitted(nn.Module):
    """Two blocks whose traces ``nn.jit`` shares, with an activation in each."""

    @nn.compact
    def __call__(self, x):
        block = nn.jit(Block)
        return block(name="b")(nn.relu6(block(name="a")(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(2, use_bias=False, name="d")(x))


def test_shared_traces_are_told_apart():
    params = {"a": {"d": {"kernel": jnp.asarray(A)}}, "b": {"d": {"kernel": jnp.asarray(B)}}}
    functions = {"b.d:input": lambda x: (x + 1, x), "relu2:output": lambda x: (-x, x)}
    y, _ = linen.replace(Jitted(), params, X, at=functions)
    middle = np.clip(np.maximum(X @ A, 0), 0, 6)
    np.testing.assert_allclose(y, -np.maximum((middle + 1) @ B, 0), rtol=1e-6)
    names = [row.name for row in linen.activations(Jitted(), params, X)]
    assert names == ["relu1", "relu6_1", "relu2"]


#: Arithmetic that is ``max(x, 0)``, or ``min(max(x, 0), 6)``, and whether it reads x in one place.
WRITTEN_OUT = {
    "jnp.maximum(x, 0)": (lambda x: jnp.maximum(x, 0), "relu1", True),
    "jnp.maximum(0.0, x)": (lambda x: jnp.maximum(0.0, x), "relu1", True),
    "lax.max": (lambda x: jax.lax.max(x, jnp.zeros_like(x)), "relu1", True),
    "jnp.clip(x, 0)": (lambda x: jnp.clip(x, 0), "relu1", True),
    "jnp.clip(x, 0, 6)": (lambda x: jnp.clip(x, 0, 6), "relu6_1", True),
    "lax.clamp": (lambda x: jax.lax.clamp(0.0, x, 6.0), "relu6_1", True),
    "x * (x > 0)": (lambda x: x * (x > 0).astype(x.dtype), "relu1", False),
    "(x >= 0) * x": (lambda x: (x >= 0).astype(x.dtype) * x, "relu1", False),
    "jnp.where(x > 0, x, 0)": (lambda x: jnp.where(x > 0, x, 0), "relu1", False),
    "jnp.where(x < 0, 0, x)": (lambda x: jnp.where(x < 0, 0, x), "relu1", False),
    "lax.select": (lambda x: jax.lax.select(x > 0, x, jnp.zeros_like(x)), "relu1", False),
}


class WrittenOut(nn.Module):
    function: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, use_bias=False, name="last")(self.function(x))


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_relus_that_are_written_out_are_sites(name):
    function, site, once = WRITTEN_OUT[name]
    model, params = WrittenOut(function), {"last": {"kernel": jnp.asarray(B)}}
    (row,) = linen.activations(model, params, X)
    assert (row.name, row.type) == (site, {"relu1": "ReLU", "relu6_1": "ReLU6"}[site])
    y, found = linen.replace(model, params, X, at={f"{site}:output": lambda x: (2 * x + 1, x)})
    np.testing.assert_array_equal(found[f"{site}:output"], np.maximum(X, 0))
    np.testing.assert_allclose(y, (2 * np.maximum(X, 0) + 1) @ B, rtol=1e-6)
    reads = {f"{site}:input": lambda x: (x + 1, x)}
    if once:
        y, found = jax.jit(lambda x: linen.replace(model, params, x, at=reads))(X)
        np.testing.assert_array_equal(found[f"{site}:input"], X)
        np.testing.assert_allclose(y, np.maximum(X + 1, 0) @ B, rtol=1e-6)
    else:
        with raises(ValueError, "'relu1' is written out", "write jax.nn.relu(x) in the model"):
            linen.replace(model, params, X, at=reads)


#: Ways to write a GELU, and near misses.
GELUS = {
    "jax.nn.gelu": jax.nn.gelu,
    "exact": lambda x: jax.nn.gelu(x, approximate=False),
    "erf": lambda x: x * 0.5 * (1.0 + jax.lax.erf(x / jnp.sqrt(2.0))),
    "half last": lambda x: 0.5 * (x * (1 + jax.lax.erf(x / 2**0.5))),
    "cubed": lambda x: 0.5 * x * (1 + jnp.tanh(0.7978845608 * (x + 0.044715 * x * x * x))),
    "halved": lambda x: x * (1 + jax.lax.erf(x * 0.70710678)) / 2,
}
NO_GELUS = {
    "tanh": lambda x: x * jnp.tanh(x),
    "twice": lambda x: x * (1 + jax.lax.erf(x / 2**0.5)),
    "other": lambda x: 0.5 * x * (1 + jax.lax.erf(x)),
    "of two": lambda x: 0.5 * x[::-1] * (1 + jax.lax.erf(x / 2**0.5)),
}


@pytest.mark.parametrize("name", GELUS)
def test_gelus_are_sites(name):
    def function(x):
        return 3 * GELUS[name](2 * x) + 1

    model, params = WrittenOut(function), {"last": {"kernel": jnp.asarray(B)}}
    rows = linen.activations(model, params, X)
    assert [(row.name, row.type) for row in rows] == [("gelu1", "GELU")]
    y, found = linen.replace(model, params, X, at={"gelu1:output": lambda x: (-x, x)})
    wanted = np.asarray(jax.nn.gelu(2 * X, approximate=False))
    np.testing.assert_allclose(found["gelu1:output"], wanted, atol=1e-3)
    np.testing.assert_allclose(y, (1 - 3 * wanted) @ B, rtol=1e-2, atol=1e-2)
    with raises(ValueError, "'gelu1' is written out", "the output of the layer that makes it"):
        linen.replace(model, params, X, at={"gelu1:input": lambda x: (x, x)})


@pytest.mark.parametrize("name", NO_GELUS)
def test_what_is_no_gelu(name):
    model, params = WrittenOut(NO_GELUS[name]), {"last": {"kernel": jnp.asarray(B)}}
    rows = linen.activations(model, params, X)
    assert [row.name for row in rows] == (["tanh1"] if name == "tanh" else [])


class Normed(nn.Module):
    """Norms, whose variances are kept from being negative, and a ReLU by name between others."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(jnp.maximum(nn.LayerNorm()(x), 0))
        x = nn.relu(nn.InstanceNorm()(x[..., None])[..., 0])
        return nn.RMSNorm()(jnp.maximum(x, 1)) * jnp.clip(x, 0, 3) + jnp.where(x > 1, x, 0)


def test_variances_and_other_bounds_are_no_activations():
    net = Normed()
    variables = net.init(jax.random.key(0), X)
    names = [row.name for row in linen.activations(net, variables, X, mutable=["batch_stats"])]
    assert names == ["relu1", "relu2"]
    norm = eqx.nn.LayerNorm(2)
    assert equinox.activations(norm, X[0]) == ()
    for name in ("clip", "maximum", "mul", "_where", "max"):  # functions of a model's own

        def own(x, *more):
            return x + jnp.maximum(x, 1)

        own.__name__ = name
        for more in ((), (0.0,), (0.0, 6.0)):
            called = WrittenOut(lambda x, own=own, more=more: jax.jit(own)(x, *more))
            assert linen.activations(called, {"last": {"kernel": jnp.asarray(B)}}, X) == ()
    integers = WrittenOut(lambda x: x[jnp.maximum(jnp.argmax(x, axis=0), 0)])
    assert linen.activations(integers, {"last": {"kernel": jnp.asarray(B)}}, X) == ()


@adapters
def test_what_is_wrong_is_named(adapter):
    params, call = MAKERS[adapter](False)
    with raises(TypeError, "replace(model", "at must map sites", "list"):
        call(params, X, [])
    for site in ("first", "first:weight", 3):
        with raises(ValueError, "replace(model", "':input' or ':output'", repr(site)):
            call(params, X, {site: lambda x: (x, x)})
    with raises(TypeError, "'first:input'", "must be a function"):
        call(params, X, {"first:input": 3})
    with raises(ValueError, "'frist'", "'first'"):
        call(params, X, {"frist:input": lambda x: (x, x)})
    with raises(TypeError, "'last:output'", "must return a pair", "got"):
        call(params, X, {"last:output": lambda x: x})


def test_variables_of_another_function_of_haiku():
    model = hk.transform(lambda x: hk.Linear(2, name="first")(x))
    with raises(ValueError, "replace(model", "variables are not those of this function", "'w'"):
        at = {"first:input": lambda x: (x, x)}
        haiku.replace(model, {"first": {"b": jnp.zeros(2)}}, X, at=at)


@jax_adapters
def test_other_shapes_and_activations_that_are_not_called(adapter):
    params, call = MAKERS[adapter](False)
    with raises(ValueError, "'first:output'", "of the same shapes and dtypes"):
        call(params, X, {"first:output": lambda x: (x[..., :1], x)})
    rule = "{'op_names': ['relu2', 'relu3'], 'quant_types': ['output'], 'exclude': True}"
    with raises(ValueError, "layer 'relu2' is never called", "nor is 'relu3'", rule):
        call(params, X, {f"relu{n}:output": lambda x: (x, x) for n in (1, 2, 3)})
