"""Quantizers as pure functions, for JAX and PyTorch, by the same rules as pruning.

Nothing is wrapped or replaced: latent weights stay the parameters that the optimizer sees, and are
quantised inside the loss. Activations are quantised by functions that an adapter's ``replace`` puts
at the inputs and outputs of layers (*sites*, named ``"conv1:input"``, ``"relu1:output"``).

    config = pp.resolve_quantization(rules, layers, activations)
    state = quantize.qat.init(params, config)

    def loss(params, state, x, y):
        weights = quantize.qat.weights(params, state, config)
        at = quantize.qat.activations(state, config)
        logits, seen = linen.replace(model, weights, x, at=at)
        return cross_entropy(logits, y), seen

    (value, seen), grads = jax.value_and_grad(loss, has_aux=True)(params, state, x, y)
    state = quantize.qat.update(state, seen, config)

Each quantizer is a module of a few functions with the same names:

- ``weights(params, state, config) -> params``, gradients straight through;
- ``activations(state, config) -> {site: function}``, for ``replace``;
- ``init`` and ``update``, where there is a state.

``naive`` (weights by their largest magnitude), ``qat`` (ranges of weights as they are, of
activations as a moving average), ``dorefa``, ``bnn``, ``lsq`` (trained scales), ``lsq_plus``
(and offsets), ``ptq`` (ranges of activations from ``observers``, after training). What they are
made of: :func:`fake_quantize`, :func:`affine` and :func:`symmetric`.

Before quantising, :func:`fold_batch_norms` folds the norms that an adapter's ``batch_norms`` found
into the layers in front of them; the model stays the same.

After pruning: ``apply_masks(qat.weights(params, state, config), masks)``; quantise, then mask.
"""

from purepruning.quantize import (
    bnn,
    dorefa,
    integers,
    lsq,
    lsq_plus,
    naive,
    observers,
    ptq,
    qat,
)
from purepruning.quantize.batch_norm import BatchNorm, fold_batch_norm, fold_batch_norms
from purepruning.quantize.config import QuantizationConfig, Target, resolve_quantization
from purepruning.quantize.fake import Scale, affine, fake_quantize, symmetric

__all__ = [
    # Quantizers.
    "naive",
    "qat",
    "ptq",
    "dorefa",
    "bnn",
    "lsq",
    "lsq_plus",
    # Weights as integers.
    "integers",
    # Ranges of activations.
    "observers",
    # Batch norms.
    "fold_batch_norms",
    "fold_batch_norm",
    "BatchNorm",
    # What they are made of.
    "fake_quantize",
    "affine",
    "symmetric",
    "Scale",
    "QuantizationConfig",
    "Target",
    "resolve_quantization",
]
