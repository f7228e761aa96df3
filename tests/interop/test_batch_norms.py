"""Batch norms of whole models, folded into the layers in front of them."""

from collections.abc import Mapping
from functools import partial

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import purepruning as pp
from purepruning.quantize import BatchNorm, fold_batch_norms, qat
from purepruning_interop import equinox as ppe
from purepruning_interop import haiku as pph
from purepruning_interop import linen
from purepruning_interop import nnx as ppn
from purepruning_interop import torch as ppt
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")

X = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)

#: Which norm reads which layer in the models below, which are the same in five frameworks.
#: ``conv3`` is read by a sum too, ``again`` is called twice, ``first`` reads what is no layer's.
FOLDED = {"bn1": "conv1", "bn2": "conv2", "bn5": "fc"}


class Linen(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        def norm(name, **options):
            return nn.BatchNorm(use_running_average=not self.train, name=name, **options)

        def conv(name, **options):
            return nn.Conv(8, (3, 3), name=name, **options)

        x = norm("first")(x)
        x = nn.relu(norm("bn1")(conv("conv1", use_bias=False)(x)))
        x = norm("bn2", epsilon=1e-2, use_scale=False)(
            conv("conv2", strides=2, feature_group_count=2)(x)
        )
        y = conv("conv3")(x)
        x = norm("bn3")(y) + y
        again = conv("again")
        x = norm("bn4")(again(again(x)))
        fc = nn.Dense(5, use_bias=False, name="fc")
        x = norm("bn5", use_bias=False)(fc(x.reshape(len(x), -1)))
        return nn.Dense(2, name="last")(x)


class Nnx(nnx.Module):
    def __init__(self):
        def norm(n, **options):
            return nnx.BatchNorm(n, use_running_average=True, rngs=rngs, **options)

        def conv(n, **options):
            return nnx.Conv(n, 8, (3, 3), rngs=rngs, **options)

        rngs = nnx.Rngs(0)
        self.first = norm(3)
        self.conv1, self.bn1 = conv(3, use_bias=False), norm(8)
        self.conv2 = conv(8, strides=2, feature_group_count=2)
        self.bn2 = norm(8, epsilon=1e-2, use_scale=False)
        self.conv3, self.bn3 = conv(8), norm(8)
        self.again, self.bn4 = conv(8), norm(8)
        self.fc, self.bn5 = nnx.Linear(72, 5, use_bias=False, rngs=rngs), norm(5, use_bias=False)
        self.last = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(self.first(x))))
        x = self.bn2(self.conv2(x))
        y = self.conv3(x)
        x = self.bn3(y) + y
        x = self.bn4(self.again(self.again(x)))
        return self.last(self.bn5(self.fc(x.reshape(len(x), -1))))


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        norm, conv = torch.nn.BatchNorm2d, torch.nn.Conv2d
        self.first = norm(3)
        self.conv1, self.bn1 = conv(3, 8, 3, padding=1, bias=False), norm(8)
        self.conv2 = conv(8, 8, 3, stride=2, padding=1, groups=2)
        self.bn2 = norm(8, eps=1e-2)
        self.conv3, self.bn3 = conv(8, 8, 3, padding=1), norm(8)
        self.again, self.bn4 = conv(8, 8, 3, padding=1), norm(8)
        self.fc, self.bn5 = (
            torch.nn.Linear(72, 5, bias=False),
            torch.nn.BatchNorm1d(5, affine=False),
        )
        self.last = torch.nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(self.first(x))))
        x = self.bn2(self.conv2(x))
        y = self.conv3(x)
        x = self.bn3(y) + y
        x = self.bn4(self.again(self.again(x)))
        return self.last(self.bn5(self.fc(x.flatten(1))))


