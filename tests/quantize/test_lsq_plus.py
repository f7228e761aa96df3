"""LSQ+: first scales, gradients of scales and offsets, training, and whole zero points."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import purepruning as pp
from purepruning.quantize import lsq, lsq_plus, observers
from purepruning.quantize.lsq_plus import TrainedScale
from purepruning.quantize.observers import Range
from purepruning_interop import linen
from purepruning_interop import torch as ppt
from tests.messages import raises
from tests.modes import as_jax, as_torch, moved

F = np.float32
RNG = np.random.default_rng(0)
W = np.array([[1, -2, 3.5], [0, 4, -1], [2, 2, 2], [-3, 0.3, 1]], F)
LAYERS = [pp.Layer("fc", "Linear", "fc.weight", (4, 3), out_axes=(0,), in_axes=(1,))]
RANGES = {"fc:input": Range(F(-0.3), F(2.7))}
BOTH = {"quant_types": ["weight", "input"], "quant_bits": 4, "op_types": ["Linear"]}
frameworks = pytest.mark.parametrize("framework", [dict, as_jax, as_torch])  # dict: NumPy's

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")  # of Adam


def config_of(**keys):
    return pp.resolve_quantization([BOTH | keys], LAYERS)


def oracle(x, s, beta, low, high, size):
    """The paper's value, and its derivatives by x, s and beta of ``sum(g x^)``, in float64."""
    steps = (x.astype(np.float64) - beta) / s
    inside = (steps >= low) & (steps <= high)
    whole = np.round(np.clip(steps, low, high))
    factor = 1 / np.sqrt(high * size)
    by_scale = np.where(inside, whole - steps, whole) * factor
    return whole * s + beta, inside, by_scale, ~inside * factor


@frameworks
def test_first_scales_by_hand(framework):
    scales = lsq_plus.init(
        framework({"fc.weight": W}),
        config_of(quant_scheme={"weight": "per_channel_symmetric", "input": "affine"}),
        moved(framework, RANGES),
    )
    mean, deviation = W.mean(1, keepdims=True), W.std(1, keepdims=True)
    ends = np.abs([mean - 3 * deviation, mean + 3 * deviation]).max(0)
    np.testing.assert_allclose(scales["fc:weight"].scale, ends / 8, rtol=1e-6)
    assert scales["fc:weight"].offset is None
    np.testing.assert_allclose(scales["fc:input"].scale, 3 / 15, rtol=1e-6)
    np.testing.assert_allclose(scales["fc:input"].offset, -0.3, rtol=1e-6)


@pytest.mark.parametrize(
    ("keys", "scale", "offset"),
    [
        ({"quant_dtype": "int"}, 3 / 15, -0.3 + 8 * 3 / 15),  # -8 to 7
        ({"quant_scheme": "symmetric"}, 2.7 / 7, None),
        ({"quant_scheme": "symmetric", "quant_dtype": "uint"}, 2.7 / 15, None),
        ({"quant_bits": 1, "quant_dtype": "uint"}, 3, -0.3),
    ],
)
def test_first_scales_of_activations(keys, scale, offset):
    found = lsq_plus.init({"fc.weight": W}, config_of(**keys), RANGES)["fc:input"]
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
    assert (found.offset is None) is (offset is None)
    if offset is not None:
        np.testing.assert_allclose(found.offset, offset, rtol=1e-6)


@pytest.mark.parametrize("module", [lsq, lsq_plus])
def test_first_scales_are_leaves_for_the_optimizer(module):
    params = {"fc.weight": torch.nn.Parameter(torch.tensor(W))}
    rule = BOTH | {"quant_types": ["weight"]}
    scales = module.init(params, pp.resolve_quantization([rule], LAYERS))
    assert not any(x.requires_grad for x in jax.tree.leaves(scales))


def test_what_has_no_range_has_scale_one():
    still = {"fc:input": Range(F(0), F(0))}
    scales = lsq_plus.init({"fc.weight": 0 * W}, config_of(), still)
    assert [float(x) for x in (scales["fc:weight"].scale[0, 0], *scales["fc:input"])] == [1, 1, 0]


