"""Neural-network pruning as pure functions: JAX first, the same source on PyTorch.

A pruner is ``(params, stats, config) -> masks``. Layers come from an adapter of
``purepruning_interop`` or from :func:`make_layer`; :func:`resolve` turns NNI-style rules into a
config; masks are plain trees of booleans, applied with :func:`apply_masks`.
"""

import importlib.metadata

from purepruning import admm, movement, stats
from purepruning.config import Config, Pool, count_of, resolve
from purepruning.layers import Layer, make_layer
from purepruning.masks import apply_masks, density, expand, invert, merge_masks
from purepruning.namespace import leaf_paths
from purepruning.pruners.activation import apoz_rank, mean_activation_rank
from purepruning.pruners.geometric_median import fpgm
from purepruning.pruners.magnitude import l1_norm, l2_norm, level
from purepruning.pruners.random import random_pruning
from purepruning.pruners.slimming import slim, slim_penalty
from purepruning.pruners.taylor import taylor_fo
from purepruning.rules import Gradual
from purepruning.select import Criterion, prune
from purepruning.storage import load_masks, save_masks
from purepruning.summary import LayerSummary, Summary, summarize
from purepruning.transform import KeepPrunedState, keep_pruned, set_masks
from purepruning.units import NM, Block

__version__ = importlib.metadata.version("purepruning")

__all__ = [
    # Layers: what the weights of a model are.
    "Layer",
    "make_layer",
    "leaf_paths",
    # Rules to config.
    "resolve",
    "Config",
    "Pool",
    "Gradual",
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
    "prune",
    "Criterion",
    # Pruning that trains: modules of a few pure functions each.
    "admm",
    "movement",
    # Running statistics that some pruners need.
    "stats",
    # Masks.
    "apply_masks",
    "merge_masks",
    "invert",
    "expand",
    "density",
    "summarize",
    "Summary",
    "LayerSummary",
    "save_masks",
    "load_masks",
    # Training with masks.
    "keep_pruned",
    "set_masks",
    "KeepPrunedState",
]
