"""Searches for how much each layer loses, as pure state machines."""

from purepruning.saving.tables import Tables, load_tables, save_tables
from purepruning.search.amc import amc, layer_features, refit
from purepruning.search.amc_chain import Chain, chain_episode
from purepruning.search.annealing import annealing
from purepruning.search.closed_forms import (
    erk,
    fitted,
    lamp,
    owl,
    progression,
    uniform,
    uniform_plus,
)
from purepruning.search.driver import Trial, run_search, scan_search
from purepruning.search.evolution import evolution
from purepruning.search.knapsack import allocate, exact_choice, knapsack
from purepruning.search.netadapt import netadapt
from purepruning.search.problem import Problem, choices, problem
from purepruning.search.rounds import auto_compress, run_rounds, totals, useless_units
from purepruning.search.sensitivity import curves, sensitivity, sensitivity_pruning
from purepruning.search.shape import Search

__all__ = [
    # What is searched for, and the shape of a search.
    "Problem",
    "problem",
    "choices",
    "Tables",
    "save_tables",
    "load_tables",
    "Search",
    # By a formula.
    "uniform",
    "uniform_plus",
    "erk",
    "lamp",
    "owl",
    "progression",
    "fitted",
    # Exactly.
    "knapsack",
    "exact_choice",
    "allocate",
    # By evaluations.
    "sensitivity",
    "curves",
    "sensitivity_pruning",
    "netadapt",
    "annealing",
    "evolution",
    "amc",
    "layer_features",
    "Chain",
    "chain_episode",
    "refit",
    # The loop around them.
    "run_search",
    "scan_search",
    "Trial",
    # Rounds.
    "totals",
    "run_rounds",
    "auto_compress",
    "useless_units",
]
