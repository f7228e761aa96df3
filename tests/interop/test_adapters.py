"""What all adapters share: signatures, results, counts, and objects of another framework."""

import copy
import functools
import inspect

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

import purepruning as pp
from purepruning.coupling.shrink_report import ShrinkReport, Shrunk
from purepruning.trees import flatten
from purepruning_interop import equinox, haiku, linen
from purepruning_interop import keras as ppk
from purepruning_interop import nnx as ppn
from purepruning_interop import torch as ppt
from tests.coupling.law import distance
from tests.interop.torch_law import masked

pytestmark = pytest.mark.usefixtures(
    "unoptimized", "standard_promotion", "rank_promotion"
)  # Haiku's moving averages need the one, Keras's layers the other

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
GONE = [0, 3, 4]
#: 3 -> 8 with a batch norm -> 2, before and after three of the eight channels go.
PARAMS = (3 * 8 + 8 + 8 + 8 + 8 * 2 + 2, 3 * 5 + 5 + 5 + 5 + 5 * 2 + 2)
MACS = (4 * (3 * 8 + 8 * 2), 4 * (3 * 5 + 5 * 2))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(2)(nn.relu(x))


def haiku_net(x, train=False):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(8)(x), is_training=train)
    return hk.Linear(2)(jax.nn.relu(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.norm(self.first(x), use_running_average=not train)
        return self.last(nnx.relu(x))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 8, key=one)
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="ema", inference=True)
        self.last = eqx.nn.Linear(8, 2, key=two)

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.last(jax.nn.relu(x)), state


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.last = torch.nn.Linear(8, 2)

    def forward(self, x, train=False):
        assert train is self.training
        return self.last(self.norm(self.first(x)).relu())


def keras_net():
    layers = keras.layers
    x = inputs = keras.Input((3,))
    x = layers.BatchNormalization(name="norm")(layers.Dense(8, name="first")(x))
    return keras.Model(inputs, layers.Dense(2, name="last")(layers.ReLU()(x)))


def drawn(tree):
    """The tree with numbers from 0.5 to 1.5, each another one."""
    flat, rng = flatten(tree), np.random.default_rng(1)

    def draw(x):
        if not hasattr(x, "dtype"):
            return x
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    return flat.rebuild({path: draw(x) for path, x in flat.leaves.items()})


def run(adapter, model, variables, x, fn=None, **options):
    """Couples, shrinks and counts; what a model does not own comes after it."""
    first = (model,) if variables is None else (model, variables)
    coupling = adapter.couple(*first, x, **options)
    units = next(f.units for f in coupling.families if len(f) == 8)[GONE]
    if adapter is ppt:
        params = dict(model.state_dict())
    else:
        params = variables if variables is not None else adapter.function(model)[1]
    masks = coupling.masks(units, params)
    small = adapter.shrink(*first, masks, coupling, x, **options)
    before = adapter.count(*first, x, **options)
    assert (small.report.params, small.report.macs) == (PARAMS, MACS)
    assert (before.params, before.macs) == (PARAMS[0], MACS[0])
    assert isinstance(small, Shrunk)
    assert type(small.report) is ShrinkReport
    again = adapter.rebuild(*first, small.report.plan, x, **options)
    assert (again.report.params, again.report.macs, again.reason) == (PARAMS, MACS, small.reason)
    assert again.report.kind == small.report.kind
    layers = adapter.layers(*first, x, **options)
    assert [layer.type for layer in layers if layer.type == "Linear"] == ["Linear"] * 2
    assert {layer.weight for layer in layers} <= set(coupling.leaves)
    return masks, small, again


@pytest.mark.parametrize("whole", [True, False])
def test_linen(whole):
    model = Linen()
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    if not whole:  # without statistics the norm has nothing to evaluate with
        model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
        params = drawn(jax.eval_shape(model.init, jax.random.key(0), X))["params"]
        coupling = linen.couple(model, params, X)
        masks = coupling.masks([1, 2], params)
        small = linen.shrink(model, params, masks, coupling, X)
        expected = model.apply({"params": pp.apply_masks(params, masks)}, X)
        assert distance(expected, small.fn(small.params, X)) < 1e-5
        assert linen.count(model, params, X).params == 3 * 8 + 8 + 8 * 2 + 2
        return
    masks, small, again = run(linen, model, variables, X, train=False)
    full = pp.apply_masks(variables, masks)
    assert (small.model, small.report.kind) == (None, "function")
    assert small.reason == "a Linen module makes parameters of the sizes that it names"
    assert distance(model.apply(full, X), small.fn(small.params, X)) < 1e-5
    # In training too, with the arguments of apply.
    options = {"train": True, "mutable": ["batch_stats"]}
    expected, stats = model.apply(full, X, **options)
    found, less = small.fn(small.params, X, **options)
    assert distance(expected, found) < 1e-5
    assert distance(small.report.plan.apply(stats), less) < 1e-5
    np.testing.assert_array_equal(found, again.fn(small.params, X, **options)[0])


