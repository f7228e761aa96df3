"""Searches for how much each layer loses, as pure state machines."""

from purepruning.search.annealing import annealing
from purepruning.search.driver import Trial, run_search, scan_search
from purepruning.search.knapsack import allocate, exact_choice, knapsack
from purepruning.search.netadapt import netadapt
from purepruning.search.problem import Problem, choices, problem
from purepruning.search.shape import Search

__all__ = [
    "Problem",
    "Search",
    "Trial",
    "allocate",
    "annealing",
    "choices",
    "exact_choice",
    "knapsack",
    "netadapt",
    "problem",
    "run_search",
    "scan_search",
]
