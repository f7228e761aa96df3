"""Running statistics that criteria need: each a pytree with ``init``, ``update`` and ``merge``."""

__all__ = ["accumulate", "activations", "blocks", "fisher_blocks", "gradients", "inputs"]
