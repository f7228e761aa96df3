"""Flax Linen: nanodl, diffusers, recurrentgemma and flaxmodels, small.

::

    pip install --no-deps nanodl diffusers==0.35.2 recurrentgemma flaxmodels
    pip install pillow scipy "typeguard<3" sentencepiece

The first needs no more than Flax; diffusers wants the small packages of ``transformers_flax``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
from zoo import old_names

from tests.coupling.entry import Entry, draw_inputs, fill, normal, tokens

PACKAGES = ("flax", "nanodl", "diffusers", "recurrentgemma", "flaxmodels")


def model(
    name: str,
    family: str,
    module: str,
    make: Callable[[Any], Any],
    *inputs: Any,
    call: Callable[..., Any] = lambda made, *inputs: made(*inputs),
    **options: Any,
) -> Entry:
    """The entry of ``make(module)``, a Linen module, called as ``call(made, *inputs)`` says."""

    def build(key):
        old_names.allow()
        made = make(importlib.import_module(module))
        drawn = draw_inputs(inputs, key)
        keys = dict.fromkeys(("params", "dropout", "noise"), key)

        def init(keys, *inputs):
            return made.init(keys, *inputs, method=call, **options)

        def fn(variables, *inputs):
            outputs = made.apply(variables, *inputs, method=call, rngs=keys, **options)
            return jax.tree.leaves(outputs)[0]

        return fn, fill(jax.eval_shape(init, keys, *drawn), key), drawn

    return Entry(name, "linen", family, build)


WORDS = 30
SMALL = {"num_layers": 2, "hidden_dim": 32, "num_heads": 4, "feedforward_dim": 48, "dropout": 0.0}
TEXT = SMALL | {"vocab_size": WORDS, "embed_dim": 32, "max_length": 16}
TEXT |= {"start_token": 0, "end_token": 1}
IMAGES = SMALL | {"patch_size": (4, 4), "n_outputs": 5}
WINDOWS = {"num_groups": 2, "window_size": 4, "shift_size": 2}
IDS, TARGETS = tokens(2, 8, below=WORDS), tokens(2, 8, below=WORDS)


def nanodl(name: str, family: str, cls: str, inputs: tuple, **options: Any) -> Entry:
    make = lambda module: getattr(module, cls)(**options)  # noqa: E731
    return model(f"nanodl_{name}", family, "nanodl", make, *inputs)


def unet(diffusers):
    return diffusers.FlaxUNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=16,
        dropout=0.0,
    )


def autoencoder(diffusers):
    return diffusers.FlaxAutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
    )


def griffin(recurrentgemma):
    common = importlib.import_module("recurrentgemma.common")
    kinds = common.TemporalBlockType
    config = common.GriffinConfig(
        vocab_size=WORDS,
        width=32,
        mlp_expanded_width=48,
        num_heads=4,
        block_types=(kinds.RECURRENT, kinds.ATTENTION, kinds.RECURRENT),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=8,
        logits_soft_cap=30.0,
        scan_type=common.ScanType.LINEAR_NATIVE,
    )
    return recurrentgemma.Griffin(config)


def call_griffin(made, ids):
    positions = jax.numpy.broadcast_to(jax.numpy.arange(ids.shape[1])[None], ids.shape)
    return made(ids, positions)[0]


MODELS = (
    nanodl("gpt3", "gpt", "GPT3", (IDS,), **TEXT),
    nanodl("gpt4", "experts", "GPT4", (IDS,), **TEXT, num_experts=3, top_k=2),
    nanodl("lamda", "gpt", "LaMDA", (IDS,), **TEXT),
    nanodl("llama3", "llama", "Llama3", (IDS,), **TEXT, num_groups=2),
    nanodl("gemma", "llama", "Gemma", (IDS,), **TEXT | {"feedforward_dim": 32}, num_groups=2),
    nanodl("mistral", "llama", "Mistral", (IDS,), **TEXT, **WINDOWS),
    nanodl("mixtral", "experts", "Mixtral", (IDS,), **TEXT, **WINDOWS),
    nanodl("t5", "t5", "T5", (IDS, TARGETS), **TEXT),
    nanodl("transformer", "bart", "Transformer", (IDS, TARGETS), **TEXT),
    nanodl("whisper", "whisper", "Whisper", (normal(2, 8, 32), TARGETS), **TEXT),
    nanodl("vit", "vit", "ViT", (normal(2, 16, 16, 3),), **IMAGES | {"feedforward_dim": 32}),
    nanodl("mixer", "mixer", "Mixer", (normal(2, 16, 16, 3),), **IMAGES),
    nanodl(
        "gat",
        "graph",
        "GAT",
        (normal(5, 7), lambda key: jax.numpy.eye(5)[:, ::-1] + jax.numpy.eye(5)),
        nfeat=7,
        nhid=8,
        nclass=3,
        dropout_rate=0.0,
        alpha=0.2,
        nheads=2,
    ),
    nanodl(
        "unet",
        "diffusion",
        "UNet",
        (normal(2, 16, 16, 3), lambda key: jax.numpy.full((2, 1, 1, 1), 0.3)),
        image_size=(16, 16),
        widths=[8, 16],
        block_depth=2,
        embed_dims=8,
        embed_min_freq=1.0,
        embed_max_freq=100.0,
    ),
    model(
        "diffusers_unet",
        "diffusion",
        "diffusers",
        unet,
        normal(2, 4, 8, 8),
        normal(2),
        normal(2, 5, 16),
    ),
    model("diffusers_autoencoder", "autoencoder", "diffusers", autoencoder, normal(2, 3, 16, 16)),
    model(
        "recurrentgemma",
        "griffin",
        "recurrentgemma.jax",
        griffin,
        tokens(2, 6, below=WORDS),
        call=call_griffin,
    ),
    model(
        "flaxmodels_resnet18",
        "resnet",
        "flaxmodels",
        lambda models: models.ResNet18(output="logits", pretrained=None, num_classes=5),
        normal(2, 32, 32, 3),
        call=lambda made, x: made(x, train=False),
    ),
    model(
        "flaxmodels_vgg16",
        "vgg",
        "flaxmodels",
        lambda models: models.VGG16(include_head=False, pretrained=None),
        normal(2, 32, 32, 3),
        call=lambda made, x: made(x, train=False),
    ),
    model(
        "flaxmodels_stylegan2",
        "gan",
        "flaxmodels",
        lambda models: models.stylegan2.Generator(
            resolution=16, z_dim=16, w_dim=16, fmap_base=128, fmap_max=16, num_mapping_layers=2
        ),
        normal(2, 16),
        call=lambda made, z: made(z, train=False, noise_mode="const"),
    ),
    model(
        "flaxmodels_discriminator",
        "gan",
        "flaxmodels",
        lambda models: models.stylegan2.Discriminator(resolution=16, fmap_base=128, fmap_max=16),
        normal(4, 16, 16, 3),
    ),
)