class Equinox(eqx.Module):
    first: eqx.nn.BatchNorm
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    bn2: eqx.nn.BatchNorm
    conv3: eqx.nn.Conv2d
    bn3: eqx.nn.BatchNorm
    again: eqx.nn.Conv2d
    bn4: eqx.nn.BatchNorm
    fc: eqx.nn.Linear
    bn5: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, mode):
        def norm(n, **options):
            return eqx.nn.BatchNorm(n, "batch", mode=mode, inference=True, **options)

        def conv(n, **options):
            return eqx.nn.Conv2d(n, 8, 3, padding=1, key=key, **options)

        key = jax.random.key(0)
        self.first = norm(3)
        self.conv1, self.bn1 = conv(3, use_bias=False), norm(8)
        self.conv2, self.bn2 = conv(8, stride=2, groups=2), norm(8, eps=1e-2)
        self.conv3, self.bn3 = conv(8), norm(8)
        self.again, self.bn4 = conv(8), norm(8)
        self.fc = eqx.nn.Linear(72, 5, use_bias=False, key=key)
        self.bn5 = norm(5, channelwise_affine=False)
        self.last = eqx.nn.Linear(5, 2, key=key)

    def __call__(self, x, state):
        x, state = self.first(x, state)
        x, state = self.bn1(self.conv1(x), state)
        x, state = self.bn2(self.conv2(jax.nn.relu(x)), state)
        y = self.conv3(x)
        x, state = self.bn3(y, state)
        x, state = self.bn4(self.again(self.again(x + y)), state)
        x, state = self.bn5(self.fc(x.reshape(-1)), state)
        return self.last(x), state


def haiku(x, train, layout="NHWC"):
    def norm(name, scale=True, offset=True, layout=layout, **options):
        options |= {"data_format": "NC..." if layout == "NCHW" else "N...C", "name": name}
        return lambda x: hk.BatchNorm(scale, offset, 0.9, **options)(x, train)

    def conv(name, **options):
        return hk.Conv2D(8, 3, data_format=layout, name=name, **options)

    x = norm("first")(x)
    x = jax.nn.relu(norm("bn1")(conv("conv1", with_bias=False)(x)))
    x = norm("bn2", scale=False, eps=1e-2)(conv("conv2", stride=2, feature_group_count=2)(x))
    y = conv("conv3")(x)
    x = norm("bn3")(y) + y
    again = conv("again")
    x = norm("bn4")(again(again(x)))
    x = hk.Linear(5, with_bias=False, name="fc")(x.reshape(len(x), -1))
    return hk.Linear(2, name="last")(norm("bn5", offset=False, layout="NHWC")(x))


def filled(tree):
    """The tree with random numbers: weights of either sign, all else positive, as variances are."""
    rng = np.random.default_rng(1)

    def fill(x):
        size = np.sqrt(np.prod(x.shape[:-1]))
        found = rng.normal(size=x.shape) / size if x.ndim > 1 else rng.uniform(0.2, 1, x.shape)
        return jnp.asarray(found, x.dtype)

    return jax.tree.map(fill, tree)


def of_linen():
    model = Linen()
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), X))
    norms = linen.batch_norms(model, variables, X)

    def call(params, statistics):
        return model.apply({"params": params, "batch_stats": statistics}, X)

    return norms, variables["params"], variables["batch_stats"], call


def of_nnx():
    model = nnx.eval_shape(Nnx)
    graphdef, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    params, statistics = filled(params), filled(statistics)
    model = nnx.merge(graphdef, params, statistics, rest)
    norms = ppn.batch_norms(model, X)
    return norms, params, statistics, lambda p, s: nnx.merge(graphdef, p, s, rest)(X)


def of_torch():
    torch.manual_seed(0)
    model, x = Torch().eval(), torch.tensor(X.transpose(0, 3, 1, 2))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.uniform_(0.2, 1)
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    norms = ppt.batch_norms(model.train(), x)
    assert model.training

    def call(params, statistics):
        return torch.func.functional_call(model.eval(), {**params, **statistics}, (x,))

    return norms, params, buffers, call


