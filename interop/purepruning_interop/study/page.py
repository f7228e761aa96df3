"""The report of a study."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from purepruning.versions import __version__, installed
from purepruning_interop import report
from purepruning_interop.study.compare import Comparison, Interval, compared, interval, verdict
from purepruning_interop.study.criteria import CHANCE
from purepruning_interop.study.driver import Study

_PANELS = {"weights": "Single weights", "channels": "Channels"}
_MARKS = {"ahead": "▲ ahead", "behind": "▼ behind", "no difference": "no difference"}


def report_of(study: Study, commands: Sequence[str] = ()) -> report.Report:
    """Returns the page of a study, for :func:`purepruning_interop.report.write_report`.

    Args:
        study: what was found.
        commands: lines of a shell that do it again.
    """
    rows = compared(study)
    words = _Words(study.metric)
    sections: list[Any] = [
        _curves(study, rows, words),
        _table(rows, words),
        _profile(study),
        report.Facts("What was run", _facts(study)),
    ]
    if commands:
        note = "Results and trained networks are read from the folder if it is there."
        sections.append(report.Commands("Do it again", note, commands))
    n = len({m.criterion for m in study.methods} - {CHANCE})
    return report.Report(
        kind="Pruning study",
        title=f"{study.task}: {n} {'criterion' if n == 1 else 'criteria'} against chance",
        lead=_lead(study, rows, words),
        tiles=_tiles(study, rows, words),
        sections=sections,
        made=_made(),
    )


class _Words:
    """How scores are written: accuracy in percent, others as they are."""

    def __init__(self, metric: str) -> None:
        self.metric, self.percent = metric, metric == "accuracy"
        self.unit = " %" if self.percent else ""

    def score(self, x: float, sign: str = "") -> str:
        text = f"{100 * x:{sign}.1f}" if self.percent else f"{x:{sign}.4g}"
        return text.replace("-", "−")

    def spread(self, x: Interval) -> str:
        return f"{self.score(x.mean)} ± {self.score(x.deviation)}"

    def lead(self, x: Interval) -> str:
        return f"{self.score(x.mean, '+')} [{self.score(x.low, '+')}, {self.score(x.high, '+')}]"


def _named(method: str) -> tuple[str, str]:
    criterion, _, units = method.partition(":")
    return criterion, units


def _share(x: float) -> str:
    return f"{100 * x:.4g} %"


def _lead(study: Study, rows: Sequence[Comparison], words: _Words) -> str:
    verdicts = [verdict(r.tuned_lead) for r in rows if r.tuned_lead is not None]
    epochs = f"{study.epochs} epoch{'' if study.epochs == 1 else 's'}"
    text = (
        f"{len(study.seeds)} networks were trained, one for each seed, and each was pruned by "
        f"every criterion to {len(study.sparsities)} sparsities and fine-tuned for {epochs}. "
    )
    if verdicts:
        text += (
            f"After that {verdicts.count('ahead')} of {len(verdicts)} comparisons are ahead of "
            f"random pruning of as many units, {verdicts.count('behind')} behind, and for "
            f"{verdicts.count('no difference')} there is no difference at 95 % confidence."
        )
    return text


def _tiles(study: Study, rows: Sequence[Comparison], words: _Words) -> list[tuple[str, str, str]]:
    dense = interval(study.dense)
    spread = words.score(dense.deviation)
    found = [(f"{words.metric}, not pruned", words.score(dense.mean) + words.unit, f"± {spread}")]
    # Where methods differ most is where the choice matters.
    for units in dict.fromkeys(m.units for m in study.methods):
        of = [r for r in rows if _named(r.method)[1] == units and r.tuned_lead is not None]
        if of:
            best = max(of, key=lambda r: r.tuned_lead.mean if r.tuned_lead else 0)
            assert best.tuned_lead is not None
            found.append(
                (
                    f"largest lead over chance, {units}",
                    f"{words.score(best.tuned_lead.mean, '+')}{' points' if words.percent else ''}",
                    f"{_named(best.method)[0]} at {_share(best.sparsity)}: "
                    f"{words.score(best.tuned.mean)}{words.unit}",
                )
            )
    behind = [r for r in rows if verdict(r.tuned_lead) == "behind"]
    worst = min(behind, key=lambda r: r.tuned_lead.mean if r.tuned_lead else 0, default=None)
    remark = "after fine-tuning"
    if worst is not None:
        remark = f"worst: {_named(worst.method)[0]} at {_share(worst.sparsity)}"
    return [*found, ("comparisons behind chance", str(len(behind)), remark)]


def _curves(study: Study, rows: Sequence[Comparison], words: _Words) -> report.Curves:
    dense = {f"not pruned: {words.score(study.dense.mean())}": float(study.dense.mean())}
    score = f"{words.metric}{words.unit and ', %'}"
    lead = f"lead{', points' if words.percent else ''}"
    deviation = "standard deviation over seeds"
    confidence = "95 % confidence interval of the mean difference"

    def view(name: str, key: str) -> report.View:
        signed = key.endswith("lead")
        series = report.colored(_series(rows, key))
        if signed:
            return report.View(name, lead, series, {}, confidence, True)
        return report.View(name, score, series, dense, deviation)

    return report.Curves(
        f"{words.metric[:1].upper()}{words.metric[1:]} against sparsity",
        "Means over the seeds. Whiskers are standard deviations over the seeds; of leads they are "
        "95 % confidence intervals of the mean. A lead is the difference to random pruning of the "
        "same network by as many units. Point at a curve's name to see it alone, press it to hide "
        "it; arrow keys in a plot read its values.",
        "sparsity, %" if words.percent else "sparsity",
        [
            view("fine-tuned", "tuned"),
            view("as pruned", "pruned"),
            view("lead, fine-tuned", "tuned_lead"),
            view("lead, as pruned", "pruned_lead"),
        ],
        "left",
        words.percent,
    )


def _series(rows: Sequence[Comparison], key: str) -> list[report.Series]:
    found = []
    for method in dict.fromkeys(r.method for r in rows):
        criterion, units = _named(method)
        points = []
        for row in rows:
            value = getattr(row, key)
            if row.method != method or value is None:
                continue
            low, high = value.low, value.high
            if not key.endswith("lead"):
                low, high = value.mean - value.deviation, value.mean + value.deviation
            points.append(report.contents.Point(row.sparsity, value.mean, low, high))
        if points:
            baseline = criterion == CHANCE
            found.append(report.Series(criterion, points, _PANELS[units], baseline=baseline))
    return found


def _table(rows: Sequence[Comparison], words: _Words) -> report.Table:
    columns = [
        report.Column("pruner"),
        report.Column("units", choose=True),
        report.Column("sparsity", number=True, choose=True),
        report.Column(f"fine-tuned{words.unit and ', %'}", number=True),
        report.Column("lead over chance", number=True),
        report.Column("verdict", choose=True),
        report.Column(f"as pruned{words.unit and ', %'}", number=True),
        report.Column("weights left", number=True),
    ]
    cells = []
    for row in sorted(rows, key=_best_first):
        criterion, units = _named(row.method)
        lead, verdict_ = row.tuned_lead, verdict(row.tuned_lead)
        cells.append(
            [
                criterion,
                units,
                (_share(row.sparsity), row.sparsity),
                (words.spread(row.tuned), row.tuned.mean),
                None if lead is None else (words.lead(lead), lead.mean),
                _MARKS.get(verdict_, verdict_),
                (words.spread(row.pruned), row.pruned.mean),
                (f"{100 * row.density:.1f} %", row.density),
            ]
        )
    return report.Table(
        "Every comparison",
        "Mean ± standard deviation over the seeds; leads are of fine-tuned networks, with 95 % "
        "confidence intervals by Student's t over pairs of networks of one seed. Each is by "
        "itself: of a hundred comparisons without any difference about five would be called one.",
        columns,
        cells,
    )


def _best_first(row: Comparison) -> tuple[bool, float, float]:
    return _named(row.method)[1] != "weights", row.sparsity, -row.tuned.mean


def _profile(study: Study) -> report.Profile:
    kept = [
        study.outcomes[str(method)].kept.mean(axis=0).round(1).tolist() for method in study.methods
    ]
    names = [f"{m.criterion}, {m.units}" for m in study.methods]
    last = max(range(len(study.sparsities)), key=lambda i: -abs(study.sparsities[i] - 0.9))
    shapes = [" × ".join(map(str, shape)) for shape in study.shapes]
    note = "How much is left of each layer, mean over the seeds. "
    if study.scope == "layer":
        note += "Every layer that is pruned loses the same share of its units (scope “layer”); "
    else:
        note += "Units of all layers are ranked together (scope “global”); "
    note += "layers without a loss are left whole by the task's rules."
    return report.Profile(
        "Layers",
        note,
        list(zip(study.layers, shapes, study.sizes.tolist(), strict=True)),
        {"Pruner": names, "Sparsity": [_share(s) for s in study.sparsities]},
        kept,
        (min(2, len(names) - 1), last),
    )


def _facts(study: Study) -> dict[str, str]:
    pruned = [n for n, p in zip(study.layers, study.pruned_layers, strict=True) if p]
    weights = int(study.sizes[study.pruned_layers].sum())
    return {
        **study.about,
        "Networks": f"{len(study.seeds)}, of seeds {_numbers(study.seeds)}.",
        "Criteria": ", ".join(f"{m.criterion} ({m.units})" for m in study.methods) + ".",
        "Sparsities": ", ".join(map(_share, study.sparsities)) + ".",
        "Pruned layers": f"{', '.join(pruned)}: {weights:,} of {int(study.sizes.sum()):,} weights.",
        "Scope": study.scope + ".",
        "Fine-tuning": f"{study.epochs} epochs, pruned weights held at zero.",
        "Chance": "Random pruning of the same network, layers and number of units.",
    }


def _numbers(values: Sequence[int]) -> str:
    if list(values) == list(range(values[0], values[0] + len(values))):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values))


def _made() -> str:
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return (
        f"purepruning {__version__}, JAX {installed('jax')} on {jax.default_backend()}, "
        f"NumPy {np.__version__}, Python {platform.python_version()}; {today.isoformat()}."
    )
