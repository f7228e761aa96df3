"""What a model holds, for ``purepruning inspect``: layers, costs, and what is coupled."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import purepruning as pp
from purepruning.masks import to_numpy
from purepruning.saving.files import write_whole
from purepruning.trees import flatten
from purepruning_interop.checkpoints import NotWritten, pattern_of
from purepruning_interop.cli import output
from purepruning_interop.cli.contents import lost_weights, row_as_json
from purepruning_interop.cli.models import Given, make_model
from purepruning_interop.cli.rows import Row, merged, zeros_of
from purepruning_interop.cli.rules import read_rules


@dataclasses.dataclass(frozen=True)
class ModelContents:
    """A model's layers, costs and coupling, and what rules would do.

    Attributes:
        given: the model.
        rows: one for each layer.
        cost: of the whole model.
        coupling: which channels are coupled.
        config: the rules, resolved; None where there are none.
        picture: the file that the coupling is drawn in, or None.
    """

    given: Given
    rows: tuple[Row, ...]
    cost: Any
    coupling: pp.Coupling
    config: Any
    picture: Path | None

    def as_json(self, top: int) -> dict[str, Any]:
        """Returns all of it as JSON knows it; ``top`` is of checkpoints."""
        return {
            "source": self.given.source,
            "framework": self.given.name,
            "inputs": [list(x.shape) for x in self.given.inputs],
            "parameters": self.cost.params,
            "macs": int(self.cost.macs),
            "types_are_guessed": False,
            "layers": [{**row_as_json(r), "macs": r.macs} for r in self.rows],
            "coupling": {"units": self.coupling.n_units, "text": str(self.coupling)},
            "picture": None if self.picture is None else str(self.picture),
        }

    def show(self, top: int, every: bool) -> None:
        """Prints it."""
        out = output.console()
        shapes = ", ".join(output.times(tuple(x.shape)) for x in self.given.inputs)
        out.print(
            f"[bold]{output.escaped(self.given.source)}[/]  {self.given.name}, inputs {shapes}"
        )
        out.print(f"{self.cost.params:,} parameters, {int(self.cost.macs):,} multiply-adds\n")
        columns = [("layer", False), ("type", False), ("shape", False), ("weights", True)]
        columns += [("MACs", True), ("of all", True), ("density", True), ("zeros", False)]
        if self.config is not None:
            columns.append(("rules remove", True))
        rows = self.rows if every else merged(self.rows)
        out.print(output.table(columns, [self._cells(row) for row in rows]))
        out.print("\n[bold]Coupling[/]  channels that are kept or removed together")
        out.print(str(self.coupling), markup=False, soft_wrap=True)
        if self.picture is not None:
            out.print(f"\npicture  {output.escaped(str(self.picture))}", soft_wrap=True)

    def _cells(self, row: Row) -> tuple[Any, ...]:
        p, macs = row.pattern, row.macs
        cells = (
            f"{row.name}  ×{row.times}" if row.times > 1 else row.name,
            row.layer.type,
            output.times(row.layer.shape),
            output.number(p.size),
            output.number(macs) if macs else "",
            output.percent(macs / max(int(self.cost.macs), 1)) if macs else "",
            output.percent(p.density),
            zeros_of(row),
        )
        if self.config is None:
            return cells
        if row.lost is None:
            return (*cells, "-", None)
        return (*cells, f"{output.number(row.lost)} ({output.percent(row.lost / p.size)})")


def model_contents(
    source: str, rules: Path | None, inputs: list[str], picture: Path | None
) -> ModelContents:
    """Returns what a model holds; draws its coupling where a file is named.

    Raises:
        ValueError, TypeError, OSError: as of :func:`purepruning_interop.cli.models.make_model`.
        NotWritten: the picture cannot be written.
    """
    given_rules = None if rules is None else read_rules(rules)
    given = make_model(source, inputs)
    with output.progress() as bar:
        bar.add_task("tracing", total=None)
        layers = given.adapter.layers(*given.first, *given.inputs)
        cost = given.adapter.count(*given.first, *given.inputs)
        coupling = given.adapter.couple(*given.first, *given.inputs)
    config = None if given_rules is None else pp.resolve(given_rules, layers)
    removed = {} if config is None else lost_weights(config)
    leaves = flatten(given.edge.params(given.model)).leaves
    rows = []
    for layer in layers:
        weight = to_numpy(leaves[layer.weight])
        found = pattern_of(weight, layer)
        lost, macs = removed.get(layer.name), _macs(layer, cost)
        rows.append(Row(layer.name, layer, weight.dtype.name, 1, found, True, lost, macs))
    if picture is not None:
        _draw(coupling, picture)
    return ModelContents(given, tuple(rows), cost, coupling, config, picture)


def _macs(layer: pp.Layer, cost: Any) -> int:
    """Returns the multiply-adds of a layer, which costs name by its parameters."""
    names = (layer.weight.rpartition(".")[0] or layer.weight, layer.name)
    return next((int(x.macs) for x in cost.layers if x.name in names), 0)


def _draw(coupling: pp.Coupling, picture: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--picture needs matplotlib; pip install 'purepruning[demo]'") from None
    matplotlib.use("Agg")
    kind = picture.suffix.removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"--picture must end in .png, .svg or .pdf, got {picture.name!r}")
    content = io.BytesIO()
    pp.draw_coupling(coupling).figure.savefig(content, format=kind, bbox_inches="tight")
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_whole(picture, content.getvalue())
    except OSError as error:
        raise NotWritten(f"{picture} cannot be written: {error.strerror}") from error
