"""Neural-network pruning as pure functions: JAX first, the same source on PyTorch.

A pruner is ``(params, stats, config) -> masks``. Layers come from an adapter of
``purepruning_interop`` or from :func:`make_layer`; :func:`resolve` turns NNI-style rules into a
config; masks are plain trees of booleans, applied with :func:`apply_masks`.
"""

from purepruning.versions import __version__ as __version__
from purepruning.versions import require as _require

for _package in ("jax", "numpy", "optax", "safetensors"):
    _require(_package, "purepruning")

from purepruning import criteria, quantize, search, stats
from purepruning.bcoo import to_bcoo
from purepruning.config.config import Config
from purepruning.config.coupled_layers import coupled_layers
from purepruning.config.dependency_sets import dependency_sets
from purepruning.config.resolve import resolve
from purepruning.counts import count_of
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.draw import draw as draw_coupling
from purepruning.coupling.plan import Plan
from purepruning.granularity import NM, Block
from purepruning.jaxpr.count import count
from purepruning.jaxpr.couple import couple
from purepruning.jaxpr.shrink import rebuild, shrink
from purepruning.layers import Activation, Layer, make_layer
from purepruning.masks import apply_masks, density, expand, invert, merge_masks
from purepruning.nni.names import from_nni
from purepruning.pruners.activation import apoz_rank, mean_activation_rank
from purepruning.pruners.alps import alps
from purepruning.pruners.coupled import group_norm, prune_units, unit_scores
from purepruning.pruners.depth import block_influence, drop_blocks, short_gpt, sleb
from purepruning.pruners.fisher import fisher
from purepruning.pruners.flap import flap
from purepruning.pruners.geometric_median import fpgm
from purepruning.pruners.grasp import grasp, hessian_gradient
from purepruning.pruners.group_penalty import group_penalty
from purepruning.pruners.magnitude import l1_norm, l2_norm, level
from purepruning.pruners.minitron import minitron
from purepruning.pruners.obc import obc, obc_errors
from purepruning.pruners.obert import obert
from purepruning.pruners.random import random_pruning
from purepruning.pruners.ria import ria
from purepruning.pruners.scores import prune_scores
from purepruning.pruners.slimming import slim, slim_penalty
from purepruning.pruners.snip import snip
from purepruning.pruners.sparse_gpt import sparse_gpt
from purepruning.pruners.synflow import synaptic_flow, synflow
from purepruning.pruners.taylor import taylor_fo
from purepruning.pruners.transposable import transposable
from purepruning.pruners.wanda import wanda, wanda_scores
from purepruning.pruners.zeros import masks_from_zeros
from purepruning.quantize.config import resolve_quantization
from purepruning.saving.masks import load_masks, save_masks
from purepruning.saving.plans import load_plan, save_plan
from purepruning.saving.quantized import load_quantized, save_quantized
from purepruning.saving.sparse import load_sparse, save_sparse
from purepruning.saving.states import load_state, save_state
from purepruning.schedules.curves import agp, cosine, exponential, linear, one_shot
from purepruning.schedules.schedule import Schedule, check_resumed, vmap_axes
from purepruning.selection.criterion import Criterion
from purepruning.selection.prune import prune
from purepruning.streaming import prune_files
from purepruning.summary import summarize
from purepruning.training import admm, movement
from purepruning.training.controls import invert_scores, reinitialize, shuffle_masks
from purepruning.training.iterative import iterative
from purepruning.training.keep_pruned import keep_pruned
from purepruning.training.lottery import lottery
from purepruning.training.masks_in_state import get_masks, set_masks
from purepruning.training.on_schedule import prune_on_schedule
from purepruning.training.sparse import rewire, sparse_training, sr_ste
from purepruning.trees import leaf_paths

__all__ = [
    # Layers: what the weights of a model are.
    "Layer",
    "Activation",
    "make_layer",
    "coupled_layers",
    "leaf_paths",
    # Rules to config.
    "resolve",
    "Config",
    "Block",
    "NM",
    "count_of",
    # Pruners: (params, stats, config) -> masks.
    "level",
    "l1_norm",
    "l2_norm",
    "fpgm",
    "random_pruning",
    "slim",
    "slim_penalty",
    "apoz_rank",
    "mean_activation_rank",
    "taylor_fo",
    "fisher",
    # At initialisation, and in rounds.
    "snip",
    "grasp",
    "hessian_gradient",
    "synflow",
    "synaptic_flow",
    "iterative",
    # With inputs of calibration data.
    "wanda",
    "wanda_scores",
    "ria",
    # Those that change the weights that stay: (params, stats, config) -> (params, masks).
    "sparse_gpt",
    "obc",
    "obc_errors",
    "alps",
    "obert",
    "prune_scores",
    "masks_from_zeros",
    # An own criterion: a module of what it is written with.
    "criteria",
    "prune",
    "Criterion",
    # Pruning during training: modules of a few pure functions each.
    "admm",
    "movement",
    # Quantizers, after pruning or alone: modules of a few pure functions each.
    "resolve_quantization",
    "quantize",
    "save_quantized",
    "load_quantized",
    # Schedules: when to prune, and how much.
    "one_shot",
    "linear",
    "agp",
    "cosine",
    "exponential",
    "Schedule",
    "vmap_axes",
    # Lottery tickets, and what they are compared with.
    "lottery",
    "reinitialize",
    "shuffle_masks",
    "invert_scores",
    # By NNI's names.
    "from_nni",
    # Searches for how a budget is divided among layers: a module.
    "search",
    # Running statistics that some pruners need.
    "stats",
    # Structure: what is coupled, and the smaller model.
    "couple",
    "Coupling",
    "draw_coupling",
    "dependency_sets",
    "unit_scores",
    "prune_units",
    "group_norm",
    "group_penalty",
    "minitron",
    "flap",
    "block_influence",
    "short_gpt",
    "sleb",
    "drop_blocks",
    "shrink",
    "rebuild",
    "Plan",
    "save_plan",
    "load_plan",
    "count",
    # Masks.
    "apply_masks",
    "merge_masks",
    "invert",
    "expand",
    "density",
    "summarize",
    "save_masks",
    "load_masks",
    "save_sparse",
    "load_sparse",
    "to_bcoo",
    # Runs that are stopped and go on.
    "save_state",
    "load_state",
    "check_resumed",
    # Checkpoints larger than memory.
    "prune_files",
    # Training with masks.
    "keep_pruned",
    "prune_on_schedule",
    # Sparse from the first step on.
    "transposable",
    "sparse_training",
    "rewire",
    "sr_ste",
    "get_masks",
    "set_masks",
]