@pytest.mark.parametrize("beta", [-0.55, 0.0, 0.35])
def test_gradients_are_those_of_the_paper_in_both_frameworks(beta):
    x = np.array([-3, -0.6, -0.1, 0, 0.2, 1.3, 2.24, 9, 1e6], F)
    g = RNG.normal(size=x.shape).astype(F)
    s, beta, low, high = F(0.25), F(beta), 0, 15
    value, by_x, by_scale, by_offset = oracle(x, s, beta, low, high, x.size)
    wanted = [g * by_x, (g * by_scale).sum(), (g * by_offset).sum()]
    assert abs(wanted[2]) > 0.01  # some are clipped

    def loss(x, s, beta, g):
        return (lsq_plus.quantize(x, s, beta, low, high, x.shape[0]) * g).sum()

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, s, beta, g)
    tensors = [torch.tensor(a) for a in (x, s, beta, g)]
    by_torch = torch.func.grad(loss, argnums=(0, 1, 2))(*tensors)
    for name, grads in (("jax", found), ("torch", by_torch)):
        for a, b in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(a), b, rtol=2e-5, atol=1e-6, err_msg=name)
    for array in (x, jnp.asarray(x), torch.tensor(x)):
        same = array * 0 + 1
        got = lsq_plus.quantize(array, same[0] * s, same[0] * beta, low, high, x.size)
        np.testing.assert_allclose(np.asarray(got), value, rtol=1e-6, atol=1e-7)


def test_without_an_offset_it_is_lsq():
    x, s = jnp.asarray(RNG.normal(size=50).astype(F)), jnp.float32(0.2)

    def both(quantize):
        def loss(x, s):
            return jnp.sum(jnp.sin(quantize(x, s)))

        return jax.value_and_grad(loss, argnums=(0, 1))(x, s)

    with_none = both(lambda x, s: lsq_plus.quantize(x, s, None, -4, 3, 50))
    wanted = both(lambda x, s: lsq.quantize(x, s, -4, 3, 50))
    jax.tree.map(np.testing.assert_array_equal, with_none, wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_nan(dtype):
    x = jnp.asarray([-1.0, 0.3, jnp.nan, jnp.inf], dtype)
    found = lsq_plus.quantize(x, jnp.float32(0.5), jnp.float32(-0.5), 0, 3, 4)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), [-0.5, 0.5, np.nan, 1.0])


# In a network whose activation is a Swish.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(nn.silu(nn.Dense(6, name="first")(x)))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 6)
        self.silu = torch.nn.SiLU()
        self.last = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.silu(self.first(x)))


A, B = RNG.normal(size=(6, 4)).astype(F), RNG.normal(size=(3, 6)).astype(F)
X, Y = RNG.normal(size=(32, 4)).astype(F), RNG.normal(size=(32, 3)).astype(F)
FLAX = {
    "first": {"kernel": jnp.asarray(A.T), "bias": jnp.zeros(6)},
    "last": {"kernel": jnp.asarray(B.T), "bias": jnp.zeros(3)},
}
RULES = [
    {"quant_types": ["weight"], "quant_bits": 3, "op_types": ["Linear"]},
    {"quant_types": ["output"], "quant_bits": 3, "op_types": ["SiLU"]},
]


def by_flax():
    """Model, params, config and replace, and what ``quantized(trained, x)`` returns."""
    net = Net()
    tables = linen.layers(net, FLAX, X), linen.activations(net, FLAX, X)
    config = pp.resolve_quantization(RULES, *tables)
    return FLAX, config, lambda p, at: linen.replace(net, p, X, at=at)


def by_torch():
    net = TorchNet()
    params = {
        "first.weight": A,
        "last.weight": B,
        "first.bias": F([0] * 6),
        "last.bias": F([0] * 3),
    }
    params = as_torch(params)
    config = pp.resolve_quantization(RULES, ppt.layers(net), ppt.activations(net))
    x = torch.tensor(X)
    return params, config, lambda p, at: ppt.replace(net, x, at=at, params=p)


