"""Draws the pictures of a residual block and of half of it: ``python docs/images/draw.py``."""

from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
from flax import linen as nn

import purepruning as pp
from purepruning_interop import linen

FOLDER = Path(__file__).parent


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), name="stem")(x))
        h = nn.relu(nn.Conv(64, (3, 3), name="expand")(x))
        x = x + nn.Conv(32, (3, 3), name="reduce")(h)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def main():
    model, x = Block(), jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    variables = model.init(jax.random.key(1), x)
    coupling = linen.couple(model, variables, x)
    layers = linen.layers(model, variables, x)
    rules = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    masks = pp.l1_norm(variables, None, pp.resolve(rules, layers, coupling=coupling))
    pruned = coupling.chosen(masks, variables).removed
    matplotlib.rcParams["svg.hashsalt"] = "coupling"
    for style, name in (("default", "light"), ("dark_background", "dark")):
        for what, units in (("coupling", ()), ("pruned", pruned)):
            with plt.style.context(style):
                figure = pp.draw_coupling(coupling, units).figure
                figure.savefig(
                    FOLDER / f"{what}-{name}.svg", transparent=True, metadata={"Date": None}
                )
                plt.close(figure)


if __name__ == "__main__":
    main()
