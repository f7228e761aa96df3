"""A report as one page of HTML: markup here, style and script in the files beside."""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

from purepruning.saving.files import write_whole
from purepruning_interop.report.contents import (
    Commands,
    Curves,
    Facts,
    Profile,
    Report,
    Table,
)

#: Nothing is loaded from anywhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Writes a report; the file appears whole or not at all."""
    write_whole(Path(path), render(report).encode())


def render(report: Report) -> str:
    """Returns the page."""
    sections = "\n".join(_section(i, s) for i, s in enumerate(report.sections))
    tiles = "".join(
        f"<div class=tile><dt>{_text(label)}</dt><dd><b>{_text(value)}</b>"
        f"<span>{_text(remark)}</span></dd></div>"
        for label, value, remark in report.tiles
    )
    links = "".join(
        f'<li><a href="#section-{i}">{_text(s.title)}</a></li>'
        for i, s in enumerate(report.sections)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{_text(report.title)} · {_text(report.kind)}</title>
<style>
{_file("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header>
<p class="kind">{_text(report.kind)}</p>
<h1>{_text(report.title)}</h1>
<p class="lead">{_text(report.lead)}</p>
<dl class="tiles">{tiles}</dl>
<nav aria-label="On this page"><ul>{links}</ul></nav>
</header>
<main id="main" tabindex="-1">
{sections}
</main>
<footer><p>{_text(report.made)}</p></footer>
<script>
{_file("page.js")}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _text(value: str) -> str:
    return html.escape(value, quote=True).replace(" %", "\u00a0%")


def _section(number: int, section: Any) -> str:
    note = getattr(section, "note", "")
    note = f'<p class="note">{_text(note)}</p>' if note else ""
    content = _CONTENT[type(section)](number, section)
    return (
        f'<section id="section-{number}" aria-labelledby="title-{number}">'
        f'<h2 id="title-{number}">{_text(section.title)}</h2>{note}{content}</section>'
    )


def _data(number: int, value: Any) -> str:
    """Returns data for the script; nothing in it can end the element."""
    content = json.dumps(value, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="data-{number}">{content}</script>'


_NO_SCRIPT = "<noscript><p>This needs JavaScript; the table has the same numbers.</p></noscript>"


def _curves(number: int, curves: Curves) -> str:
    data = dataclasses.asdict(curves)
    return f'<div class="curves" data-for="data-{number}">{_NO_SCRIPT}</div>{_data(number, data)}'


def _profile(number: int, profile: Profile) -> str:
    data = dataclasses.asdict(profile)
    return f'<div class="profile" data-for="data-{number}">{_NO_SCRIPT}</div>{_data(number, data)}'


def _table(number: int, table: Table) -> str:
    heads = "".join(
        f'<th scope="col" class="{"number" if c.number else "text"}"'
        f"{' data-choose' if c.choose else ''}>{_text(c.name)}</th>"
        for c in table.columns
    )
    rows = "".join(
        "<tr>" + "".join(_cell(i, c, table) for i, c in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="table" role="region" aria-labelledby="title-{number}" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(number: int, cell: Any, table: Table) -> str:
    text, key = cell if isinstance(cell, tuple) else (cell or "", None)
    tag, scope = ("th", ' scope="row"') if number == 0 else ("td", "")
    kind = "number" if table.columns[number].number else "text"
    kind += {"▲": " up", "▼": " down"}.get(text[:1], "")
    value = "" if key is None else f' data-key="{float(key)!r}"'
    content = _text(text).replace("_", "_<wbr>") if number == 0 else _text(text)
    return f'<{tag}{scope} class="{kind}"{value}>{content}</{tag}>'


def _facts(number: int, facts: Facts) -> str:
    rows = (f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.facts.items())
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _commands(number: int, commands: Commands) -> str:
    lines = _text("\n".join(commands.lines))
    return f'<div class="commands"><pre tabindex="0"><code>{lines}</code></pre></div>'


_CONTENT: dict[type, Any] = {
    Curves: _curves,
    Profile: _profile,
    Table: _table,
    Facts: _facts,
    Commands: _commands,
}