def begin(params, config, replace):
    state = observers.init(params, config)
    _, seen = replace(params, observers.watch(state, config))
    return lsq_plus.init(params, config, observers.ranges(observers.update(state, seen, config)))


def output(trained, config, replace):
    params, scales = trained
    at = lsq_plus.activations(scales, config)
    return replace(lsq_plus.weights(params, scales, config), at)[0]


def test_jax_is_torch_in_values_and_gradients():
    params, config, replace = by_flax()
    trained = params, begin(params, config, replace)
    (site,) = (t.site for t in config.activations)
    assert float(trained[1][site].offset) < -0.1
    wanted, grads = jax.value_and_grad(lambda t: (output(t, config, replace) * Y).sum())(trained)
    params, config, replace = by_torch()
    scales = begin(params, config, replace)
    leaves = [params, scales["first:weight"][0], scales["last:weight"][0], *scales["silu:output"]]
    for x in jax.tree.leaves(leaves):
        x.requires_grad_()
    loss = (output((params, scales), config, replace) * torch.tensor(Y)).sum()
    loss.backward()
    np.testing.assert_allclose(float(loss.detach()), float(wanted), rtol=1e-5)
    by_jax = [
        grads[0]["first"]["kernel"].T,
        grads[0]["last"]["kernel"].T,
        grads[1]["first:weight"].scale.T,
        grads[1]["last:weight"].scale.T,
        *grads[1][site],
    ]
    own = [params["first.weight"], params["last.weight"], *leaves[1:]]
    for a, b in zip(by_jax, own, strict=True):
        assert np.abs(a).max() > 1e-4
        np.testing.assert_allclose(a, b.grad, rtol=2e-4, atol=1e-5)


def test_scales_and_offsets_train_in_one_scan():
    params, config, replace = by_flax()
    start = params, begin(params, config, replace)
    optimizer = optax.adam(0.01)

    def step(carry, _):
        trained, state = carry
        value, grads = jax.value_and_grad(
            lambda t: jnp.mean((output(t, config, replace) - Y) ** 2)
        )(trained)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(trained, updates), state), value

    (trained, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), length=60)
    assert losses[-1] < 0.8 * losses[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).min()), trained[1], start[1])
    assert all(x > 1e-3 for x in jax.tree.leaves(moved))


# Zero points.


def scale_at(offset, **keys):
    config = pp.resolve_quantization([BOTH | {"quant_types": ["input"]} | keys], LAYERS)
    return {"fc:input": TrainedScale(F(0.25), F(offset))}, config


@pytest.mark.parametrize(
    ("offset", "keys", "zero_point"),
    [
        (-0.6, {}, 2),  # 2.4 steps
        (-0.64, {}, 3),  # 2.56 steps
        (0.9, {}, 0),  # the range was all above zero
        (-99, {}, 15),
        (-0.6, {"quant_dtype": "int"}, 2),
        (1.1, {"quant_dtype": "int"}, -4),
    ],
)
def test_rounded_offsets_make_zero_a_level(offset, keys, zero_point):
    scales, config = scale_at(offset, **keys)
    with raises(ValueError, "lsq_plus.activation_levels", "'fc:input'", "lsq_plus.round_offsets"):
        lsq_plus.activation_levels(scales, config)
    rounded = lsq_plus.round_offsets(scales, config)
    levels = lsq_plus.activation_levels(rounded, config)["fc:input"]
    assert (float(levels.scale), levels.zero_point) == (0.25, zero_point)
    assert float(rounded["fc:input"].offset) == -0.25 * zero_point
    x = jnp.asarray(RNG.normal(size=1000).astype(F)).at[0].set(0)
    found = jax.jit(lambda x: lsq_plus.activations(rounded, config)["fc:input"](x)[0])(x)
    assert float(found[0]) == 0
    q = np.clip(np.round(np.asarray(x) / 0.25 + zero_point), levels.low, levels.high)
    np.testing.assert_allclose(found, 0.25 * (q - zero_point), atol=1e-6)
    # Once is enough.
    again = lsq_plus.round_offsets(rounded, config)
    assert again == rounded


