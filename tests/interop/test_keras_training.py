"""Keras models trained by ``fit`` under masks, which the optimizer holds."""

import jax
import keras
import numpy as np
import pytest

import purepruning as pp
from purepruning_interop import keras as adapter
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion", "rank_promotion")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 4)).astype(np.float32)
Y = RNG.normal(size=(16, 2)).astype(np.float32)


def net():
    layers = [keras.layers.Dense(8, activation="tanh", name="a"), keras.layers.Dense(2, name="b")]
    return keras.Sequential([keras.Input((4,)), *layers], name="net")


def compiled(optimizer, model=None):
    model = model or net()
    model.compile(adapter.KeepPruned(optimizer), loss="mse")
    return model


def config_of(model, sparsity=0.5):
    return pp.resolve(sparsity, adapter.layers(model))


def fit(model, epochs=1, **options):
    return model.fit(
        X, Y, epochs=epochs, batch_size=4, shuffle=False, verbose=0, **options
    ).history["loss"]


def pruned(model):
    """The masks by the zeros of the weights themselves."""
    return {path: np.asarray(x) != 0 for path, x in adapter.params(model).items() if x.ndim == 2}


def assert_pruned(model, masks):
    for path, x in adapter.params(model).items():
        if masks.get(path) is not None:
            np.testing.assert_array_equal(np.asarray(x)[~np.asarray(masks[path])], 0.0)


class Watch(keras.callbacks.Callback):
    """Looks at the weights after every epoch; with a mask, how many are off it."""

    def __init__(self, look):
        super().__init__()
        self.look, self.seen = look, []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(self.look(self.model))


of = keras.optimizers
OPTIMIZERS = {
    "momentum": lambda: of.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: of.Adam(0.1),
    "adamw": lambda: of.AdamW(0.1, weight_decay=0.1),
    "accumulation": lambda: of.Adam(0.1, weight_decay=0.1, gradient_accumulation_steps=2),
    "averages": lambda: of.SGD(0.1, momentum=0.9, use_ema=True, ema_momentum=0.5),
    "averages written": lambda: of.Adam(0.1, use_ema=True, ema_overwrite_frequency=3),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n == "adam")) for n in OPTIMIZERS]
)
def test_pruned_weights_are_zero_after_every_epoch_and_the_rest_is_trained(name):
    model = compiled(OPTIMIZERS[name]())
    fit(model)  # momentum and averages of what is pruned later on are not zero
    masks = pp.level(adapter.params(model), None, config_of(model))
    adapter.set_masks(model, masks)
    before = adapter.params(model)
    watch = Watch(lambda model: assert_pruned(model, masks))
    fit(model, epochs=2, callbacks=[watch])
    assert len(watch.seen) == 2
    assert_pruned(model, masks)  # once averages of weights were written, at the end of fit
    after = adapter.params(model)
    for path in ("a/kernel", "b/kernel"):
        moved = np.asarray(after[path] != before[path])
        np.testing.assert_array_equal(moved, np.asarray(masks[path]))


def test_without_masks_a_step_is_that_of_the_inner_optimizer():
    one, two = compiled(of.Adam(0.1)), net()
    two.compile(of.Adam(0.1), loss="mse")
    adapter.load(two, adapter.params(one))
    assert fit(one, 2) == fit(two, 2)
    for path, x in adapter.params(one).items():
        np.testing.assert_array_equal(x, adapter.params(two)[path])


def test_the_gradient_of_a_masked_step_is_that_by_hand():
    model = compiled(of.SGD(0.5))
    kernel = np.ones((4, 8), bool)
    kernel[1] = False
    adapter.set_masks(model, {"a/kernel": kernel})
    before = {path: np.asarray(x) for path, x in adapter.params(model).items()}
    model.fit(X, Y, batch_size=16, verbose=0)
    hidden = np.tanh(X @ before["a/kernel"] + before["a/bias"])
    slope = 2 * (hidden @ before["b/kernel"] + before["b/bias"] - Y) / Y.size
    back = slope @ before["b/kernel"].T * (1 - hidden**2)
    expected = np.where(kernel, before["a/kernel"] - 0.5 * X.T @ back, 0)
    np.testing.assert_allclose(adapter.params(model)["a/kernel"], expected, rtol=1e-4, atol=1e-6)