def test_linen_coupled_in_training():
    """What mutable adds to the outputs may shrink without being asked for."""
    model = Linen()
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    coupling = linen.couple(model, variables, X, train=True, mutable=["batch_stats"])
    assert [len(f) for f in coupling.families] == [8]
    small = linen.shrink(
        model, variables, coupling.masks([1], variables), coupling, X, train=True, mutable=True
    )
    assert small.fn(small.params, X).shape == (4, 2)


def test_haiku():
    model = hk.without_apply_rng(hk.transform_with_state(haiku_net))
    init = functools.partial(model.init, train=True)  # which makes the averages
    params, state = drawn(jax.eval_shape(init, jax.random.key(0), X))
    variables = {"params": params, "state": state}
    # In training every part of the state is coupled; the plan then serves evaluation too.
    masks, small, again = run(haiku, model, variables, X, train=True)
    full = pp.apply_masks(variables, masks)
    expected, _ = model.apply(full["params"], full["state"], X)
    assert small.model is None
    assert distance(expected, small.fn(small.params, X)[0]) < 1e-5
    expected, stats = model.apply(full["params"], full["state"], X, train=True)
    found, less = again.fn(small.params, X, train=True)
    assert distance(expected, found) < 1e-5
    assert distance(small.report.plan.apply({"state": stats})["state"], less) < 1e-5


def test_haiku_coupled_in_evaluation_does_not_train():
    model = hk.without_apply_rng(hk.transform_with_state(haiku_net))
    init = functools.partial(model.init, train=True)
    params, state = drawn(jax.eval_shape(init, jax.random.key(0), X))
    variables = {"params": params, "state": state}
    coupling = haiku.couple(model, variables, X)
    units = next(f.units for f in coupling.families if "linear" in f.name)[GONE]
    small = haiku.shrink(model, variables, coupling.masks(units, variables), coupling, X)
    assert small.fn(small.params, X)[0].shape == (4, 2)
    with pytest.raises(ValueError, match="couple and shrink the model as it is called here"):
        small.fn(small.params, X, train=True)


def test_haiku_without_a_state():
    model = hk.transform(lambda x: hk.nets.MLP([8, 2])(x) + jax.random.uniform(hk.next_rng_key()))
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    key = jax.random.key(3)
    coupling = haiku.couple(model, params, X, rng=key)
    masks = coupling.masks([1, 2], params)
    small = haiku.shrink(model, params, masks, coupling, X, rng=key)
    expected = model.apply(pp.apply_masks(params, masks), key, X)
    assert distance(expected, small.fn(small.params, X, rng=key)) < 1e-5
    with pytest.raises(TypeError, match=r'pass \{"params": params, "state": state\}'):
        haiku.couple(model, (params, {}), X)


def test_nnx():
    model = Nnx(nnx.Rngs(0))
    nnx.update(model, drawn(nnx.state(model)))
    masks, small, again = run(ppn, model, None, X, train=False)
    assert isinstance(small.model, Nnx)
    assert (small.report.kind, small.reason) == ("module", "")
    assert small.report.deviation <= 1e-5
    full = nnx.clone(model)
    nnx.update(full, pp.apply_masks(nnx.state(model), masks))
    assert distance(full(X), small.model(X)) < 1e-5
    assert distance(full(X, train=True), small.fn(small.params, X, train=True)) < 1e-5
    # A small model is read back without the weights of the whole one.
    abstract = nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
    loaded = ppn.rebuild(abstract, small.report.plan, X, train=False).model
    assert {type(x) for x in jax.tree.leaves(nnx.state(loaded))} == {jax.ShapeDtypeStruct}
    nnx.update(loaded, nnx.state(small.model))
    np.testing.assert_array_equal(loaded(X), small.model(X))
    assert again.model.first.out_features == 5


def test_keras():
    model = keras_net()
    ppk.load(model, drawn(ppk.params(model)))
    masks, small, again = run(ppk, model, None, X, training=False)
    assert (small.report.kind, small.reason) == ("module", "")
    assert small.report.deviation <= 1e-5
    full = keras.models.clone_model(model)
    ppk.load(full, pp.apply_masks(ppk.params(model), masks))
    assert distance(full(X), small.model(X)) < 1e-5
    assert distance(full(X, training=True), small.fn(small.params, X, training=True)) < 1e-5
    ppk.load(again.model, ppk.params(small.model))
    np.testing.assert_array_equal(again.model(X), small.model(X))
    assert again.model.get_layer("first").units == 5


def each(model, x):
    net, state = model
    return jax.vmap(lambda x: net(x, state)[0])(x)


