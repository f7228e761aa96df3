"""Laws of weight quantizers: a row for each, in every mode of running."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.quantize import bnn, dorefa, lsq, lsq_plus, naive, ptq, qat
from tests.fast import jit_once
from tests.modes import as_jax, as_numpy, as_torch, moved, off_host

F = np.float32
RNG = np.random.default_rng(0)
#: A linear layer in torch's layout, a convolution in Flax's, and a stack of two linear layers.
PARAMS = {
    "fc": (RNG.normal(size=(6, 8)) * 10.0 ** RNG.integers(-3, 3, (6, 1))).astype(F),
    "conv": RNG.normal(size=(3, 3, 4, 6)).astype(F),
    "stack": (RNG.normal(size=(2, 8, 6)) * [[[1]], [[100]]]).astype(F),
    "bias": RNG.normal(size=6).astype(F),
}
LAYERS = [
    pp.make_layer(PARAMS, "fc", "Linear", name="fc", out_axes=0, in_axes=1),
    pp.make_layer(PARAMS, "conv", "Conv2d", name="conv", out_axes=3, in_axes=2),
    pp.make_layer(PARAMS, "stack", "Linear", name="stack", out_axes=2, in_axes=1, stack_axes=0),
]


def config_of(bits, **keys):
    return pp.resolve_quantization({"quant_types": ["weight"], "quant_bits": bits} | keys, LAYERS)


ROWS = {
    "naive": (naive.weights, config_of(8), None),
    "qat affine": (qat.weights, config_of(8), "qat"),
    "qat channels": (qat.weights, config_of(4, quant_scheme="per_channel_symmetric"), "qat"),
    "qat groups": (qat.weights, config_of(4, granularity=4), "qat"),
    "qat from step 2": (qat.weights, config_of(4, quant_start_step=2), "qat"),
    "ptq": (ptq.weights, config_of(3, quant_scheme="per_channel_affine"), None),
    "bnn": (bnn.weights, config_of(1), None),
    "lsq": (lsq.weights, config_of(4), "lsq"),
    "lsq groups": (lsq.weights, config_of(4, granularity=4), "lsq"),
    "lsq plus": (
        lsq_plus.weights,
        config_of(4, quant_scheme="per_channel_symmetric"),
        "lsq plus",
    ),
    "dorefa": (dorefa.weights, config_of(4), None),
}
#: Rows that between them take every way through the code; the others run with --full.
ALWAYS = {"qat groups", "lsq", "lsq plus", "dorefa"}
MARKED = {
    name: pytest.param(name, marks=() if name in ALWAYS else pytest.mark.full) for name in ROWS
}
rows = pytest.mark.parametrize("name", MARKED.values())


def all_but(*names):
    """Rows whose name has none of these words in it."""
    found = [row for name, row in MARKED.items() if not any(n in name for n in names)]
    return pytest.mark.parametrize("name", found)


def state_of(name, params):
    """The state of a quantizer, in the framework of ``params``; NumPy where they are shapes."""
    _, config, kind = ROWS[name]
    state = {
        "qat": lambda: qat.State(np.int32(1), {}),
        "lsq": lambda: lsq.init(PARAMS, config),
        "lsq plus": lambda: lsq_plus.init(PARAMS, config),
    }
    if kind is None:
        return None
    framework = {np.ndarray: as_numpy}.get(type(params["fc"]), as_jax)
    framework = as_torch if torch.is_tensor(params["fc"]) else framework
    return moved(framework, state[kind]())


def quantized(name, params):
    weights, config, _ = ROWS[name]
    return weights(params, state_of(name, params), config)


def numbers(name):
    """What NumPy computes, the arrays being NumPy's."""
    weights, config, _ = ROWS[name]
    return weights(PARAMS, state_of(name, PARAMS), config)


def in_modes(name):
    jaxed, torched = as_jax(PARAMS), as_torch(PARAMS)
    yield "jax", as_numpy(quantized(name, jaxed))
    yield "jit", as_numpy(jax.jit(lambda p: quantized(name, p))(jaxed))
    with off_host():
        yield "device", as_numpy(quantized(name, jaxed))
        yield "torch device", as_numpy(quantized(name, torched))
    yield "torch", as_numpy(quantized(name, torched))
    both = {path: np.stack([3 * x, x]) for path, x in PARAMS.items()}
    if not name.startswith("lsq"):  # scales that are given are those of one
        found = jax.jit(jax.vmap(lambda p: quantized(name, p)))(both)
        yield "vmap", {path: np.asarray(x)[1] for path, x in found.items()}
        found = torch.func.vmap(lambda p: quantized(name, p))(as_torch(both))
        yield "torch.vmap", {path: x.numpy()[1] for path, x in found.items()}


@rows
def test_the_same_numbers_in_every_mode(name):
    wanted = numbers(name)
    assert np.array_equal(wanted["bias"], PARAMS["bias"])
    for mode, found in in_modes(name):
        for path, x in wanted.items():
            message = f"{mode}: {path}"
            if name == "dorefa":  # every framework rounds its own tanh
                np.testing.assert_allclose(found[path], x, atol=2e-7, err_msg=message)
            else:
                np.testing.assert_array_equal(found[path], x, err_msg=message)


