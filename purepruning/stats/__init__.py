"""Running statistics that criteria need: each a pytree with ``init``, ``update`` and ``merge``."""

from purepruning.stats import accumulate, activations, gradients

__all__ = ["accumulate", "activations", "gradients"]