def of_equinox(mode):
    model, state = eqx.nn.make_with_state(Equinox)(mode)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    params = filled(params)
    # As after three steps of training, where a count says how many.
    state = jax.tree.map(lambda x: x + 3 if x.dtype == jnp.int32 else x, filled_floats(state))

    def batched(model, x, state):
        axes = {"in_axes": (0, None), "out_axes": (0, None), "axis_name": "batch"}
        return jax.vmap(model, **axes)(x, state)[0]

    x = X.transpose(0, 3, 1, 2)
    norms = ppe.batch_norms(eqx.combine(params, rest), x, state, method=batched)
    one = ppe.batch_norms(eqx.combine(params, rest), x[0], state)
    assert one == norms
    assert {(norm.updates is None, norm.decay) for norm in norms} == (
        {(True, 0.0)} if mode == "ema" else {(False, 0.99)}
    )
    return norms, params, state, lambda p, s: batched(eqx.combine(p, rest), x, s)


def filled_floats(tree):
    floats, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(filled(floats), rest)


def of_haiku(layout="NHWC"):
    model = hk.without_apply_rng(hk.transform_with_state(partial(haiku, layout=layout)))
    x = X if layout == "NHWC" else X.transpose(0, 3, 1, 2)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), x, True))
    params, state = map(filled_norms, made)
    norms = pph.batch_norms(model, {"params": params, "state": state}, x, False)
    return norms, params, state, lambda p, s: model.apply(p, s, x, False)[0]


def filled_norms(tree):
    """The tree filled; what norms hold has as many axes as what they read."""
    flat = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.size,), x.dtype) if x.size in x.shape else x, tree
    )
    return jax.tree.map(lambda x, like: x.reshape(like.shape), filled(flat), tree)


MAKERS = {
    "linen": of_linen,
    "nnx": of_nnx,
    "torch": of_torch,
    "equinox-ema": lambda: of_equinox("ema"),
    "equinox-batch": lambda: of_equinox("batch"),
    "haiku": of_haiku,
    "haiku-NCHW": lambda: of_haiku("NCHW"),
}
frameworks = pytest.mark.parametrize("framework", MAKERS)


def numbers(x):
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


@frameworks
def test_folded_models_compute_the_same(framework):
    norms, params, statistics, call = MAKERS[framework]()
    assert {norm.name: norm.layer.name for norm in norms} == FOLDED
    folded, left = fold_batch_norms(params, statistics, norms)
    wanted, found = numbers(call(params, statistics)), numbers(call(folded, left))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    # The norms do nothing any more.
    before, after = (pp.trees.flatten(tree).leaves for tree in (statistics, left))
    for norm in norms:
        variance = numbers(after[norm.variance]) / (1 if norm.updates is None else 1 - 0.99**3)
        np.testing.assert_allclose(variance + norm.epsilon, 1, rtol=1e-6)
        if norm.layer.bias or norm.offset:
            assert not numbers(after[norm.mean]).any()
    changed = {path for norm in norms for path in (norm.mean, norm.variance)}
    assert all(after[path] is x for path, x in before.items() if path not in changed)
    # Fewer norms may be asked for.
    one = fold_batch_norms(params, statistics, norms[:1])
    np.testing.assert_allclose(numbers(call(*one)), wanted, rtol=1e-4)