def test_new_masks_take_effect_in_the_compiled_step():
    """A mask that was baked into the trace would let the first ones through."""
    model = compiled(of.SGD(0.1, momentum=0.9))
    first = {"a/kernel": RNG.random((4, 8)) < 0.5}
    second = {"a/kernel": ~first["a/kernel"]}

    class Change(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            adapter.set_masks(self.model, first if epoch < 2 else second)

    watch = Watch(lambda model: pruned(model)["a/kernel"])
    fit(model, epochs=4, callbacks=[Change(), watch])
    for seen, mask in zip(watch.seen, [first, first, second, second], strict=True):
        np.testing.assert_array_equal(seen, mask["a/kernel"])
    assert list(adapter.get_masks(model)) == ["a/kernel"]
    np.testing.assert_array_equal(adapter.get_masks(model)["a/kernel"], second["a/kernel"])


def kept(model):
    return {path: int(m.sum()) for path, m in pruned(model).items()}


@pytest.mark.parametrize("every", ["batch", "epoch"])
def test_a_callback_prunes_on_schedule(every):
    """Counts of 32 and 16 weights, by the formula of Zhu and Gupta."""
    model = compiled(of.Adam(0.01))
    steps = 4 if every == "batch" else 1  # of an epoch
    schedule = adapter.PolynomialDecay(0.0, 0.5, 0, 3 * steps, frequency=steps)
    callback = adapter.PruneOnSchedule(pp.level, schedule, config_of(model), every=every)
    watch = Watch(kept)
    fit(model, epochs=5, callbacks=[callback, watch])
    shares = [0.5 - 0.5 * (1 - i / 3) ** 3 for i in (0, 1, 2, 3, 3)]
    expected = [
        {"a/kernel": 32 - int(32 * s + 1e-9), "b/kernel": 16 - int(16 * s + 1e-9)} for s in shares
    ]
    assert watch.seen == expected


def test_a_step_that_is_due_ranks_the_weights_before_it():
    model = compiled(of.SGD(0.1))
    seen = []

    def level(params, stats, config):
        seen.append({path: np.asarray(x) for path, x in params.items()})
        return pp.level(params, stats, config)

    schedule = pp.agp(begin_step=1, end_step=5, frequency=2)
    twin = net()
    twin.compile(of.SGD(0.1), loss="mse")
    adapter.load(twin, adapter.params(model))
    callback = adapter.PruneOnSchedule(level, schedule, config_of(model))
    model.fit(X, Y, batch_size=2, shuffle=False, verbose=0, callbacks=[callback])
    assert len(seen) == 3
    twin.fit(X[:2], Y[:2], batch_size=2, shuffle=False, verbose=0)
    for path, x in adapter.params(twin).items():
        np.testing.assert_allclose(seen[0][path], x, rtol=1e-5, atol=1e-7)


# Keras itself reads its variables by np.array, which then asks for a copy.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn:DeprecationWarning")
def test_saving_resumes_masks_and_the_schedule(tmp_path):
    model = compiled(of.Adam(0.01))
    schedule = adapter.PolynomialDecay(0.0, 0.5, 0, 8, frequency=4)
    callback = adapter.PruneOnSchedule(pp.level, schedule, config_of(model))
    fit(model, callbacks=[callback])  # steps 0 to 3
    fit(model, callbacks=[callback])  # goes on: steps 4 to 7
    masks = adapter.get_masks(model)
    assert kept(model) == {"a/kernel": 32 - 14, "b/kernel": 16 - 7}
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, adapter.KeepPruned)
    assert adapter.get_masks(loaded).keys() == masks.keys()
    for path, mask in adapter.get_masks(loaded).items():
        np.testing.assert_array_equal(mask, masks[path])
    again = adapter.PruneOnSchedule(pp.level, schedule, config_of(loaded))
    for one, other in ((model, callback), (loaded, again)):
        fit(one, callbacks=[other])  # step 8 is the last event
        assert kept(one) == {"a/kernel": 16, "b/kernel": 8}
    for path, x in adapter.params(model).items():
        np.testing.assert_allclose(adapter.params(loaded)[path], x, rtol=1e-5, atol=1e-7)


def test_several_steps_at_once():
    model = net()
    optimizer = adapter.KeepPruned(of.SGD(0.1))
    model.compile(optimizer, loss="mse", steps_per_execution=2)
    schedule = adapter.ConstantSparsity(0.5, 3)
    callback = adapter.PruneOnSchedule(pp.level, schedule, config_of(model))
    fit(model, callbacks=[callback])
    assert kept(model) == {"a/kernel": 16, "b/kernel": 8}


def test_half_precision_computes_in_bfloat16_and_prunes_float32():
    policy = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    layers = [keras.layers.Dense(8, dtype=policy, name="a"), keras.layers.Dense(2, name="b")]
    model = compiled(of.Adam(0.1), keras.Sequential([keras.Input((4,)), *layers], name="net"))
    params = adapter.params(model)
    assert {str(x.dtype) for x in params.values()} == {"float32"}
    _, outputs = adapter.capture(model, X, layers=["a"])
    assert str(outputs["a"].dtype) == "bfloat16"
    masks = pp.level(params, None, config_of(model))
    adapter.set_masks(model, masks)
    fit(model, epochs=2)
    assert_pruned(model, masks)
    coupling = adapter.couple(model, X)
    chosen = coupling.masks([1, 2], adapter.params(model))
    small = adapter.shrink(model, chosen, coupling, X)
    masked = pp.apply_masks(adapter.params(model), chosen)
    expected = adapter.function(model)[0](masked, X)
    np.testing.assert_allclose(small.fn(small.params, X), expected, rtol=2e-2, atol=2e-2)


