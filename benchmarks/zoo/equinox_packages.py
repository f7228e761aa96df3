"""Equinox: equimo, eqxvision, jaxonmodels, esm2quinox, pdequinox and PaLM-jax.

::

    pip install --no-deps equimo eqxvision jaxonmodels esm2quinox pdequinox palm-jax
    pip install einops beartype ftfy wcwidth pydantic
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import types
import unittest.mock
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests.coupling.entry import Entry, draw_inputs, fill, normal, tokens

PACKAGES = ("equinox", "equimo", "eqxvision", "jaxonmodels", "esm2quinox", "pdequinox", "palm-jax")


def model(
    name: str,
    family: str,
    module: str,
    make: Callable[[Any, jax.Array], Any],
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    stateful: bool = False,
    concrete: bool = False,
) -> Entry:
    """The entry of ``make(module, key)``: an Equinox module, or one and its state.

    It is called on one example; ``call(made, *inputs)`` says how, if ``made(*inputs)`` will not do.
    ``concrete`` ones cannot be made under a trace.
    """

    def build(key):
        import equinox as eqx

        _old_equinox()
        imported = _import(module)  # not while tracing: some make keys then
        if concrete:
            made = make(imported, jax.random.PRNGKey(0))
        else:
            made = eqx.filter_eval_shape(lambda key: make(imported, key), key)
        made, state = made if stateful else (made, None)
        arrays, static = eqx.partition((eqx.nn.inference_mode(made), state), is_array)

        def fn(arrays, *inputs):
            made, state = eqx.combine(arrays, static)
            one = made if call is None else functools.partial(call, made)
            if stateful:
                run = jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
                return run(*inputs, state)[0]
            return jax.vmap(one, axis_name="batch")(*inputs)

        return fn, fill(arrays, key, features=0), draw_inputs(inputs, key)

    return Entry(name, "equinox", family, build)


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def _import(module: str) -> Any:
    """A module; some of them import torch, to convert weights, and do without."""
    missing = {} if importlib.util.find_spec("torch") else {"torch": unittest.mock.MagicMock()}
    with unittest.mock.patch.dict(sys.modules, missing):
        return importlib.import_module(module)


def equimo(name: str, family: str, cls: str, size: int = 32, **options: Any) -> Entry:
    def make(models, key):
        return getattr(models, cls)(**options, num_classes=5, key=key)

    return model(
        f"equimo_{name}", family, "equimo.models", make, normal(2, 3, size, size), call=with_key
    )


def with_key(made: Any, *inputs: Any) -> Any:
    if "key" not in inspect.signature(made.__call__).parameters:
        return made(*inputs)
    return made(*inputs, key=jax.random.PRNGKey(0))


def jaxonmodels(name: str, family: str, module: str, of: str, **options: Any) -> Entry:
    return model(
        f"jaxonmodels_{name}",
        family,
        f"jaxonmodels.models.{module}",
        lambda models, key: getattr(models, of)(key, **options),
        normal(2, 3, 32, 32),
        call=with_key,
        stateful=True,
    )


def eqxvision(
    module: str, of: str, family: str, size: int = 32, *, concrete: bool = False, **options: Any
) -> Entry:
    return model(
        f"eqxvision_{of}",
        family,
        f"eqxvision.models.classification.{module}",
        lambda models, key: getattr(models, of)(num_classes=5, key=key, **options),
        normal(2, 3, size, size),
        call=with_key,
        concrete=concrete,
    )


def _old_equinox() -> None:
    """Puts back ``equinox.experimental.BatchNorm``, which held its own statistics."""
    import equinox as eqx

    if "equinox.experimental" in sys.modules:
        return

    class BatchNorm(eqx.Module):
        weight: jax.Array
        bias: jax.Array
        mean: jax.Array
        var: jax.Array
        eps: float = eqx.field(static=True)

        def __init__(self, input_size, axis_name, eps=1e-5, **_):
            self.weight, self.bias = jnp.ones(input_size), jnp.zeros(input_size)
            self.mean, self.var = jnp.zeros(input_size), jnp.ones(input_size)
            self.eps = eps

        def __call__(self, x, *, key=None):
            rest = (-1,) + (1,) * (x.ndim - 1)
            x = (x - self.mean.reshape(rest)) / jnp.sqrt(self.var.reshape(rest) + self.eps)
            return x * self.weight.reshape(rest) + self.bias.reshape(rest)

    eqx.experimental = types.ModuleType("equinox.experimental")
    eqx.experimental.BatchNorm = BatchNorm
    sys.modules["equinox.experimental"] = eqx.experimental


def pde(name: str, of: str, **options: Any) -> Entry:
    return model(
        f"pdequinox_{name}",
        "pde",
        "pdequinox.arch",
        lambda arch, key: getattr(arch, of)(2, 2, 2, **options, key=key),
        normal(2, 2, 16, 16),
    )


STAGES = {"dims": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
VIT = {
    "img_size": 32,
    "in_channels": 3,
    "dim": 24,
    "num_heads": [4],
    "depths": [2],
    "patch_size": 8,
}

MODELS = (
    equimo("vit", "vit", "VisionTransformer", **VIT),
    equimo("vit_registers", "vit", "VisionTransformer", **VIT, reg_tokens=2, init_values=0.1),
    equimo("convnext", "convnext", "ConvNeXt", in_channels=3, **STAGES),
    equimo("attnet", "attention-conv", "AttNet", 224, in_channels=3, **STAGES),
    equimo("mobilenetv3", "mobilenet", "mobilenetv3_small"),
    equimo(
        "mlla",
        "linear-attention",
        "Mlla",
        img_size=32,
        in_channels=3,
        dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
    ),
    equimo(
        "vssd",
        "state-space",
        "Vssd",
        img_size=32,
        in_channels=3,
        dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        attentions_layers=("mamba2mixer", "attention"),
    ),
    equimo(
        "partialformer",
        "partialformer",
        "PartialFormer",
        56,
        img_size=56,
        in_channels=3,
        dim=16,
        num_heads=[2, 4],
        depths=[1, 1],
        foreground_ratios=(0.4, 0.2),
    ),
    equimo("iformer", "iformer", "iformer_t", 64),
    equimo("reduceformer", "reduceformer", "reduceformer_backbone_b1", 64),
    jaxonmodels("resnet18", "resnet", "resnet", "_resnet18", n_classes=5),
    jaxonmodels("resnext50", "resnext", "resnet", "_resnext50_32x4d", n_classes=5),
    jaxonmodels("efficientnet_b0", "efficientnet", "efficientnet", "_efficientnet_b0", n_classes=5),
    jaxonmodels("swin_t", "swin", "swin_transformer", "_swin_t", inference=True),
    jaxonmodels("swin_v2_t", "swin", "swin_transformer", "_swin_v2_t", inference=True),
    model(
        "jaxonmodels_mamba",
        "state-space",
        "jaxonmodels.models.mamba",
        lambda mamba, key: mamba.Mamba(n_embd=16, n_dims=30, n_layers=2, key=key),
        tokens(2, 6, below=30),
    ),
    eqxvision("resnet", "resnet18", "resnet"),
    eqxvision("resnet", "resnext50_32x4d", "resnext"),
    eqxvision("densenet", "densenet121", "densenet"),
    eqxvision("googlenet", "googlenet", "inception", 64, aux_logits=False),
    eqxvision("squeezenet", "squeezenet1_1", "squeezenet"),
    eqxvision("shufflenetv2", "shufflenet_v2_x0_5", "shufflenet"),
    eqxvision("mobilenetv2", "mobilenet_v2", "mobilenet"),
    eqxvision("mobilenetv3", "mobilenet_v3_small", "mobilenet"),
    eqxvision("efficientnet", "efficientnet_b0", "efficientnet"),
    eqxvision("regnet", "regnet_y_400mf", "regnet", concrete=True),
    eqxvision("convnext", "convnext_tiny", "convnext"),
    eqxvision("vit", "vit_tiny", "vit", 32, img_size=32, concrete=True),
    model(
        "esm2quinox",
        "bert",
        "esm2quinox",
        lambda esm2, key: esm2.ESM2(2, 32, 4, token_dropout=True, key=key),
        tokens(2, 8, below=20),
        call=lambda made, ids: made(ids + 4).logits,
    ),
    model(
        "palm_jax",
        "palm",
        "palm_jax.palm_lite",
        lambda palm, key: palm.PaLM(num_tokens=30, dim=32, dim_head=8, depth=2, heads=4, key=key),
        tokens(2, 6, below=30),
    ),
    pde("resnet", "ClassicResNet", hidden_channels=8, num_blocks=2),
    pde("modern_resnet", "ModernResNet", hidden_channels=8, num_blocks=2),
    pde("unet", "ClassicUNet", hidden_channels=8, num_levels=2),
    pde("modern_unet", "ModernUNet", hidden_channels=8, num_levels=2),
    pde("fno", "ClassicFNO", hidden_channels=8, num_modes=4, num_blocks=2),
    pde("dilated_resnet", "DilatedResNet", hidden_channels=8, num_blocks=2),
)
