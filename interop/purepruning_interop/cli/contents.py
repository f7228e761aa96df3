"""What a checkpoint holds, for ``purepruning inspect``: computed, and shown."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import purepruning as pp
from purepruning.config.config import Config
from purepruning_interop.checkpoints import (
    Checkpoint,
    guess_layers,
    pattern_of,
    read_checkpoint,
)
from purepruning_interop.cli import output
from purepruning_interop.cli.rows import Row, merged, zeros_of
from purepruning_interop.cli.rules import read_rules

_STATISTICS = re.compile(r"(running|moving)_(mean|var\w*)$|(^|[./])batch_stats[./]")

GUESSED = "Layer types are guessed from names and shapes; a checkpoint does not hold them."


@dataclasses.dataclass(frozen=True)
class Contents:
    """A checkpoint, its guessed layers, and what rules would do.

    Attributes:
        checkpoint: as it was read.
        rows: one for each layer.
        config: the rules, resolved; None where there are none.
    """

    checkpoint: Checkpoint
    rows: tuple[Row, ...]
    config: Config | None

    @property
    def parameters(self) -> int:
        """How many floats there are but for the statistics of norms."""
        tensors = self.checkpoint.tensors.items()
        return sum(x.size for name, x in tensors if is_float(x) and not _STATISTICS.search(name))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self.checkpoint.tensors.values())

    def largest(self, n: int) -> list[tuple[str, np.ndarray]]:
        """Returns the largest tensors by name, the largest first."""
        tensors = self.checkpoint.tensors
        return sorted(tensors.items(), key=lambda item: -item[1].nbytes)[:n]

    def as_json(self, top: int) -> dict[str, Any]:
        """Returns all of it as JSON knows it."""
        c = self.checkpoint
        return {
            "path": str(c.path),
            "kind": c.kind,
            "files": {file: len(names) for file, names in c.files.items()},
            "tensors": len(c.tensors),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": dict(dtypes(c.tensors)),
            "types_are_guessed": True,
            "layers": [row_as_json(row) for row in self.rows],
            "largest": [
                {"name": n, "shape": list(x.shape), "dtype": x.dtype.name, "bytes": x.nbytes}
                for n, x in self.largest(top)
            ],
            "not_layers": self._others(),
            "left_out": list(c.left_out),
        }

    def _others(self) -> list[str]:
        known = {path for row in self.rows for path in (row.layer.weight, row.layer.bias)}
        return [name for name in self.checkpoint.tensors if name not in known]

    def show(self, top: int, every: bool) -> None:
        """Prints it."""
        out, c = output.console(), self.checkpoint
        kinds = ", ".join(f"{n:,} {dtype}" for dtype, n in dtypes(c.tensors).items())
        out.print(f"[bold]{output.escaped(str(c.path))}[/]  {c.kind}" + _shards(c), soft_wrap=True)
        out.print(
            f"{self.parameters:,} parameters in {len(c.tensors)} tensors, "
            f"{output.size(self.bytes)} ({kinds})",
            soft_wrap=True,
        )
        if c.inside:
            out.print(f"The weights are those at {c.inside!r}.", soft_wrap=True)
        if c.left_out:
            out.print(f"Not tensors, and left out: {output.some(c.left_out)}.", soft_wrap=True)
        out.print()
        if self.rows:
            rows = self.rows if every else merged(self.rows)
            out.print(self._table(rows))
            out.print(f"\n[dim]{GUESSED}[/]", soft_wrap=True)
        if others := self._others():
            what = f"{len(others)} other tensors: {output.some(others)}."
            out.print(f"[dim]{output.escaped(what)}[/]", soft_wrap=True)
        self._show_rules(out)
        if top and c.tensors:
            total = max(self.bytes, 1)
            out.print("\n[bold]Largest tensors[/]")
            cells = [
                (
                    n,
                    output.times(x.shape),
                    x.dtype.name,
                    output.size(x.nbytes),
                    output.percent(x.nbytes / total),
                )
                for n, x in self.largest(top)
            ]
            columns = (("tensor", False), ("shape", False), ("dtype", False), ("size", True))
            out.print(output.table((*columns, ("of all", True)), cells))

    def _table(self, rows: tuple[Row, ...]) -> Any:
        columns = [("layer", False), ("type", False), ("shape", False), ("dtype", False)]
        columns += [("weights", True), ("density", True), ("zeros", False)]
        if self.config is not None:
            columns.append(("rules remove", True))
        return output.table(columns, [self._cells(row) for row in rows])

    def _cells(self, row: Row) -> tuple[Any, ...]:
        many = f"{row.name}  ×{row.times}" if row.times > 1 else row.name
        p = row.pattern
        cells = (
            many,
            row.layer.type,
            output.times(row.layer.shape),
            row.dtype,
            output.number(p.size),
            output.percent(p.density),
            zeros_of(row),
        )
        if self.config is None:
            return cells
        if row.lost is None:
            return (*cells, "-", None)
        return (*cells, f"{output.number(row.lost)} ({output.percent(row.lost / p.size)})")

    def _show_rules(self, out: Any) -> None:
        if self.config is None:
            return
        chosen = [row for row in self.rows if row.lost is not None]
        lost, of = sum(row.lost or 0 for row in chosen), sum(row.pattern.size for row in chosen)
        what = "would remove" if self.config.pools else "select nothing, and would remove"
        out.print(
            f"The rules {what} {lost:,} of {of:,} weights in {len(chosen)} layers "
            f"({output.percent(lost / max(of, 1))}).",
            soft_wrap=True,
        )


def contents_of(source: str, rules: Path | None) -> Contents:
    """Returns what a checkpoint holds, and what rules would remove of it.

    Raises:
        OSError, ValueError, TypeError: a file cannot be read, or a rule fits no layer.
    """
    given = None if rules is None else read_rules(rules)
    checkpoint = read_checkpoint(source)
    layers = layers_of(checkpoint)
    config = None if given is None else pp.resolve(given, layers)
    removed = {} if config is None else lost_weights(config)
    rows = []
    with output.progress() as bar:
        task = bar.add_task("reading", total=len(layers))
        for layer in layers:
            weight = checkpoint.tensors[layer.weight]
            found = pattern_of(weight, layer)
            lost = removed.get(layer.name)
            rows.append(Row(layer.name, layer, weight.dtype.name, 1, found, True, lost))
            bar.advance(task)
    return Contents(checkpoint, tuple(rows), config)


def layers_of(checkpoint: Checkpoint) -> tuple[pp.Layer, ...]:
    """Returns the guessed layers of a checkpoint, in its order."""
    return guess_layers({n: x.shape for n, x in checkpoint.tensors.items() if is_float(x)})


def lost_weights(config: Config) -> dict[str, int]:
    """Returns how many weights each selected layer loses; in global scope, its share at most."""
    found: dict[str, int] = {}
    for pool in config.pools:
        count, size = int(config.counts[pool.name] or 0), pool.size
        for layer in pool.layers:
            weights = int(np.prod(layer.shape))
            found[layer.name] = round(count / size * weights) if size else 0
    return found


def is_float(x: np.ndarray) -> bool:
    """Whether a tensor is of floats, those of machine learning included."""
    return x.dtype.kind not in "iub?O"


def dtypes(tensors: Mapping[str, np.ndarray]) -> Counter[str]:
    """Returns how many tensors there are of each dtype."""
    return Counter(x.dtype.name for x in tensors.values())


def row_as_json(row: Row) -> dict[str, Any]:
    """Returns a row as JSON knows it."""
    p, layer = row.pattern, row.layer
    return {
        "name": layer.name,
        "type": layer.type,
        "weight": layer.weight,
        "bias": layer.bias,
        "shape": list(layer.shape),
        "dtype": row.dtype,
        "weights": p.size,
        "nonzero": p.nonzero,
        "density": p.density,
        "nm": None if p.nm is None else f"{p.nm[0]}:{p.nm[1]}",
        "empty_output_channels": p.empty_outputs,
        "removed_by_rules": row.lost,
    }


def _shards(c: Checkpoint) -> str:
    return f" in {len(c.files)} files" if len(c.files) > 1 else ""