def test_gradients_flow_to_all_that_is_folded_and_agree_with_the_model():
    norms, params, statistics, call = of_linen()

    def plain(params, statistics):
        return jnp.sum(call(params, statistics) ** 2)

    def folded(params, statistics):
        return plain(*fold_batch_norms(params, statistics, norms))

    wanted, found = (
        jax.jit(jax.grad(f, argnums=(0, 1)))(params, statistics) for f in (plain, folded)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_quantised_training_with_folded_norms():
    """What is quantised is the folded weight, and what is trained the latent one."""
    model = Linen()
    norms, params, statistics, _ = of_linen()
    rules = {"quant_types": ["weight", "output"], "quant_bits": 8, "op_names": ["conv2", "fc"]}
    config = pp.resolve_quantization(rules, linen.layers(model, params, X))

    @jax.jit
    def step(params, state):
        def loss(params):
            folded, left = fold_batch_norms(params, statistics, norms)
            variables = {"params": qat.weights(folded, state, config), "batch_stats": left}
            at = qat.activations(state, config)
            y, seen = linen.replace(model, variables, X, at=at)
            return jnp.mean(y**2), (seen, variables["params"]["conv2"]["kernel"])

        (value, (seen, kernel)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        new = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
        return new, qat.update(state, seen, config), value, kernel

    state, values = qat.init(params, config), []
    for _ in range(4):
        params, state, value, kernel = step(params, state)
        values.append(float(value))
    assert len(np.unique(kernel)) <= 256
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_norms_behind_scaled_weights_and_other_axes_are_left_out():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.WeightNorm(nn.Dense(6))(x))
            x = nn.BatchNorm(use_running_average=True, axis=1)(nn.Dense(6)(x))
            return nn.BatchNorm(use_running_average=True)(nn.relu(nn.Dense(6)(x)))

    model = Scaled()
    variables = model.init(jax.random.key(0), X)
    assert linen.batch_norms(model, variables, X) == ()
    rows = torch.nn.Linear(3, 6), torch.nn.BatchNorm1d(6)
    assert ppt.batch_norms(torch.nn.Sequential(*rows), torch.ones(2, 6, 3)) == ()
    (norm,) = ppt.batch_norms(torch.nn.Sequential(*rows), torch.ones(2, 3))
    assert (norm.layer.name, norm.name) == ("0", "1")
    torch.nn.utils.parametrizations.weight_norm(rows[0])
    assert ppt.batch_norms(torch.nn.Sequential(*rows), torch.ones(2, 3)) == ()
    no_statistics = torch.nn.BatchNorm1d(6, track_running_stats=False)
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), no_statistics)
    assert ppt.batch_norms(model, torch.ones(2, 3)) == ()


def test_norms_of_equinox_that_are_left_out():
    """Those that share, or are behind shared or scaled weights, or axes that a vmap added."""
    key = jax.random.key(0)

    class Rows(eqx.Module):
        fc: eqx.nn.Linear
        bn: eqx.nn.BatchNorm

        def __init__(self, fc=eqx.nn.Linear):
            self.fc = fc(5, 6, key=key)
            self.bn = eqx.nn.BatchNorm(6, "batch", mode="ema", inference=True)

        def __call__(self, x, state):
            return self.bn(self.fc(x), state)

        def in_rows(self, x, state):
            return self.bn(jax.vmap(self.fc)(x), state)

        def behind_relu(self, x, state):
            return self.bn(jax.nn.relu(self.fc(x)), state)

    model, state = eqx.nn.make_with_state(Rows)()
    x = jnp.ones(5)
    (norm,) = ppe.batch_norms(model, x, state)
    assert (norm.name, norm.layer.name) == ("bn", "fc")
    assert ppe.batch_norms(model, jnp.ones((6, 5)), state, method="in_rows") == ()
    assert ppe.batch_norms(model, x, state, method="behind_relu") == ()

    def scaled(i, o, key):
        return eqx.nn.WeightNorm(eqx.nn.Linear(i, o, key=key))

    model, state = eqx.nn.make_with_state(Rows)(scaled)
    assert ppe.batch_norms(model, x, state) == ()

    class Tied(eqx.Module):
        shared: eqx.nn.Shared
        bn: eqx.nn.BatchNorm

        def __init__(self):
            pair = [eqx.nn.Linear(6, 6, key=key), eqx.nn.Linear(6, 6, key=key)]
            self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)
            self.bn = eqx.nn.BatchNorm(6, "batch", mode="ema", inference=True)

        def __call__(self, x, state):
            one, other = self.shared()
            return self.bn(one(jax.nn.relu(other(x))), state)

    model, state = eqx.nn.make_with_state(Tied)()
    assert ppe.batch_norms(model, jnp.ones(6), state) == ()
    norm = eqx.nn.BatchNorm(6, "batch", mode="ema", inference=True)
    one, other = (eqx.nn.Linear(6, 6, key=key) for _ in range(2))
    twice = eqx.nn.Sequential([one, norm, other, norm])
    assert ppe.batch_norms(twice, jnp.ones(6), eqx.nn.State(twice)) == ()
    message = "batch_norms(model, *inputs)", "batch norms", "0 states", "eqx.nn.State"
    with raises(TypeError, *message):
        ppe.batch_norms(model, jnp.ones(6))


