"""A checkpoint pruned as the command line says, and the table of it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import purepruning as pp
from purepruning.arguments import missing, one_of
from purepruning.config.config import Config
from purepruning_interop.checkpoints import Checkpoint, Pattern
from purepruning_interop.cli import output
from purepruning_interop.cli.contents import GUESSED, is_float, layers_of
from purepruning_interop.cli.rows import Row, merged
from purepruning_interop.cli.rules import read_rules

#: Pruners that need weights alone, and what they prune unless told.
PRUNERS: dict[str, tuple[Callable[..., Any], str]] = {
    "level": (pp.level, "element"),
    "l1_norm": (pp.l1_norm, "output_channel"),
    "l2_norm": (pp.l2_norm, "output_channel"),
    "fpgm": (pp.fpgm, "output_channel"),
    "slim": (pp.slim, "output_channel"),
    "random": (pp.random_pruning, "element"),
}
#: Pruners of the library that need more than weights.
_NEED_DATA = (
    *("apoz_rank", "mean_activation_rank", "taylor_fo", "fisher", "snip", "grasp", "synflow"),
    *("wanda", "ria", "sparse_gpt", "obc", "alps", "movement", "admm", "agp", "lottery_ticket"),
)
#: NNI's and auptimizer's names of those that need weights alone.
_OF_NNI = ("l1", "l2", "l1_filter", "l2_filter", "L1NormPruner", "L2NormPruner", "FPGMPruner")
#: What an N:M pattern is for, where no rules say it.
_CONTRACTED = ("Linear", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the command line says; see ``purepruning prune --help``."""

    rules: Path | None = None
    sparsity: float | None = None
    pruner: str = "level"
    scope: str = "layer"
    granularity: str | None = None
    nm: str | None = None
    block: str | None = None
    exclude: tuple[str, ...] = ()
    bias: str = "follow"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done to a checkpoint.

    Attributes:
        checkpoint: what was read.
        layers: its guessed layers.
        config: the resolved rules.
        pruner: the function.
        stats: what it takes.
        rules: as they were resolved.
        name: the pruner's.
        dense: names of layers that N:M does not fit, which no rule named.
    """

    checkpoint: Checkpoint
    layers: tuple[pp.Layer, ...]
    config: Config
    pruner: Callable[..., Any]
    stats: Any
    rules: Sequence[Mapping[str, Any]]
    name: str
    dense: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A job, and how many elements of each tensor were pruned.

    Attributes:
        job: what was asked for.
        gone: by the tensor's name.
    """

    job: Job
    gone: Mapping[str, int]

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """A row for each layer: what its mask keeps, and what it loses."""
        found = []
        for layer in self.job.layers:
            lost, size = self.gone.get(layer.weight), math.prod(layer.shape)
            dtype = self.job.checkpoint.tensors[layer.weight].dtype.name
            pattern = Pattern(size - (lost or 0), size, None, 0)
            found.append(Row(layer.name, layer, dtype, 1, pattern, True, lost))
        return tuple(found)

    @property
    def lost(self) -> tuple[int, int]:
        """How many weights go of the pruned layers, and of how many."""
        rows = [row for row in self.rows if row.lost is not None]
        return sum(row.lost or 0 for row in rows), sum(row.pattern.size for row in rows)

    @property
    def global_sparsity(self) -> float:
        """Fraction of all floats that masks prune."""
        size = sum(x.size for x in self.job.checkpoint.tensors.values() if is_float(x))
        return sum(self.gone.values()) / max(size, 1)

    def report(self) -> dict[str, Any]:
        """Returns what was done, as JSON knows it."""
        lost, of = self.lost
        return {
            "purepruning": pp.__version__,
            "source": str(self.job.checkpoint.path),
            "pruner": self.job.name,
            "granularity": _words(self.job.config.granularity),
            "rules": [dict(rule) for rule in self.job.rules],
            "types_are_guessed": True,
            "weights_removed": lost,
            "weights_of_pruned_layers": of,
            "sparsity_of_all": self.global_sparsity,
            "left_whole": list(self.job.dense),
            "layers": [
                {
                    "name": row.name,
                    "type": row.layer.type,
                    "weight": row.layer.weight,
                    "shape": list(row.layer.shape),
                    "removed": row.lost,
                    "density": row.pattern.density,
                }
                for row in self.rows
            ],
        }


def job_of(checkpoint: Checkpoint, wanted: Wanted) -> Job:
    """Returns what the command line says, resolved against a checkpoint.

    Raises:
        ValueError, TypeError, OSError: rules, options or layers do not fit.
    """
    layers = layers_of(checkpoint)
    if not layers:
        raise ValueError(
            f"{checkpoint.path}: none of its {len(checkpoint.tensors)} tensors is the weight of a "
            "layer; see them with purepruning inspect"
        )
    of_nni = wanted.pruner not in PRUNERS
    if of_nni:
        _check_of_nni(wanted)
    granularity = None if of_nni else _granularity(wanted)
    rules, dense = _rules(wanted, layers, granularity)
    if of_nni:
        recipe = pp.from_nni(wanted.pruner, rules, layers)
        config, pruner = recipe.config, recipe.pruner
    else:
        config = pp.resolve(
            rules,
            layers,
            scope=wanted.scope,  # type: ignore[arg-type]  # it is checked there
            granularity=granularity,
            bias=wanted.bias,  # type: ignore[arg-type]
        )
        pruner = PRUNERS[wanted.pruner][0]
    stats = _stats(wanted)
    return Job(checkpoint, layers, config, pruner, stats, rules, wanted.pruner, dense)


