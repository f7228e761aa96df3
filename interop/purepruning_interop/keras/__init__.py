"""Keras 3 on JAX: layer tables, outputs of layers, coupling, shrinking, training with ``fit``.

Keras chooses its backend when it is imported, by the environment variable ``KERAS_BACKEND``; this
adapter is for ``jax``, and says so where it finds another one. It never imports TensorFlow.
"""

from purepruning.versions import require

require("keras", __name__)

from purepruning_interop.keras.backend import require_jax

require_jax(__name__)

from purepruning_interop.keras.capture import activations, capture, replace
from purepruning_interop.keras.layers import layers
from purepruning_interop.keras.optimizer import KeepPruned, get_masks, set_masks
from purepruning_interop.keras.schedule import ConstantSparsity, PolynomialDecay, PruneOnSchedule
from purepruning_interop.keras.shrink import count, couple, rebuild, shrink
from purepruning_interop.keras.variables import function, load, params

__all__ = [
    "layers",
    "params",
    "load",
    "activations",
    "capture",
    "replace",
    "function",
    "couple",
    "count",
    "shrink",
    "rebuild",
    "KeepPruned",
    "get_masks",
    "set_masks",
    "PruneOnSchedule",
    "ConstantSparsity",
    "PolynomialDecay",
]
