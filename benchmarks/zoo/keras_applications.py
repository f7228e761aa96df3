"""Keras on the JAX backend: keras.applications at full size, and language models of keras-hub.

::

    pip install keras==3.15.1
    pip install --no-deps keras-hub
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp

from tests.coupling.entry import Entry, draw_inputs, fill, normal, tokens

PACKAGES = ("keras", "keras-hub")


def application(name: str, family: str, size: int = 32, **options: Any) -> Entry:
    """The entry of a model of this name, for images of ``size`` pixels and ten classes."""

    def build(key):
        os.environ["KERAS_BACKEND"] = "jax"
        import keras

        keras.config.set_floatx(str(jnp.zeros(()).dtype))
        keras.utils.clear_session(free_memory=False)
        shape = (size, size, 3)
        cls = getattr(keras.applications, name)
        made = cls(
            weights=None, input_shape=shape, classes=10, classifier_activation=None, **options
        )
        return of_model(made, (normal(2, *shape),), key)

    return Entry(f"keras_{name.lower()}", "keras", family, build)


def backbone(name: str, family: str, inputs: dict[str, Any], **sizes: Any) -> Entry:
    """The entry of a backbone of keras-hub, whose output is the last hidden activation."""

    def build(key):
        os.environ["KERAS_BACKEND"] = "jax"
        import keras
        import keras_hub

        keras.config.set_floatx(str(jnp.zeros(()).dtype))
        made = getattr(keras_hub.models, f"{name}Backbone")(**sizes)
        fn, params, drawn = of_model(made, tuple(inputs.values()), key)

        def first(params, *given):
            return jax.tree.leaves(fn(params, dict(zip(inputs, given, strict=True))))[0]

        return first, params, drawn

    return Entry(f"kerashub_{name.lower()}", "keras", family, build)


def of_model(made: Any, inputs: tuple, key: jax.Array) -> tuple:
    """What a ``build`` returns for a Keras model: parameters and statistics by path."""
    trainable, rest = _by_path(made.trainable_variables), _by_path(made.non_trainable_variables)

    def fn(params, *inputs):
        return made.stateless_call(
            [params["trainable"][path] for path in trainable],
            [params["rest"][path] for path in rest],
            *inputs,
            training=False,
        )[0]

    params = {
        "trainable": {path: v.value for path, v in trainable.items()},
        "rest": {path: v.value for path, v in rest.items()},
    }
    filled = fill(params, key)
    for path, variable in trainable.items():  # (height, width, channels, 1): the fan-in is smaller
        if variable.ndim == 4 and variable.shape[-1] == 1 and variable.shape[-2] > 1:
            filled["trainable"][path] *= variable.shape[-2] ** 0.5
    return fn, filled, draw_inputs(inputs, key)


def _by_path(variables: list[Any]) -> dict[str, Any]:
    """Variables by their paths, of which a few are taken more than once."""
    found: dict[str, Any] = {}
    for variable in variables:
        path, n = variable.path, 2
        while path in found:
            path, n = f"{variable.path}#{n}", n + 1
        found[path] = variable
    return found


WORDS = 30
IDS = {"token_ids": tokens(2, 8, below=WORDS), "padding_mask": lambda key: jnp.ones((2, 8), bool)}
SEGMENTS = {"segment_ids": lambda key: jnp.zeros((2, 8), jnp.int32)}
BOTH = {f"{side}_{name}": draw for side in ("encoder", "decoder") for name, draw in IDS.items()}
NO_LENGTH = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "intermediate_dim": 48}
SIZES = NO_LENGTH | {"max_sequence_length": 16}
GROUPED = {"num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 32}
GROUPED |= {"intermediate_dim": 48}

MODELS = (
    backbone("Bert", "bert", IDS | SEGMENTS, **SIZES, vocabulary_size=WORDS, num_segments=2),
    backbone("GPT2", "gpt", IDS, **SIZES, vocabulary_size=WORDS),
    backbone("Bloom", "gpt", IDS, **NO_LENGTH, vocabulary_size=WORDS),
    backbone("Llama", "llama", IDS, **GROUPED, vocabulary_size=WORDS),
    backbone("Mistral", "llama", IDS, **GROUPED, vocabulary_size=WORDS, sliding_window=4),
    backbone("Phi3", "llama", IDS, **GROUPED, vocabulary_size=WORDS, max_sequence_length=16),
    backbone("Mixtral", "experts", IDS, **GROUPED, vocabulary_size=WORDS, num_experts=4, top_k=2),
    backbone("T5", "t5", BOTH, **NO_LENGTH, vocabulary_size=WORDS),
    backbone("Bart", "bart", BOTH, **SIZES, vocabulary_size=WORDS),
    application("VGG16", "vgg"),
    application("ResNet50", "resnet"),
    application("ResNet50V2", "resnet"),
    application("ResNet101", "resnet"),
    application("DenseNet121", "densenet"),
    application("MobileNet", "mobilenet"),
    application("MobileNetV2", "mobilenet"),
    application("MobileNetV3Small", "mobilenet", include_preprocessing=False),
    application("MobileNetV3Large", "mobilenet"),
    application("EfficientNetB0", "efficientnet"),
    application("EfficientNetB3", "efficientnet"),
    application("EfficientNetV2B0", "efficientnet"),
    application("EfficientNetV2S", "efficientnet"),
    application("InceptionV3", "inception", 75),
    application("InceptionResNetV2", "inception", 75),
    application("Xception", "xception", 71),
    application("NASNetMobile", "nasnet"),
    application("ConvNeXtTiny", "convnext"),
)
