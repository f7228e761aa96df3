"""Neural-network pruning as pure functions: JAX first, the same source on PyTorch.

A pruner is ``(params, stats, config) -> masks``. Layers come from an adapter of
``purepruning_interop`` or from :func:`make_layer`; :func:`resolve` turns NNI-style rules into a
config; masks are plain trees of booleans, applied with :func:`apply_masks`.
"""

import importlib.metadata

from purepruning import admm, movement, stats
from purepruning.config import Config, Pool, count_of, resolve
from purepruning.coupling.allocation import Allocation, KeptWhole
from purepruning.coupling.costs import Counts, LayerCount, count
from purepruning.coupling.couple import couple
from purepruning.coupling.importance import group_norm, prune_units, unit_scores
from purepruning.coupling.plan import Plan
from purepruning.coupling.report import draw as draw_coupling
from purepruning.coupling.shrink import ShrinkReport, Shrunk, ShrunkFunction, shrink
from purepruning.coupling.structure import Coupling, Family, Member, Pin
from purepruning.layers import Layer, make_layer
from purepruning.masks import apply_masks, density, expand, invert, merge_masks
from purepruning.namespace import leaf_paths
from purepruning.nni import Recipe, from_nni
from purepruning.pruners.activation import apoz_rank, mean_activation_rank
from purepruning.pruners.geometric_median import fpgm
from purepruning.pruners.magnitude import l1_norm, l2_norm, level
from purepruning.pruners.random import random_pruning
from purepruning.pruners.slimming import slim, slim_penalty
from purepruning.pruners.taylor import taylor_fo
from purepruning.rules import Gradual
from purepruning.schedules.ablations import invert_scores, reinitialize, shuffle_masks
from purepruning.schedules.annealing import Annealing, AnnealingState, annealing
from purepruning.schedules.gradual import agp, cosine, exponential, linear, one_shot
from purepruning.schedules.lottery import Lottery, LotteryState, lottery
from purepruning.schedules.schedule import (
    Event,
    Schedule,
    ScheduleState,
    check_resumed,
    vmap_axes,
)
from purepruning.select import Criterion, prune
from purepruning.states import load_state, save_state
from purepruning.storage import load_masks, save_masks
from purepruning.summary import LayerSummary, Summary, summarize
from purepruning.transform import (
    KeepPrunedState,
    PruneOnScheduleState,
    get_masks,
    keep_pruned,
    prune_on_schedule,
    set_masks,
)
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
    # Schedules: when to prune, and how much.
    "one_shot",
    "linear",
    "agp",
    "cosine",
    "exponential",
    "Schedule",
    "ScheduleState",
    "Event",
    "vmap_axes",
    # Lottery tickets, and what they are compared with.
    "lottery",
    "Lottery",
    "LotteryState",
    "reinitialize",
    "shuffle_masks",
    "invert_scores",
    # By NNI's names.
    "from_nni",
    "Recipe",
    # Search for how a total sparsity is divided among layers.
    "annealing",
    "Annealing",
    "AnnealingState",
    # Running statistics that some pruners need.
    "stats",
    # Structure: what is coupled, and the smaller model.
    "couple",
    "Coupling",
    "draw_coupling",
    "Family",
    "Member",
    "Pin",
    "Allocation",
    "KeptWhole",
    "unit_scores",
    "prune_units",
    "group_norm",
    "shrink",
    "Shrunk",
    "ShrunkFunction",
    "ShrinkReport",
    "Plan",
    "count",
    "Counts",
    "LayerCount",
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
    # Runs that are stopped and go on.
    "save_state",
    "load_state",
    "check_resumed",
    # Training with masks.
    "keep_pruned",
    "prune_on_schedule",
    "get_masks",
    "set_masks",
    "KeepPrunedState",
    "PruneOnScheduleState",
]
