"""The coupling as a picture."""

from __future__ import annotations

import math
from typing import Any

from purepruning.arguments import flag
from purepruning.coupling.coupling import Coupling, check_coupling


def draw(coupling: Coupling, *, ax: Any = None, labels: bool = True) -> Any:
    """Returns a matplotlib ``Axes`` with the coupling as a graph.

    Squares are layers (parameters under one name), circles families of units, as large as the
    family and labelled with how many units it has. An arrow into a circle says that the layer makes
    these channels, one out of it that the layer reads them. Scales, biases and tables are left out.

    Needs ``networkx`` and ``matplotlib`` (the extra ``demo``).

    Args:
        coupling: what :func:`purepruning.couple` returned.
        ax: where to draw; a new figure unless given.
        labels: whether to write names beside the nodes.

    Raises:
        ImportError: a package is missing.
    """
    check_coupling("draw_coupling", coupling)
    flag(labels, "draw_coupling: labels")
    import matplotlib.pyplot as plt
    import networkx as nx

    graph = nx.DiGraph()
    for i, family in enumerate(coupling.families):
        node = ("family", i)
        graph.add_node(node)
        for role in ("source", "sink"):
            for name in dict.fromkeys(_layer(m.path) for m in family.axes if m.role == role):
                graph.add_node(("layer", name))
                if not graph.has_edge(("layer", name), node):
                    edge = (node, ("layer", name)) if role == "sink" else (("layer", name), node)
                    graph.add_edge(*edge)
    # From what is made first to what is read last; loops (residuals) stay in one column.
    condensed = nx.condensation(graph)
    place = {}
    for column, parts in enumerate(nx.topological_generations(condensed)):
        inside = set().union(*(condensed.nodes[part]["members"] for part in parts))
        for row, node in enumerate(n for n in graph if n in inside):
            place[node] = (column, row - len(inside) / 2)
    ax = plt.figure(figsize=(10, 7)).gca() if ax is None else ax
    place = nx.kamada_kawai_layout(graph, pos=place) if len(graph) > 1 else place
    families = [n for n in graph if n[0] == "family"]
    layers = [n for n in graph if n[0] == "layer"]
    kinds = sorted({f.kind for f in coupling.families})
    colours = plt.get_cmap("tab10")
    areas = dict.fromkeys(layers, 90.0)
    for kind in kinds:
        mine = [n for n in families if coupling.families[n[1]].kind == kind]
        sizes = [120 + 60 * math.log2(1 + len(coupling.families[n[1]])) for n in mine]
        areas |= dict(zip(mine, sizes, strict=True))
        nx.draw_networkx_nodes(
            graph, place, mine, sizes, [colours(kinds.index(kind))], ax=ax, label=kind
        )
    nx.draw_networkx_nodes(graph, place, layers, 90, "0.75", node_shape="s", ax=ax, label="layer")
    ends = [areas[n] for n in graph]
    nx.draw_networkx_edges(graph, place, ax=ax, edge_color="0.4", node_size=ends)
    if labels:
        parts = {n: n[1].split(".") for n in layers}
        while parts and all(len(p) > 1 for p in parts.values()):
            if len({p[0] for p in parts.values()}) > 1:
                break
            parts = {n: p[1:] for n, p in parts.items()}  # what all begin with says nothing
        names = {n: ".".join(p) for n, p in parts.items()}
        for n, name in names.items():
            ax.annotate(
                name,
                place[n],
                xytext=(0, -8),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=7,
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
            )
        numbers = {n: str(len(coupling.families[n[1]])) for n in families}
        nx.draw_networkx_labels(
            graph, place, numbers, font_size=7, font_color="white", font_weight="bold", ax=ax
        )
    if graph:
        for handle in ax.legend(loc="best", fontsize=8).legend_handles:
            handle.set_sizes([60])
    ax.set_axis_off()
    return ax


def _layer(path: str) -> str:
    return path.rpartition(".")[0] or path
