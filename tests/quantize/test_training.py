"""Quantizers in training: start steps, gradients of scales and with noise, and pruning."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import purepruning as pp
from purepruning.quantize import bnn, dorefa, fold_batch_norm, lsq, qat
from purepruning_interop import linen
from purepruning_interop import torch as ppt
from tests.messages import raises

F = np.float32
pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")  # of Adam


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(nn.relu(nn.Dense(6, name="first")(x)))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 6)
        self.relu1 = torch.nn.ReLU()
        self.last = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.relu1(self.first(x)))


RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(6, 4)).astype(F), RNG.normal(size=(3, 6)).astype(F)
X, Y = RNG.normal(size=(5, 16, 4)).astype(F), RNG.normal(size=(16, 3)).astype(F)
FLAX = {
    "first": {"kernel": jnp.asarray(A.T), "bias": jnp.zeros(6)},
    "last": {"kernel": jnp.asarray(B.T), "bias": jnp.zeros(3)},
}
NET = Net()
WEIGHTS = {"quant_types": ["weight"], "quant_bits": 4, "op_types": ["Linear"]}
OUTPUTS = {"quant_types": ["output"], "quant_bits": 4, "op_types": ["ReLU"]}
INPUTS = {"quant_types": ["input"], "quant_bits": 4, "op_types": ["Linear"]}


def flax_config(*rules):
    tables = linen.layers(NET, FLAX, X[0]), linen.activations(NET, FLAX, X[0])
    return pp.resolve_quantization(list(rules), *tables)


def torch_model():
    model = TorchNet()
    with torch.no_grad():
        for layer, w in ((model.first, A), (model.last, B)):
            layer.weight.copy_(torch.tensor(w))
            layer.bias.zero_()
    return model


def torch_config(model, *rules):
    return pp.resolve_quantization(list(rules), ppt.layers(model), ppt.activations(model))


def qat_step(config, optimizer, masks=None):
    """A training step, and what it calls, for jit and scan."""

    def step(carry, x):
        params, opt_state, state = carry

        def loss(params):
            seen = qat.weights(params, state, config)
            seen = seen if masks is None else pp.apply_masks(seen, masks)
            y, found = linen.replace(NET, seen, x, at=qat.activations(state, config))
            return jnp.mean((y - Y) ** 2), found

        (value, found), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state, qat.update(state, found, config)), value

    return step


def test_one_compile_across_the_start_step_and_the_same_under_scan():
    config = flax_config(
        WEIGHTS | {"quant_start_step": 3}, OUTPUTS | {"quant_start_step": 4}, INPUTS
    )
    optimizer = optax.sgd(0.1)
    step = qat_step(config, optimizer)
    start = (FLAX, optimizer.init(FLAX), qat.init(FLAX, config))
    jitted, carry, losses = jax.jit(step), start, []
    for x in X:
        carry, value = jitted(carry, x)
        losses.append(float(value))
    assert jitted._cache_size() == 1
    (params, _, state), scanned = jax.jit(lambda c, xs: jax.lax.scan(step, c, xs))(start, X)
    np.testing.assert_allclose(scanned, losses, rtol=1e-5)
    assert int(state.step) == 5
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(carry[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_before_the_start_step_values_are_as_they_are_but_observed():
    config = flax_config(WEIGHTS | {"quant_start_step": 2}, OUTPUTS | {"quant_start_step": 3})
    state = qat.init(FLAX, config)
    for number in (1, 2, 3):
        weights = qat.weights(FLAX, state, config)
        x = jnp.array([0.1, 0.77, 3.0])
        y, seen = qat.activations(state, config)["relu1:output"](x)
        kernel = weights["first"]["kernel"]
        assert bool((kernel == FLAX["first"]["kernel"]).all()) == (number < 2)
        assert bool((y == x).all()) == (number < 3)
        state = qat.update(state, {"relu1:output": seen}, config)
    assert float(state.averages["relu1:output"].high) == 3


def test_evaluation_before_any_step_is_the_float_model():
    """NNI 2.10 divides by a scale of zero there."""
    config = flax_config(INPUTS, OUTPUTS)
    at = qat.activations(qat.init(FLAX, config), config, training=False)
    y, _ = linen.replace(NET, FLAX, X[0], at=at)
    np.testing.assert_array_equal(y, NET.apply({"params": FLAX}, X[0]))


def test_torch_trains_as_flax_does():
    rules = (WEIGHTS | {"quant_start_step": 2}, OUTPUTS, INPUTS)
    config, optimizer = flax_config(*rules), optax.sgd(0.1)
    step = jax.jit(qat_step(config, optimizer))
    carry = (FLAX, optimizer.init(FLAX), qat.init(FLAX, config))
    model = torch_model()
    same = torch_config(model, *rules)
    assert same.bits == config.bits
    params = dict(model.named_parameters())
    state, sgd = qat.init(params, same), torch.optim.SGD(model.parameters(), lr=0.1)
    for x in X:
        carry, value = step(carry, x)
        weights = qat.weights(params, state, same)
        y, seen = ppt.replace(
            model, torch.tensor(x), at=qat.activations(state, same), params=weights
        )
        loss = ((y - torch.tensor(Y)) ** 2).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        state = qat.update(state, seen, same)
        np.testing.assert_allclose(loss.item(), value, rtol=1e-4)
    np.testing.assert_allclose(
        model.first.weight.detach(), carry[0]["first"]["kernel"].T, rtol=1e-3, atol=1e-5
    )


def test_masks_and_quantizers_in_one_optax_chain():
    config = flax_config(WEIGHTS, OUTPUTS)
    pruning = pp.resolve(0.5, linen.layers(NET, FLAX, X[0]))
    masks = pp.level(FLAX, None, pruning)
    optimizer = pp.keep_pruned(masks, optax.adam(0.01))
    start = pp.apply_masks(FLAX, masks)
    carry = (start, optimizer.init(start), qat.init(start, config))
    (params, _, state), losses = jax.jit(
        lambda c, xs: jax.lax.scan(qat_step(config, optimizer, masks), c, xs)
    )(carry, np.concatenate([X] * 8))
    assert losses[-5:].mean() < losses[:5].mean()
    seen = pp.apply_masks(qat.weights(params, state, config), masks)
    for name in ("first", "last"):
        for tree in (params, seen):
            kernel = np.asarray(tree[name]["kernel"])
            assert (kernel[~np.asarray(masks[name]["kernel"])] == 0).all()


def test_masks_and_quantizers_in_one_torch_loop():
    model = torch_model()
    config = torch_config(model, WEIGHTS, OUTPUTS)
    params = dict(model.named_parameters())
    masks = pp.level(params, None, pp.resolve(0.5, ppt.layers(model)))
    ppt.apply_(model, masks)
    state, adam = qat.init(params, config), torch.optim.Adam(model.parameters(), lr=0.01)
    with ppt.keep_pruned(model, masks, adam):
        for x in np.concatenate([X] * 2):
            weights = pp.apply_masks(qat.weights(params, state, config), masks)
            at = qat.activations(state, config)
            y, seen = ppt.replace(model, torch.tensor(x), at=at, params=weights)
            adam.zero_grad()
            ((y - torch.tensor(Y)) ** 2).mean().backward()
            adam.step()
            state = qat.update(state, seen, config)
    for name, mask in masks.items():
        if name.endswith("weight"):
            assert (params[name][~mask] == 0).all()
            assert (weights[name][~mask] == 0).all()


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_symmetric"])
def test_coupling_goes_through_quantizers_and_shrunk_weights_are_theirs(scheme):
    """Pruned zeros change no range and stay zero, so that a quantised model can be shrunk."""
    config = flax_config(WEIGHTS | {"quant_scheme": scheme}, OUTPUTS)
    state = qat.init(FLAX, config)
    _, seen = linen.replace(NET, FLAX, X[0], at=qat.activations(state, config))
    state = qat.update(state, seen, config)

    def quantized(params, x):
        at = qat.activations(state, config, training=False)
        return linen.replace(NET, qat.weights(params, state, config), x, at=at)[0]

    coupling = pp.couple(quantized, FLAX, X[0])
    (family,) = [f for f in coupling.families if len(f) == 6]
    masks = coupling.masks(family.units[jnp.array([1, 4])].tolist(), FLAX)
    small = pp.shrink(quantized, FLAX, masks, coupling, X[0])
    assert small.params["first"]["kernel"].shape == (4, 4)
    wanted = quantized(pp.apply_masks(FLAX, masks), X[0])
    np.testing.assert_allclose(small.fn(small.params, X[0]), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_symmetric"])
def test_torch_modules_trained_with_masks_and_quantizers_shrink(scheme):
    """Quantised by the trained state, the small module computes what the masked one did."""
    model = torch_model()
    rules = WEIGHTS | {"quant_bits": 8, "quant_scheme": scheme}, OUTPUTS | {"quant_bits": 8}
    config = torch_config(model, *rules)
    params, x = dict(model.named_parameters()), torch.tensor(X[0])
    coupling = ppt.couple(model, x)
    masks = coupling.masks([2, 5], params)
    ppt.apply_(model, masks)
    state, sgd = qat.init(params, config), torch.optim.SGD(model.parameters(), lr=0.05)
    with ppt.keep_pruned(model, masks, sgd):
        for batch in X:
            weights = pp.apply_masks(qat.weights(params, state, config), masks)
            at = qat.activations(state, config)
            y, seen = ppt.replace(model, torch.tensor(batch), at=at, params=weights)
            sgd.zero_grad()
            ((y - torch.tensor(Y)) ** 2).mean().backward()
            sgd.step()
            state = qat.update(state, seen, config)

    def evaluated(model):
        own = torch_config(model, *rules)
        weights = qat.weights(dict(model.named_parameters()), state, own)
        at = qat.activations(state, own, training=False)
        return ppt.replace(model, x, at=at, params=weights)[0].detach()

    small = ppt.shrink(model, masks, coupling, x).model
    assert (small.first.out_features, small.last.in_features) == (4, 4)
    torch.testing.assert_close(evaluated(small), evaluated(model), rtol=1e-5, atol=1e-6)


# The other quantizers.


def test_lsq_gradients_by_hand_in_both_frameworks():
    x, s = np.array([-5, -1.2, 0.3, 0.6, 9], F), F(0.5)
    low, high, size = -4, 3, 5
    steps = x / s
    inside = (steps >= low) & (steps <= high)
    whole = np.round(np.clip(steps, low, high))
    by_scale = np.where(inside, whole - steps, whole).sum() / np.sqrt(high * size)

    def loss(x, s):
        return lsq.quantize(x, s, low, high, size).sum()

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(s))
    t = torch.tensor(x), torch.tensor(s)
    torch_grads = torch.func.grad(loss, argnums=(0, 1))(*t)
    np.testing.assert_allclose(value, (whole * s).sum(), rtol=1e-6)
    for dx, ds in (grads, torch_grads):
        np.testing.assert_array_equal(np.asarray(dx), inside)
        np.testing.assert_allclose(float(ds), by_scale, rtol=1e-6)


def test_lsq_trains_scales_beside_weights():
    config = flax_config(
        WEIGHTS | {"quant_bits": 2}, OUTPUTS | {"quant_bits": 2, "quant_dtype": "uint"}
    )
    _, seen = linen.replace(NET, FLAX, X[0], at=lsq.watch(config))
    scales = lsq.init(FLAX, config, seen)
    relu = np.maximum(X[0] @ A.T, 0)
    np.testing.assert_allclose(scales["relu1:output"], 2 * relu.mean() / np.sqrt(3), rtol=1e-5)
    np.testing.assert_allclose(scales["first:weight"], 2 * np.abs(A).mean()[None, None], rtol=1e-5)
    optimizer = optax.adam(0.01)

    def loss(trained):
        params, scales = trained
        at = lsq.activations(scales, config)
        y, _ = linen.replace(NET, lsq.weights(params, scales, config), X[0], at=at)
        return jnp.mean((y - Y) ** 2)

    @jax.jit
    def step(carry, _):
        trained, opt_state = carry
        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(trained, updates), opt_state), value

    trained = FLAX, scales
    (trained, _), losses = jax.lax.scan(step, (trained, optimizer.init(trained)), length=60)
    assert losses[-1] < 0.8 * losses[0]
    assert all(float(jnp.abs(trained[1][k] - scales[k]).min()) > 1e-4 for k in scales)


def test_lsq_of_one_signed_bit_is_refused():
    with raises(ValueError, "lsq", "rule 0", "'quant_dtype': 'uint'"):
        lsq.init(FLAX, flax_config(WEIGHTS | {"quant_bits": 1}))
    with raises(KeyError, "lsq.init", "'relu1:output'"):
        lsq.init(FLAX, flax_config(OUTPUTS))
    config = flax_config(WEIGHTS)
    scales = lsq.init(FLAX, config)
    for wrong, error in ((jnp.ones(5), ValueError), ("a", TypeError)):
        with raises(error, "lsq.weights: scales['first:weight']"):
            lsq.weights(FLAX, scales | {"first:weight": wrong}, config)
    with raises(ValueError, "quant_start_step", "only qat counts steps"):
        lsq.init(FLAX, flax_config(WEIGHTS | {"quant_start_step": 9}))


def test_dorefa_gradients_are_unbiased_few_and_the_same_in_both_frameworks():
    g = RNG.normal(size=(64, 50)).astype(F) * (10.0 ** RNG.integers(-3, 3, (64, 1))).astype(F)
    found = np.asarray(dorefa.gradient(jnp.asarray(g), 7, 2, name="first"))
    for same in (g, torch.tensor(g)):
        np.testing.assert_array_equal(found, dorefa.gradient(same, 7, 2, name="first"))
    np.testing.assert_array_equal(
        found, jax.jit(lambda g: dorefa.gradient(g, 7, 2, name="first"))(g)
    )
    largest = np.abs(g).max(1, keepdims=True)
    np.testing.assert_allclose(
        np.unique(np.round(found / largest, 5)), [-1, -1 / 3, 1 / 3, 1], atol=1e-4
    )
    keys = jnp.arange(400)
    many = jax.jit(jax.vmap(lambda k: dorefa.gradient(jnp.asarray(g), k, 2)))(keys)
    error = (np.asarray(many).mean(0) - g) / largest
    assert np.abs(error).max() < 6 * (1 / 3) / np.sqrt(400)  # six standard errors at most
    assert (np.asarray(dorefa.gradient(jnp.zeros((2, 3)), 1, 4)) == 0).all()


def test_dorefa_quantises_gradients_of_layers_on_the_way_back():
    config = flax_config(WEIGHTS | {"op_names": ["first"]})
    model = torch_model()
    same = torch_config(model, WEIGHTS | {"op_names": ["first"]})

    def loss(params):
        at = dorefa.activations(config, key=5, gradient_bits=3)
        return jnp.sum(linen.replace(NET, params, X[0], at=at)[0] * Y)

    kernel = jax.jit(jax.grad(loss))(FLAX)["first"]["kernel"]
    back = (Y @ B) * (X[0] @ A.T > 0)  # the gradient of first's output
    quantised = np.asarray(dorefa.gradient(jnp.asarray(back), 5, 3, name="first"))
    np.testing.assert_allclose(kernel, X[0].T @ quantised, rtol=1e-4, atol=1e-4)
    at = dorefa.activations(same, key=5, gradient_bits=3)
    params = dict(model.named_parameters())
    y, _ = ppt.replace(model, torch.tensor(X[0]), at=at, params=params)
    (y * torch.tensor(Y)).sum().backward()
    np.testing.assert_allclose(model.first.weight.grad.T, kernel, rtol=1e-3, atol=1e-4)
    with raises(ValueError, "key and gradient_bits belong together"):
        dorefa.activations(config, key=5)


def test_dorefa_activations_and_weight_gradients():
    x = jnp.array([-0.5, 0.1, 0.5, 0.95, 2.0])
    value, slope = jax.vmap(jax.value_and_grad(lambda x: dorefa.activation(x, 2)))(x)
    np.testing.assert_allclose(value, [0, 0, 2 / 3, 1, 1], rtol=1e-6)
    assert slope.tolist() == [0, 1, 1, 1, 0]
    params = {"w": jnp.asarray(A)}
    layer = pp.make_layer(params, "w", "Linear", name="w", out_axes=0, in_axes=1)
    config = pp.resolve_quantization({"quant_types": ["weight"], "quant_bits": 2}, [layer])
    found = jax.grad(lambda p: dorefa.weights(p, None, config)["w"].sum())(params)["w"]
    largest = np.abs(np.tanh(A)).max()
    wanted = (1 - np.tanh(A) ** 2) / largest  # but where the maximum itself moves
    inner = np.abs(np.tanh(A)) < largest
    np.testing.assert_allclose(np.asarray(found)[inner], wanted[inner], rtol=1e-5)


def test_bnn_gradients_and_the_latent_clip():
    x = torch.tensor([-1.5, -1.0, 0.0, 0.4, 3.0], requires_grad=True)
    y = bnn.activation(x)
    y.sum().backward()
    assert (y.tolist(), x.grad.tolist()) == ([-1, -1, 1, 1, 1], [0, 1, 1, 1, 0])
    config = flax_config(WEIGHTS | {"quant_bits": 1})
    clipped = bnn.clip(FLAX, config)
    np.testing.assert_array_equal(clipped["first"]["kernel"], np.clip(A.T, -1, 1))
    with raises(ValueError, "bnn.weights", "'quant_bits': 4", "write 1"):
        bnn.weights(FLAX, None, flax_config(WEIGHTS))


def test_bnn_draws_signs_by_the_hard_sigmoid_alike_in_both_frameworks():
    """P(1) = clip((x + 1) / 2, 0, 1), equation 2 of arXiv:1602.02830."""
    config = flax_config(WEIGHTS | {"quant_bits": 1, "op_names": ["first"]})

    def drawn(key, params=FLAX):
        return bnn.weights(params, None, config, key=key)["first"]["kernel"]

    many = np.asarray(jax.jit(jax.vmap(drawn))(jnp.arange(1000)))
    assert set(np.unique(many)) == {-1, 1}
    chance = np.clip((A.T + 1) / 2, 0, 1)
    error = np.abs((many == 1).mean(0) - chance)
    assert (error <= 5 * np.sqrt(chance * (1 - chance) / 1000)).all()  # five standard errors
    np.testing.assert_array_equal(drawn(7), many[7])
    np.testing.assert_array_equal(drawn(jax.random.key(7)), many[7])
    np.testing.assert_array_equal(jax.grad(lambda p: drawn(3, p).sum())(FLAX)["first"]["kernel"], 1)
    x = np.linspace(-1.5, 1.5, 101, dtype=F)
    for name in ("first:input", "last:input"):
        t = torch.tensor(x, requires_grad=True)
        y = bnn.activation(t, 5, name=name)
        y.sum().backward()
        np.testing.assert_array_equal(t.grad, np.abs(x) <= 1)
        np.testing.assert_array_equal(y.detach(), bnn.activation(jnp.asarray(x), 5, name=name))
    assert (bnn.activation(x, 5, name="first:input") != y.detach().numpy()).any()
    reads = flax_config(INPUTS | {"quant_bits": 1})
    found, _ = bnn.activations(reads, key=5)["last:input"](jnp.asarray(x))
    np.testing.assert_array_equal(found, y.detach())
    with raises(TypeError, "a random key must be a seed", "'a'"):
        bnn.weights(FLAX, None, config, key="a")


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("bias", [True, False])
def test_folded_batch_norms_compute_the_same(framework, bias):
    as_array = {"jax": jnp.asarray, "torch": torch.tensor}[framework]
    w, b, gamma, beta, mean = (RNG.normal(size=s).astype(F) for s in ((6, 4), 6, 6, 6, 6))
    variance = RNG.uniform(0.1, 2, 6).astype(F)
    x = X[0]
    wanted = (x @ w.T + b * bias - mean) / np.sqrt(variance + 1e-5) * gamma + beta
    given = [as_array(v) for v in (w, b, gamma, beta, mean, variance)]
    given[1] = given[1] if bias else None
    weight, shift = fold_batch_norm(*given, out_axis=0, epsilon=1e-5)
    np.testing.assert_allclose(
        x @ np.asarray(weight).T + np.asarray(shift), wanted, rtol=1e-4, atol=1e-4
    )
    with raises(ValueError, "fold_batch_norm", "scale has shape (6,)", "4 outputs"):
        fold_batch_norm(*given, out_axis=1, epsilon=1e-5)
    with raises(ValueError, "fold_batch_norm", "out_axis=2", "(6, 4)", "axis of the outputs"):
        fold_batch_norm(*given, out_axis=2, epsilon=1e-5)
    given[1] = as_array(b[:1])
    with raises(ValueError, "fold_batch_norm", "bias has shape (1,)", "6 outputs"):
        fold_batch_norm(*given, out_axis=0, epsilon=1e-5)
