"""Batch norms of whole models, folded into the layers in front of them."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import purepruning as pp
from purepruning.quantize import BatchNorm, fold_batch_norms, qat
from purepruning_interop import linen
from purepruning_interop import nnx as ppn
from purepruning_interop import torch as ppt
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")

X = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)

#: Which norm reads which layer in the models below, which are the same in three frameworks.
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


MAKERS = {"linen": of_linen, "nnx": of_nnx, "torch": of_torch}
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
        variance = numbers(after[norm.variance])
        np.testing.assert_allclose(variance + norm.epsilon, 1, rtol=1e-6)
        if norm.layer.bias or norm.offset:
            assert not numbers(after[norm.mean]).any()
    assert all(after[k] is x for k, x in before.items() if k.split(".")[0] not in FOLDED)
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
