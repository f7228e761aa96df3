"""The program with other sizes, as a graph module: the function that writes each operator.

Only operations that something was removed from are touched, and of those only what holds a size.
Parameters and buffers are attributes under their own names, so that state dicts keep their keys.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import fx

from purepruning.coupling.plan import Plan
from purepruning_interop.torch.couple import Analysis
from purepruning_interop.torch.emit.emitter import Emitter, Writer
from purepruning_interop.torch.emit.layers import (
    _attention,
    _batch_norm,
    _convolution,
    _group_norm,
    _layer_norm,
    _mean,
    _var,
)
from purepruning_interop.torch.emit.shapes import (
    _channel_shuffle,
    _copy,
    _expand,
    _fill,
    _index,
    _pad,
    _repeat_interleave,
    _reshape,
    _roll,
    _slice,
    _slice_scatter,
    _split,
    _squeeze,
    source,
)
from purepruning_interop.torch.rules.sources import SOURCES

_ROWS: tuple[tuple[Writer, str], ...] = (
    (
        _reshape,
        "view reshape _unsafe_view flatten ravel unflatten view_as reshape_as "
        "_reshape_alias view_copy",
    ),
    (_expand, "expand expand_as broadcast_to expand_copy"),
    (_copy, "copy"),
    (_squeeze, "squeeze"),
    (_fill, "fill zero"),
    (_slice, "slice narrow"),
    (_split, "split split_with_sizes chunk unsafe_split unsafe_chunk split_with_sizes_copy"),
    (_slice_scatter, "slice_scatter select_scatter"),
    (_pad, "pad constant_pad_nd"),
    (_roll, "roll"),
    (_repeat_interleave, "repeat_interleave"),
    (
        _convolution,
        "convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    (_layer_norm, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    (_group_norm, "group_norm"),
    (_batch_norm, "batch_norm instance_norm _native_batch_norm_legit native_batch_norm"),
    (_mean, "mean sum"),
    (_var, "var std var_mean std_mean"),
    (_attention, "scaled_dot_product_attention"),
    (_index, "index index_select"),
    (_channel_shuffle, "channel_shuffle native_channel_shuffle"),
)

#: By operator, what writes it where something was removed.
WRITERS: dict[str, Writer] = {name: w for w, names in _ROWS for name in names.split()}
WRITERS |= dict.fromkeys(SOURCES, source)


def emit(
    found: Analysis,
    removed: np.ndarray,
    plan: Plan,
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    norms: str,
    closed: frozenset[tuple[int, int]],
) -> fx.GraphModule:
    """Returns the program as a module with fewer units.

    Args:
        found: the program and the values of its tensors.
        removed: boolean by unit number.
        plan: the cuts that belong to ``removed``.
        state: the cut parameters and buffers, by path.
        names: every name of the state dict and the path of its leaf.
        norms: ``"original"`` or ``"kept"``.
        closed: axes of inputs, by the numbers of both, whose sizes the graph checks.

    Raises:
        OpenSize: the program is dynamic, and one of its open axes loses positions.
    """
    return Emitter(found, removed, plan, state, names, norms, WRITERS).module(closed)