def test_equinox():
    model = drawn(eqx.nn.make_with_state(Equinox)(jax.random.key(0)))
    masks, small, again = run(equinox, model, None, X, method=each)
    assert isinstance(small.model[0], Equinox)
    assert small.reason == ""
    full = pp.apply_masks(equinox.function(model, method=each)[1], masks)
    expected = each(eqx.combine(full, model), X)
    assert distance(expected, each(small.model, X)) < 1e-5
    assert distance(expected, small.fn(small.params, X)) < 1e-5
    assert again.model[0].norm.input_size == 5
    abstract = eqx.filter_eval_shape(lambda: eqx.nn.make_with_state(Equinox)(jax.random.key(0)))
    shapes = equinox.rebuild(abstract, small.report.plan, X, method=each).params
    assert {type(x) for x in jax.tree.leaves(shapes)} == {jax.ShapeDtypeStruct}
    assert [x.shape for x in jax.tree.leaves(shapes)] == [
        x.shape for x in jax.tree.leaves(small.params)
    ]


def test_torch():
    model = Torch().eval()
    x = torch.as_tensor(X)
    _, small, again = run(ppt, model, None, x, train=False)
    assert isinstance(small.model, Torch)
    full = masked(model, small.report.masks)
    torch.testing.assert_close(small.model(x), full(x))
    torch.testing.assert_close(small.fn(small.params, x, train=False), full(x))
    assert set(small.params) == {name for name, _ in model.named_parameters()}
    doubled = {name: 2 * p for name, p in small.params.items()}
    torch.testing.assert_close(
        small.fn(doubled, x), torch.func.functional_call(small.model, doubled, x)
    )
    assert again.model.first.out_features == 5


# One signature.

ADAPTERS = {
    "linen": linen,
    "haiku": haiku,
    "nnx": ppn,
    "equinox": equinox,
    "keras": ppk,
    "torch": ppt,
}
BETWEEN = {
    "layers": (),
    "activations": (),
    "capture": (),
    "replace": (),
    "couple": (),
    "count": (),
    "shrink": ("masks", "coupling"),
    "rebuild": ("plan",),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_signatures_agree(adapter, name):
    """The model, its variables where it does not own them, our arguments, then the model's."""
    found = inspect.signature(getattr(ADAPTERS[adapter], name)).parameters.values()
    kinds = {k: [p.name for p in found if p.kind is k] for k in inspect._ParameterKind}
    owned = ("variables",) if adapter in ("linen", "haiku") else ()
    first = kinds[inspect.Parameter.POSITIONAL_ONLY]
    assert first == ["model", *owned, *BETWEEN[name]]
    assert kinds[inspect.Parameter.POSITIONAL_OR_KEYWORD] == []
    assert kinds[inspect.Parameter.VAR_POSITIONAL] == ["inputs"]
    assert kinds[inspect.Parameter.VAR_KEYWORD] == ["kwargs"]


# Objects of another framework.


class Plain:
    """No model at all."""


MODELS = {
    "linen": Linen(),
    "haiku": hk.transform(haiku_net),
    "nnx": nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))),
    "equinox": eqx.nn.Linear(3, 2, key=jax.random.key(0)),
    "keras": keras.layers.Dense(2),
    "torch": torch.nn.Linear(3, 2),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("given", [*MODELS, "plain"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_models_of_other_frameworks_are_recognised(adapter, given, name):
    if adapter == given:
        return
    owned = ({},) if adapter in ("linen", "haiku") else ()
    between = (None,) * len(BETWEEN[name])
    options = {"capture": {"layers": []}, "replace": {"at": {}}}.get(name, {})
    call = getattr(ADAPTERS[adapter], name)
    hint = "got Plain$" if given == "plain" else f"use purepruning_interop.{given} for it$"
    if (adapter, given) == ("nnx", "plain"):
        hint = "got Plain; merge a graphdef and a state with nnx.merge$"
    model = MODELS.get(given, Plain())
    with pytest.raises(TypeError, match=rf"^{name}\(model[,)].*model must be .*{hint}"):
        call(model, *owned, *between, X, **options)


@pytest.mark.parametrize("given", [name for name in MODELS if name != "torch"])
def test_torch_trains_modules_of_torch(given):
    model, sgd = MODELS[given], torch.optim.SGD([torch.ones(1, requires_grad=True)])
    for call in (
        lambda: ppt.masked_call(model, {}, X),
        lambda: ppt.apply_(model, {}),
        lambda: ppt.keep_pruned(model, {}, sgd),
    ):
        with pytest.raises(TypeError, match=rf"use purepruning_interop.{given} for it$"):
            call()


def test_a_class_in_place_of_a_model():
    with pytest.raises(TypeError, match="got the class Linen; pass an instance of it"):
        linen.layers(Linen, {}, X)


@pytest.mark.parametrize("given", [name for name in MODELS if name != "equinox"])
def test_models_are_no_functions(given):
    message = rf"fn must be a function of params and inputs.*use purepruning_interop.{given}"
    for call in (pp.couple, pp.count, functools.partial(pp.rebuild)):
        arguments = (pp.Plan({}, {}, ()),) if call is not pp.couple and call is not pp.count else ()
        with pytest.raises(TypeError, match=message):
            call(copy.copy(MODELS[given]), {"w": jnp.ones(3)}, *arguments, X)
