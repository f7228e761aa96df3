"""A population of small models, as people write them in each framework.

Structural pruning reads the program of a model, so what it must be judged on is programs. Each of
these is traced and run in well under a second; ``benchmarks/population.py`` adds packages' own.
"""

from tests.coupling import (
    equinox_models,
    haiku_models,
    linen_images,
    linen_sequences,
    nnx_models,
    plain_models,
)
from tests.coupling.entry import Entry

MODELS: tuple[Entry, ...] = (
    *linen_images.MODELS,
    *linen_sequences.MODELS,
    *nnx_models.MODELS,
    *equinox_models.MODELS,
    *haiku_models.MODELS,
    *plain_models.MODELS,
)
