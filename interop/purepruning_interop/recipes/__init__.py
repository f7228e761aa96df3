"""Recipes as data: what to prune or quantise, in auptimizer's JSON or a native form."""

from purepruning_interop.recipes.compressor import Compressor
from purepruning_interop.recipes.create import create_compressor
from purepruning_interop.recipes.ranges import Range
from purepruning_interop.recipes.recipe import Recipe, Step, read_recipe, write_resolved
from purepruning_interop.recipes.search_ranges import Found, expand, search_recipe, with_values

__all__ = [
    # Reading, and what is read.
    "read_recipe",
    "write_resolved",
    "Recipe",
    "Step",
    # Doing what one says.
    "create_compressor",
    "Compressor",
    # Search ranges in recipes.
    "Range",
    "expand",
    "with_values",
    "search_recipe",
    "Found",
]
