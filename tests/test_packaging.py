"""The two packages: what importing them loads, what they may import, what is shipped with them."""

import ast
import importlib.metadata
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import purepruning
import purepruning_interop

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"torch", "array_api_compat", "flax", "equinox", "haiku", "keras", "tensorflow"}
LIBRARY = [m.name for m in pkgutil.walk_packages(purepruning.__path__, "purepruning.")]
SOURCES = sorted((ROOT / "purepruning").rglob("*.py"))

# Adapter -> the framework it is for, and what that may bring along: `import haiku` itself imports
# flax where that is installed (for haiku.experimental.flax).
ADAPTERS = {
    "linen": ("flax", set()),
    "nnx": ("flax", set()),
    "equinox": ("equinox", set()),
    "haiku": ("haiku", {"flax"}),
    "keras": ("keras", set()),
    "torch": ("torch", {"array_api_compat"}),
}

# What one file of the library may import beside the standard library, jax and numpy.
ALSO = {
    "arrays.py": {"array_api_compat"},
    "coupling/draw.py": {"matplotlib"},
    "saving/files.py": {"safetensors"},
    "saving/masks.py": {"safetensors"},
    "saving/plans.py": {"safetensors"},
    "saving/quantized.py": {"safetensors"},
    "saving/states.py": {"safetensors"},
    "training/keep_pruned.py": {"optax"},
    "training/masks_in_state.py": {"optax"},
    "training/on_schedule.py": {"optax"},
    "training/sparse.py": {"optax"},
    "search/ddpg.py": {"optax"},
    "search/driver.py": {"rich"},
    "search/knapsack.py": {"scipy"},
    "search/sensitivity.py": {"matplotlib"},
    "summary.py": {"rich"},
}

LOADED_BY = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    before = set(sys.modules)
    importlib.import_module(name)
    found[name] = sorted({m.partition(".")[0] for m in set(sys.modules) - before})
print(json.dumps(found))
"""


def loaded_by(modules: list[str], cwd: Path) -> dict[str, set[str]]:
    """Returns the top-level packages that importing each module, in turn, adds to a new process."""
    command = [sys.executable, "-W", "error", "-c", LOADED_BY, *modules]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return {name: set(tops) for name, tops in json.loads(result.stdout).items()}


def test_importing_the_library_loads_no_framework(tmp_path):
    forbidden = FRAMEWORKS | {"purepruning_interop"}
    found = loaded_by(["purepruning", *LIBRARY], tmp_path)
    assert {name: tops & forbidden for name, tops in found.items() if tops & forbidden} == {}


def test_importing_the_adapters_package_loads_no_framework(tmp_path):
    assert loaded_by(["purepruning_interop"], tmp_path)["purepruning_interop"] & FRAMEWORKS == set()


@pytest.mark.parametrize("part", ["recipes", "tasks", "study", "report"])
def test_what_serves_all_frameworks_loads_none_of_them(part, tmp_path):
    name = f"purepruning_interop.{part}"
    assert loaded_by([name], tmp_path)[name] & FRAMEWORKS == set()


def test_adapters_are_the_listed_ones():
    found = {m.name for m in pkgutil.iter_modules(purepruning_interop.__path__)}
    listed = {*ADAPTERS, "recipes", "tasks", "study", "report", "checkpoints", "runs", "cli"}
    assert {name for name in found if not name.startswith("_")} == listed


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_loads_its_own_framework_only(adapter, tmp_path):
    own, brought = ADAPTERS[adapter]
    name = f"purepruning_interop.{adapter}"
    found = loaded_by([name], tmp_path)[name] & FRAMEWORKS
    assert own in found
    assert found <= {own} | brought


def imported(source: Path) -> set[str]:
    """Returns the modules named by the imports of a file, at any depth and by import_module too."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                names.add("." * node.level + (node.module or ""))
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called),
                args=[ast.Constant(value=str(name)), *_],
            ) if called in ("import_module", "__import__"):
                names.add(name)
    return names


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_library_source_imports_only_its_dependencies(source):
    allowed = set(sys.stdlib_module_names) | {"purepruning", "jax", "numpy"}
    allowed |= ALSO.get(source.relative_to(ROOT / "purepruning").as_posix(), set())
    assert {name for name in imported(source) if name.partition(".")[0] not in allowed} == set()


def test_all_is_the_public_names():
    public = {
        name
        for name, value in vars(purepruning).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    listed = [name for name in purepruning.__all__ if not name.startswith("__")]
    modules = {name for name in listed if isinstance(getattr(purepruning, name), ModuleType)}
    assert set(listed) - modules == public
    assert len(set(listed)) == len(listed)


def test_classes_at_the_top_are_those_that_a_program_makes_or_takes():
    """What functions return, and what they keep, stays in their modules."""
    found = {n for n in purepruning.__all__ if isinstance(getattr(purepruning, n), type)}
    made = {"Layer", "Activation", "Block", "NM", "Criterion", "Schedule"}
    assert found == made | {"Config", "Coupling", "Plan"}


def test_version_is_that_of_the_installed_distribution():
    assert purepruning.__version__ == importlib.metadata.version("purepruning")


@pytest.mark.parametrize("package", [purepruning, purepruning_interop], ids=lambda p: p.__name__)
def test_package_is_typed(package):
    assert (Path(package.__file__).parent / "py.typed").is_file()


def test_constraints_pin_every_direct_dependency_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    wanted += [Requirement(t) for extra in project["optional-dependencies"].values() for t in extra]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line)] == []
    pinned = dict(line.split("==") for line in lines)
    for requirement in wanted:
        if requirement.name != "purepruning":
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
