"""Haiku: the networks it comes with at full size, mlp-gpt-jax and progen-transformer.

::

    pip install dm-haiku
    pip install --no-deps mlp-gpt-jax progen-transformer haiku-geometric jraph jmp
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from tests.coupling.entry import Entry, draw_inputs, fill, normal, tokens

PACKAGES = ("dm-haiku", "mlp-gpt-jax", "progen-transformer")


def network(name: str, family: str, make: Callable[[Any], Any], size: int = 32) -> Entry:
    """The entry of ``make(hk.nets)``, which is called with images and ``is_training``."""

    def build(key):
        import haiku as hk

        def forward(x, is_training):
            return make(hk.nets)(x, is_training=is_training)

        return transformed(hk.transform_with_state(forward), (normal(2, size, size, 3),), key)

    return Entry(f"haiku_net_{name}", "haiku", family, build)


def transformed(made: Any, inputs: tuple, key: jax.Array) -> tuple:
    drawn = draw_inputs(inputs, key)
    params, state = jax.eval_shape(lambda: made.init(key, *drawn, is_training=True))

    def fn(variables, *inputs):
        params, state = variables["params"], variables["state"]
        return made.apply(params, state, None, *inputs, is_training=False)[0]

    return fn, fill({"params": params, "state": state}, key), drawn


def one_example(made: Any, key: jax.Array) -> tuple:
    """What a ``build`` returns for a transformed function of one sequence."""
    drawn = draw_inputs((tokens(2, 8, below=30),), key)
    params = jax.eval_shape(lambda: made.init(key, drawn[0][0]))

    def fn(params, ids):
        return jax.vmap(lambda ids: made.apply(params, key, ids))(ids)

    return fn, fill(params, key), drawn


def mlp_gpt(key, attention=None):
    from mlp_gpt_jax import TransformedMLPGpt

    made = TransformedMLPGpt(num_tokens=30, dim=16, depth=2, seq_len=8, attn_dim=attention)
    return one_example(made, key)


def progen(key):
    from progen_transformer import ProGen

    sizes = {"num_tokens": 30, "dim": 16, "seq_len": 8, "depth": 3, "window_size": 4}
    made = ProGen(**sizes, global_mlp_depth=1, heads=2, dim_head=8, ff_glu=True)
    return one_example(made, key)


MODELS = (
    network("resnet18", "resnet", lambda nets: nets.ResNet18(5)),
    network("resnet50", "resnet", lambda nets: nets.ResNet50(5)),
    network("resnet50_v2", "resnet", lambda nets: nets.ResNet50(5, resnet_v2=True)),
    network("mobilenet", "mobilenet", lambda nets: nets.MobileNetV1(num_classes=5)),
    Entry("mlp_gpt", "haiku", "mixer", mlp_gpt),
    Entry("mlp_gpt_attention", "haiku", "mixer", lambda key: mlp_gpt(key, attention=8)),
    Entry("progen", "haiku", "gpt", progen),
)
