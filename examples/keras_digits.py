"""A Keras model of digits: pruned to 80 % while ``fit`` runs, then channels are cut out of it.

    python examples/keras_digits.py

Nothing is wrapped but the optimizer, which holds the masks; the callback makes them anew on a
schedule with the arguments of tfmot's. The small model is one like any other: it is trained on,
saved and loaded. Writes ``keras_digits.keras``.
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported

import keras
import numpy as np
from rich.console import Console
from sklearn.datasets import load_digits

import purepruning as pp
from purepruning_interop import keras as ppk

EPOCHS, BATCH = 10, 64
Arrays = tuple[np.ndarray, np.ndarray]


def data() -> tuple[Arrays, Arrays]:
    """Returns images and labels to train on, and others to test with."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, :, :, None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def network() -> keras.Model:
    """Returns a functional model; a sequential or subclassed one is pruned in the same way."""
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 1))
    for i, channels in enumerate((16, 32)):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False, name=f"conv{i + 1}")(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9, name=f"norm{i + 1}")(x))
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(64, activation="relu", name="hidden")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10, name="classifier")(x))


def compiled(model: keras.Model, rate: float) -> keras.Model:
    """Returns the model, ready for ``fit``: its optimizer keeps pruned weights at zero."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = ppk.KeepPruned(keras.optimizers.AdamW(rate))
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def main() -> None:
    console = Console()
    keras.utils.set_random_seed(0)
    train, test = data()
    steps = -(-len(train[0]) // BATCH) * EPOCHS

    def accuracy(model: keras.Model) -> str:
        return f"{model.evaluate(*test, verbose=0)[1]:.1%}"

    # Single weights, gradually, in one fit.
    model = compiled(network(), 3e-3)
    config = pp.resolve(0.8, ppk.layers(model))
    schedule = ppk.PolynomialDecay(0.0, 0.8, steps // 6, steps * 2 // 3, frequency=10)
    callback = ppk.PruneOnSchedule(pp.level, schedule, config)
    model.fit(*train, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=[callback])
    console.print(f"weights pruned while training: test accuracy {accuracy(model)}")
    console.print(pp.summarize(ppk.params(model), ppk.get_masks(model), config.layers))

    # Half of the multiply-adds, by whole channels of a dense model.
    dense = compiled(network(), 3e-3)
    dense.fit(*train, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    x = test[0][:1]
    coupling = ppk.couple(dense, x)
    rules = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    layers = ppk.layers(dense)
    config = pp.resolve(rules, layers, coupling=coupling, scope="global", cost="macs")
    masks = pp.l1_norm(ppk.params(dense), None, config)
    small = ppk.shrink(dense, masks, coupling, x)
    before, after = small.report.macs
    console.print(f"dense: test accuracy {accuracy(dense)}; {before:,} multiply-adds")
    trained = compiled(small.model, 1e-3)
    console.print(f"small: test accuracy {accuracy(trained)}; {after:,} multiply-adds")
    trained.fit(*train, batch_size=BATCH, epochs=3, verbose=0)
    trained.save("keras_digits.keras")
    loaded = keras.saving.load_model("keras_digits.keras")
    console.print(f"trained on, saved and loaded: test accuracy {accuracy(loaded)}")


if __name__ == "__main__":
    main()
