"""Recipes as data: what to prune or quantise, in auptimizer's JSON or a native form."""

from purepruning_interop.recipes.compressor import Compressor, create_compressor
from purepruning_interop.recipes.ranges import Range
from purepruning_interop.recipes.recipe import Recipe, Step, read_recipe, write_resolved

__all__ = [
    "read_recipe",
    "write_resolved",
    "Recipe",
    "Step",
    "Range",
    "create_compressor",
    "Compressor",
]
