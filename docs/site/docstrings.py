"""Docstrings as Markdown: roles, formulas, examples and tables of reStructuredText.

Formulas become MathML, which browsers draw themselves, so that the site needs no script for them.
"""

import re

import griffe
from latex2mathml.converter import convert

_ROLE = re.compile(r":(?:func|meth|class|mod|attr|data):`~?([\w.]+)`")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
_RULE = re.compile(r" *={3,}( +={3,})* *$")


class Markdown(griffe.Extension):
    """Rewrites every docstring when it is loaded."""

    def on_object(self, *, obj, **kwargs):
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text):
    """Returns a docstring with fences around code, and formulas as MathML outside of them."""
    parts = re.split(r"(^ *```.*?^ *```$)", _fenced(text), flags=re.DOTALL | re.MULTILINE)
    return "".join(p if i % 2 else _inline(p) for i, p in enumerate(parts))


def _inline(text):
    text = _FORMULA.sub(_mathml, _ROLE.sub(r"`\1`", text))
    return text.replace("``", "`")


def _mathml(match):
    display = "block" if match[1] else "inline"
    return convert(" ".join((match[1] or match[2]).split()), display=display)


def _fenced(text):
    """Puts fences around doctests, blocks after ``::``, and tables."""
    out, fence, base = [], None, 0
    after = False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if fence and (
            (fence == "pycon" and not line.strip())
            or (fence == "text" and line.strip() and indent <= base)
            or (fence == "table" and not line.strip())
        ):
            while out and not out[-1].strip():
                out.pop()
            out += [" " * (base if fence != "text" else base + 4) + "```", ""]
            fence = None
        if fence is None:
            if line.lstrip().startswith(">>> "):
                fence, base = "pycon", indent
                out.append(" " * base + "```pycon")
            elif _RULE.match(line):
                fence, base = "table", indent
                out.append(" " * base + "```text")
            elif after and line.strip():
                if indent > base:
                    fence = "text"
                    out.append(" " * (base + 4) + "```python")
                after = False
            if line.rstrip().endswith("::"):
                after, base = True, indent
                line = line.rstrip()[:-1]
        out.append(line)
    if fence:
        while out and not out[-1].strip():
            out.pop()
        out.append(" " * (base if fence != "text" else base + 4) + "```")
    return "\n".join(out)