@rows
def test_gradients_agree(name):
    """Of a weighted sum, by JAX and by torch; straight through where nothing is clipped."""
    factors = {path: RNG.normal(size=x.shape).astype(F) for path, x in PARAMS.items()}

    def loss(params, factors):
        found = quantized(name, params)
        return sum((found[path] * factors[path]).sum() for path in found)

    by_jax = jit_once(jax.grad(loss))(as_jax(PARAMS), factors)
    params, constants = as_torch(PARAMS), as_torch(factors)
    by_torch = torch.func.grad(loss)(params, constants)
    for path, x in factors.items():
        a, b = np.asarray(by_jax[path]), by_torch[path].numpy()
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=path)
        if name not in ("dorefa", "lsq", "lsq groups", "lsq plus"):
            np.testing.assert_array_equal(a, x, err_msg=path)


@rows
def test_few_values(name):
    """At most ``2**bits`` for every scale."""
    config = ROWS[name][1]
    found = numbers(name)["fc"]
    (target,) = [t for t in config.weights if t.name == "fc"]
    per = {"tensor": [found.ravel()], "channel": found}.get(target.granularity)
    for values in found.reshape(-1, 4) if per is None else per:
        assert len(np.unique(values)) <= 2**target.bits


@all_but("dorefa", "lsq groups", "lsq plus")  # rounded tanh; trained scales of every row
def test_permuted_channels_are_permuted(name):
    order = RNG.permutation(6)
    moved_params = PARAMS | {"fc": PARAMS["fc"][order], "conv": PARAMS["conv"][..., order]}
    found, wanted = quantized(name, as_jax(moved_params)), numbers(name)
    np.testing.assert_array_equal(found["fc"], wanted["fc"][order])
    np.testing.assert_array_equal(found["conv"], wanted["conv"][..., order])


@all_but("groups", "lsq")
def test_stacked_layers_are_layers_of_their_own(name):
    weights, config, _ = ROWS[name]
    (target,) = [t for t in config.weights if t.name == "stack"]
    params = {"one": jnp.asarray(PARAMS["stack"][1])}
    layer = pp.make_layer(params, "one", "Linear", name="one", out_axes=1, in_axes=0)
    rule = {"quant_types": ["weight"], "quant_bits": target.bits, "granularity": target.granularity}
    alone = pp.resolve_quantization(rule | {"quant_scheme": target.scheme}, [layer])
    state = qat.init(params, alone) if weights is qat.weights else None
    found = weights(params, state, alone)["one"]
    np.testing.assert_allclose(found, numbers(name)["stack"][1], rtol=1e-6, atol=2e-7)


@rows
def test_quantise_then_mask_keeps_zeros_and_no_channel_becomes_nan(name):
    params = as_jax(PARAMS)
    masks = {"fc": jnp.arange(6)[:, None] != 2, "conv": jnp.asarray(RNG.random((3, 3, 4, 6)) < 0.5)}
    pruned = pp.apply_masks(params, masks)

    def loss(params):
        seen = pp.apply_masks(quantized(name, params), masks)
        return sum(x.sum() for x in seen.values()), seen

    grads, seen = jit_once(jax.grad(loss, has_aux=True))(pruned)
    for path, mask in masks.items():
        gone = ~np.broadcast_to(mask, PARAMS[path].shape)
        assert (np.asarray(seen[path])[gone] == 0).all()
        assert (np.asarray(grads[path])[gone] == 0).all()
        assert np.isfinite(grads[path]).all()
    if name not in ("bnn", "dorefa"):  # whose zeros become other numbers: hence the order
        assert (np.asarray(quantized(name, pruned)["fc"])[2] == 0).all()


@rows
def test_bfloat16_stays_bfloat16(name):
    params = {path: x.astype(jnp.bfloat16) for path, x in PARAMS.items()}
    for found in (quantized(name, as_jax(params)), quantized(name, as_torch(params))):
        assert {str(x.dtype).removeprefix("torch.") for x in found.values()} == {"bfloat16"}


@rows
def test_an_empty_config_changes_nothing(name):
    weights, _, kind = ROWS[name]
    empty = pp.quantize.QuantizationConfig()
    params = as_jax(PARAMS)
    state = {"qat": qat.init(params, empty), None: None}.get(kind, {})
    found = weights(params, state, empty)
    assert all(found[path] is x for path, x in params.items())
    assert pp.quantize.observers.init(params, empty) == {}


@rows
def test_wrong_weights_are_named(name):
    weights, config, _ = ROWS[name]
    state = state_of(name, PARAMS)
    for params, parts in [
        ({"fd": PARAMS["fc"]}, (KeyError, "'fc'", "'fd'")),
        (PARAMS | {"fc": PARAMS["fc"][:3]}, (ValueError, "'fc'", "(3, 8)", "(6, 8)")),
        (PARAMS | {"fc": np.ones((6, 8), np.int32)}, (TypeError, "'fc'", "floats")),
    ]:
        with pytest.raises(parts[0]) as caught:
            weights(params, state, config)
        assert all(part in str(caught.value) for part in parts[1:])
    with pytest.raises(TypeError, match="what pp"):
        weights(PARAMS, state, None)