def test_rounding_leaves_what_has_no_offset():
    config = config_of(quant_scheme="symmetric")
    scales = lsq_plus.init({"fc.weight": W}, config, RANGES)
    assert lsq_plus.round_offsets(scales, config) == scales
    assert lsq_plus.activation_levels(scales, config)["fc:input"].zero_point == 0


def test_mistakes_are_named():
    params, config = {"fc.weight": W}, config_of()
    scales = lsq_plus.init(params, config, RANGES)
    with raises(KeyError, "lsq_plus.init: ranges", "'fc:input'", "observers.ranges"):
        lsq_plus.init(params, config)
    with raises(TypeError, "lsq_plus.init: ranges['fc:input']", "a Range"):
        lsq_plus.init(params, config, {"fc:input": 3})
    with raises(ValueError, "lsq_plus", "rule 0", "'quant_dtype': 'uint'"):
        lsq_plus.init(params, config_of(quant_bits=1), RANGES)
    with raises(ValueError, "quant_start_step", "only qat counts steps"):
        lsq_plus.init(params, config_of(quant_start_step=2), RANGES)
    for wrong, error, part in [
        (W[:1], TypeError, "a TrainedScale"),
        (TrainedScale(jnp.ones((4, 1)), None), ValueError, "(1, 1)"),
        (TrainedScale(jnp.ones((1, 1)), jnp.ones((1, 1))), ValueError, "weights have none"),
    ]:
        with raises(error, "lsq_plus.weights: scales['fc:weight']", part):
            lsq_plus.weights(params, scales | {"fc:weight": wrong}, config)
    with raises(TypeError, "lsq_plus.activations: scales['fc:input'].offset"):
        lsq_plus.activations(scales | {"fc:input": TrainedScale(F(1), None)}, config)
    with raises(ValueError, "symmetric schemes have none"):
        lsq_plus.activations(scales, config_of(quant_scheme="symmetric"))


@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_an_affine_scheme_that_a_rule_says_is_honoured_or_refused(framework):
    params, ranges = framework({"fc.weight": W}), moved(framework, RANGES)
    by_type = {"weight": "per_channel_affine", "input": "affine"}
    words = "rule 0", "quant_scheme of the weight of 'fc' is affine", "'per_channel_symmetric'"
    config = config_of(quant_scheme=by_type)
    with raises(ValueError, "lsq_plus", *words):
        lsq_plus.init(params, config, ranges)
    with raises(ValueError, "lsq", *words):
        lsq.init(params, config, {"fc:input": params["fc.weight"][0, 0]})
    with raises(ValueError, "lsq", "{'weight': 'symmetric'}, or use qat"):
        lsq.init(params, config_of(quant_scheme="affine"), {"fc:input": params["fc.weight"][0, 0]})
    # What the message says works, also where lsq has no offset and lsq_plus has.
    config = config_of(quant_scheme=by_type | {"weight": "per_channel_symmetric"})
    scales = lsq_plus.init(params, config, ranges)
    assert scales["fc:weight"].offset is None
    assert scales["fc:input"].offset is not None
    words = "quant_scheme of the input of 'fc' is affine", "{'input': 'symmetric'}", "use lsq_plus"
    with raises(ValueError, *words):
        lsq.init(params, config, {"fc:input": params["fc.weight"][0, 0]})
    symmetric = {"weight": "per_channel_symmetric", "input": "symmetric"}
    lsq.init(params, config_of(quant_scheme=symmetric), {"fc:input": params["fc.weight"][0, 0]})
    lsq.init(params, config_of(), {"fc:input": params["fc.weight"][0, 0]})
    for name in ("weights", "levels"):
        config = config_of(quant_scheme={"weight": "affine"})
        given = (params,) * (name == "weights")
        with raises(ValueError, f"lsq{'.weights' * (name == 'weights')}: rule 0", "is affine"):
            getattr(lsq, name)(*given, {"fc:weight": params["fc.weight"][:1, :1]}, config)
