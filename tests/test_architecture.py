"""The modules import as ARCHITECTURE.md says: downwards only, without a circle."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"purepruning": ROOT, "purepruning_interop": ROOT / "interop"}


def modules() -> dict[str, Path]:
    """Returns the file of every module by dotted name."""
    found = {}
    for package, base in PACKAGES.items():
        for path in (base / package).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Returns our modules that a module imports anywhere, functions and type checking included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {other for other in found if other in MODULES and other != name}


def table() -> dict[str, set[str]]:
    """Returns by part of the library what ARCHITECTURE.md lets it import, in its order."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$", text, re.MULTILINE)
    return {part: set(re.findall(r"`(\w+)`", allowed)) for part, allowed in rows}


def part_of(name: str) -> str:
    return name.split(".")[1]


LIBRARY = sorted(n for n in MODULES if n.startswith("purepruning."))


def test_every_part_is_in_the_table():
    assert set(table()) == {part_of(name) for name in LIBRARY}


def test_rows_name_only_parts_above_them():
    seen: set[str] = set()
    for part, allowed in table().items():
        assert allowed <= seen, part
        seen.add(part)


@pytest.mark.parametrize("part", sorted({part_of(name) for name in LIBRARY}))
def test_parts_import_what_their_row_names(part):
    used = {
        part_of(other)
        for name in LIBRARY
        if part_of(name) == part
        for other in imports(name)
        if other != "purepruning"
    }
    assert used - {part} == table()[part]


def test_only_the_edges_import_the_whole_library():
    assert not [name for name in LIBRARY if "purepruning" in imports(name)]


def test_no_module_imports_itself_through_others():
    graph = {name: imports(name) for name in MODULES}
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(path.pop())

    for name in sorted(graph):
        visit(name)