def test_norms_of_haiku_that_are_left_out():
    """Those of other axes, or given a scale by the call; those that train are found."""

    def found(norm, call, train=False, shape=(6, 6)):
        x = jnp.ones(shape)

        @hk.transform_with_state
        def model(x, train):
            return call(hk.BatchNorm(False, False, 0.9, **norm), hk.Linear(6)(x), train)

        params, state = jax.eval_shape(lambda: model.init(jax.random.key(0), x, True))
        return pph.batch_norms(model, {"params": params, "state": state}, x, train)

    def plain(norm, x, train):
        return norm(x, train)

    (norm,) = found({}, plain, True)
    assert (norm.name, norm.layer.name, norm.scale) == ("batch_norm", "linear", None)
    assert found({}, plain) == (norm,)
    assert found({"data_format": "NC..."}, plain) == (norm,)
    assert found({"data_format": "NC..."}, plain, shape=(6, 6, 6)) == ()
    assert found({"axis": [1]}, plain) == ()
    assert found({"axis": [0, 1]}, plain) == ()
    assert found({}, lambda norm, x, train: norm(x, train, scale=jnp.float32(2))) == ()
    assert found({}, lambda norm, x, train: norm(jax.nn.relu(x), train)) == ()
    assert found({}, lambda norm, x, train: norm(x, train) + x) == ()


def test_double_precision_is_kept_and_half_precision_too():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 5e-2)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        model = model.to(dtype).eval()
        model[1].running_mean.uniform_(), model[1].running_var.uniform_()
        x = torch.randn(2, 3, 5, 5, dtype=dtype)
        params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        folded, left = fold_batch_norms(params, buffers, ppt.batch_norms(model, x))
        assert {x.dtype for x in folded.values()} == {dtype}
        found = torch.func.functional_call(model, {**folded, **left}, (x,))
        wanted = model(x)
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_mistakes_are_named():
    norms, params, statistics, _ = of_linen()
    with raises(TypeError, "fold_batch_norms: norms", "what batch_norms of an adapter returned"):
        fold_batch_norms(params, statistics, None)
    with raises(TypeError, "fold_batch_norms: every norm", "a BatchNorm", "'bn1'"):
        fold_batch_norms(params, statistics, ["bn1"])
    with raises(KeyError, "statistics have no mean 'bn1.mean' of the norm 'bn1'"):
        fold_batch_norms(params, {}, norms)
    with raises(KeyError, "params have no weight 'conv1.kernel' of the norm 'bn1'"):
        fold_batch_norms({"params": params}, statistics, norms)
    wrong = [norms[0]._replace(variance="bn5.var")]
    with raises(ValueError, "norm 'bn1' behind layer 'conv1'", "variance has shape (5,)"):
        fold_batch_norms(params, statistics, wrong)
    more = {**params, "conv1": {"kernel": params["conv1"]["kernel"][..., None]}}
    with raises(ValueError, "weight 'conv1.kernel' has shape (3, 3, 3, 8, 1)", "(3, 3, 3, 8)"):
        fold_batch_norms(more, statistics, norms)
    assert isinstance(params, Mapping)
    assert all(isinstance(norm, BatchNorm) for norm in norms)