def _stats(wanted: Wanted) -> Any:
    if wanted.pruner != "random":
        return None
    import jax

    return jax.random.key(wanted.seed)


def _check_of_nni(wanted: Wanted) -> None:
    name = wanted.pruner
    if name in _NEED_DATA:
        raise ValueError(
            f"--pruner {name} needs data or training, which a checkpoint has not; use purepruning "
            f"run with a task, or one of {', '.join(PRUNERS)}"
        )
    if name.lower() not in [known.lower() for known in _OF_NNI]:
        raise ValueError(missing(f"--pruner: there is no {name!r}", name, [*PRUNERS, *_OF_NNI]))
    given = [x for x in ("granularity", "nm", "block") if getattr(wanted, x) is not None]
    if given or wanted.scope != "layer":
        raise ValueError(
            f"--pruner {name} says itself what is pruned; leave out --{(given or ['scope'])[0]}, "
            "or name a pruner of this library"
        )


def _granularity(wanted: Wanted) -> Any:
    given = [x for x in ("granularity", "nm", "block") if getattr(wanted, x) is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} both say what a unit is; give one")
    if wanted.nm is not None:
        found = re.fullmatch(r"(\d+):(\d+)", wanted.nm)
        if not found:
            raise ValueError(f"--nm must be N:M, N of M kept, got {wanted.nm!r}; write 2:4")
        return pp.NM(keep=int(found[1]), of=int(found[2]))
    if wanted.block is not None:
        if not re.fullmatch(r"-?\d+(x-?\d+)*", wanted.block):
            raise ValueError(f"--block must be sizes as 4x4, got {wanted.block!r}; write 4x4")
        return pp.Block(tuple(map(int, wanted.block.split("x"))))
    if wanted.granularity is not None:
        one_of("--granularity", wanted.granularity, ("element", "output_channel", "input_channel"))
    return wanted.granularity or PRUNERS[wanted.pruner][1]


def _rules(
    wanted: Wanted, layers: tuple[pp.Layer, ...], granularity: Any
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Returns the rules, and the layers that N:M would not fit, which they leave out."""
    if wanted.rules is not None and wanted.sparsity is not None:
        raise ValueError("--rules and --sparsity both say how much; give one")
    dense: tuple[str, ...] = ()
    if wanted.rules is not None:
        rules = read_rules(wanted.rules)
    elif isinstance(granularity, pp.NM):
        rules, dense = _nm_rules(wanted, layers, granularity)
    elif wanted.sparsity is not None:
        rules = [{"sparsity": wanted.sparsity}]
        if wanted.pruner == "slim":
            rules[0]["op_types"] = sorted({x.type for x in layers if x.type.startswith("Batch")})
    else:
        raise ValueError("nothing says how much to prune; give --sparsity, --nm or --rules")
    if wanted.exclude:
        rules = [*rules, {"op_names": list(wanted.exclude), "exclude": True}]
    return rules, dense


def _nm_rules(
    wanted: Wanted, layers: tuple[pp.Layer, ...], nm: pp.NM
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    share = 1 - nm.keep / nm.of
    if wanted.sparsity is not None and not math.isclose(wanted.sparsity, share):
        raise ValueError(
            f"--nm {wanted.nm} prunes {share:g}, and --sparsity says {wanted.sparsity:g}; leave "
            "--sparsity out"
        )
    contracted = [x for x in layers if x.type in _CONTRACTED and x.in_axes]
    fits = [x for x in contracted if not math.prod(x.shape[a] for a in x.in_axes) % nm.of]
    if not fits:
        raise ValueError(
            f"--nm {wanted.nm}: no layer contracts a multiple of {nm.of} weights; choose another"
        )
    names = [x.name for x in fits]
    return [{"op_names": names}], tuple(x.name for x in contracted if x not in fits)


def show(found: Pruned, every: bool, files: Mapping[str, str]) -> None:
    """Prints the table of what is pruned, and the files."""
    out = output.console()
    columns = [("layer", False), ("type", False), ("shape", False), ("removed", True)]
    columns.append(("density", True))
    rows = found.rows if every else merged(found.rows)
    out.print(output.table(columns, [_cells(row) for row in rows]))
    lost, of = found.lost
    out.print(
        f"\n[bold]{lost:,}[/] of {of:,} weights of the pruned layers are zero "
        f"({output.percent(lost / max(of, 1))}), {output.percent(found.global_sparsity)} of all.",
        soft_wrap=True,
    )
    out.print(f"[dim]{GUESSED}[/]", soft_wrap=True)
    if found.job.dense:
        out.print(
            f"Left whole, since {_words(found.job.config.granularity)} does not fit: "
            f"{output.escaped(output.some(found.job.dense))}.",
            soft_wrap=True,
        )
    for kept in found.job.config.kept_whole:
        out.print(f"Left whole: {output.escaped(str(kept))}", soft_wrap=True)
    for kind, path in files.items():
        out.print(f"{kind:8} {output.escaped(path)}", soft_wrap=True)
    if not files:
        out.print("Nothing was written (--dry-run).")


def _cells(row: Row) -> tuple[Any, ...]:
    many = f"{row.name}  ×{row.times}" if row.times > 1 else row.name
    cells = (many, row.layer.type, output.times(row.layer.shape))
    if row.lost is None:
        return (*cells, "-", "dense", None)
    return (
        *cells,
        f"{output.number(row.lost)} of {output.number(row.pattern.size)}",
        output.percent(row.pattern.density),
    )


def _words(granularity: Any) -> str:
    if isinstance(granularity, pp.NM):
        return f"{granularity.keep}:{granularity.of}"
    if isinstance(granularity, pp.Block):
        return "x".join(map(str, granularity.shape))
    return str(granularity)