def test_loss_scaling_goes_around():
    scaled = of.LossScaleOptimizer(adapter.KeepPruned(of.SGD(0.1, momentum=0.9)))
    model = net()
    model.compile(scaled, loss="mse")
    masks = pp.level(adapter.params(model), None, config_of(model))
    adapter.set_masks(model, masks)
    fit(model, epochs=2)
    assert_pruned(model, masks)


def test_frozen_layers_are_pruned_once():
    model = net()
    model.get_layer("a").trainable = False
    model = compiled(of.SGD(0.1), model)
    masks = pp.level(adapter.params(model), None, config_of(model))
    adapter.set_masks(model, masks)
    assert_pruned(model, masks)
    assert list(adapter.get_masks(model)) == ["b/kernel"]
    fit(model)
    assert_pruned(model, masks)


def test_what_is_wrong_is_named():
    model = net()
    with raises(ValueError, "compiled with KeepPruned(optimizer)", "a model that is not compiled"):
        adapter.set_masks(model, {})
    model.compile(of.SGD(), loss="mse")
    with raises(ValueError, "got SGD", "call model.compile(KeepPruned("):
        adapter.get_masks(model)
    callback = adapter.PruneOnSchedule(pp.level, pp.one_shot(), config_of(model))
    with raises(ValueError, "compiled with KeepPruned(optimizer)"):
        fit(model, callbacks=[callback])
    compiled(of.SGD(), model)
    with raises(KeyError, "a/kernal", "nearest: 'a/kernel'"):
        adapter.set_masks(model, {"a/kernal": np.ones((4, 8), bool)})
    with raises(TypeError, "KeepPruned: inner_optimizer must be a Keras optimizer", "'adam'"):
        adapter.KeepPruned("adam")
    model.get_layer("a").trainable = False
    frozen = compiled(of.SGD(), model)
    frozen.optimizer.build(frozen.trainable_variables)
    frozen.get_layer("a").trainable = True
    with raises(ValueError, "built without", "compile the model again"):
        adapter.get_masks(frozen)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: adapter.PolynomialDecay(0.0, 1.0, 0, 3), ValueError, "final_sparsity"),
        (lambda: adapter.PolynomialDecay(0.5, 0.2, 0, 3), ValueError, "at most final_sparsity"),
        (
            lambda: adapter.PolynomialDecay(0.0, 0.5, 3, 2),
            ValueError,
            "begin_step must be at most end_step, got 3 and 2",
        ),
        (lambda: adapter.PolynomialDecay(0.0, 0.5, 0, -1), ValueError, "end_step must be at least"),
        (lambda: adapter.PolynomialDecay(0.0, 0.5, 0, 3, power=0), ValueError, "power"),
        (lambda: adapter.PolynomialDecay(0.0, 0.5, 0, 2**40), ValueError, "until end_step"),
        (
            lambda: jax.jit(lambda p: adapter.PolynomialDecay(0.0, 0.5, 0, 3, p) and p)(3.0),
            TypeError,
            "power must be a known number",
        ),
        (lambda: adapter.ConstantSparsity(0.5, 0, frequency=0), ValueError, "frequency"),
        (
            lambda: adapter.ConstantSparsity(0.5, 4, 2),
            ValueError,
            "begin_step must be at most end_step, got 4 and 2",
        ),
        (lambda: adapter.ConstantSparsity(1.0, 4), ValueError, "[0, 1)"),
    ],
)
def test_schedules_check_what_tfmot_checks(call, error, words):
    with raises(error, words):
        call()


def test_schedules_by_the_arguments_of_tfmot():
    """By the formula of its documentation; at the end, where its frequency would miss it."""
    events = adapter.PolynomialDecay(0.2, 0.8, 2, 10, power=2, frequency=3).events(None, None)
    steps = [2, 5, 8, 10]
    shares = [0.8 - 0.6 * (1 - (t - 2) / 8) ** 2 for t in steps]
    np.testing.assert_allclose(events, np.transpose([steps, shares]), rtol=1e-12)
    assert adapter.PolynomialDecay(0.2, 0.8, 4, 4).events(None, None).tolist() == [[4.0, 0.8]]
    assert adapter.ConstantSparsity(0.3, 7).events(None, None) == [(7, 0.3)]
