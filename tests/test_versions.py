"""Versions of other packages: the bounds agree, what is too old says so, internals in one place."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import purepruning
from purepruning import versions
from purepruning_interop.torch import internals
from tests.messages import raises

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "purepruning").rglob("*.py"), *(ROOT / "interop").rglob("*.py")])


def pins(name):
    """The version of every package in a file of constraints."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def lower_bounds():
    """The lower bound of every package that the library or an adapter needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"]]
    for extra in ("flax", "equinox", "haiku", "keras", "torch"):
        texts += project["optional-dependencies"][extra]
    found = [Requirement(text) for text in texts]
    return {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in found}


def installed(monkeypatch, **found):
    """Lets packages seem installed in these versions; None: not at all."""
    found = {name.replace("_", "-"): version for name, version in found.items()}
    versions._warn.cache_clear()

    def version(package):
        if found[package] is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_oldest_versions_are_the_lower_bounds_and_the_lowest_constraints():
    oldest = {package: limits.oldest for package, limits in versions.RANGES.items()}
    assert oldest == lower_bounds()
    lowest = pins("constraints-lowest.txt")
    assert {package: lowest[package] for package in oldest} == oldest


def test_both_files_of_constraints_are_within_the_ranges(monkeypatch):
    for file in ("constraints.txt", "constraints-lowest.txt"):
        monkeypatch.setattr(importlib.metadata, "version", pins(file).__getitem__)
        for package in versions.RANGES:
            versions.require(package, "test")  # warnings are errors


@pytest.mark.parametrize(
    ("package", "found", "oldest"),
    [("jax", "0.6.2", "0.7.2"), ("flax", "0.9", "0.12.0"), ("numpy", "1.26.4", "2.0.0")],
)
def test_an_old_version_is_refused_in_one_sentence(monkeypatch, package, found, oldest):
    installed(monkeypatch, **{package: found})
    with raises(
        ImportError,
        f"some.module needs {package} {oldest} or later, found {found}; run: pip install --upgrade "
        f"'{package}>={oldest}'",
    ):
        versions.require(package, "some.module")


@pytest.mark.parametrize("found", ["0.13.0", "0.13.0.dev20261101+abc", "1.0", "0.100.2rc1"])
def test_a_version_newer_than_tested_warns_once(monkeypatch, found):
    installed(monkeypatch, jax=found)
    expected = (
        f"jax {found} is newer than 0.12, the newest that purepruning {purepruning.__version__} "
        "was tested with: what it computes may not hold; upgrade purepruning, or install "
        "'jax==0.12.*'"
    )
    with pytest.warns(UserWarning, match=re.escape(expected)):
        versions.require("jax", "one")
    versions.require("jax", "another")  # warnings are errors


def test_within_the_range_or_unknown_nothing_is_said(monkeypatch):
    for found in ("0.7.2", "0.10.2", "0.12", "0.12.99", None):
        installed(monkeypatch, jax=found)
        versions.require("jax", "test")
    for found in ("2.0.0", "2.5.1", "3.0"):  # whose stable interface is all that is used
        installed(monkeypatch, numpy=found)
        versions.require("numpy", "test")


NEEDS = [
    ("purepruning", "jax"),
    ("purepruning", "safetensors"),
    ("purepruning_interop.linen", "flax"),
    ("purepruning_interop.nnx", "flax"),
    ("purepruning_interop.equinox", "equinox"),
    ("purepruning_interop.haiku", "dm-haiku"),
    ("purepruning_interop.keras", "keras"),
    ("purepruning_interop.torch", "torch"),
    ("purepruning_interop.torch", "array-api-compat"),
]

# Imports each module with one package claimed to be of some other version than it is.
IMPORT = """
import importlib, importlib.metadata, sys
version = importlib.metadata.version
for needs in sys.argv[1:]:
    module, package, claimed = needs.split()
    importlib.metadata.version = lambda name: claimed if name == package else version(name)
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(error)
"""


def test_importing_what_needs_an_old_package_says_so():
    needs = [f"{module} {package} 0.0.1" for module, package in NEEDS]
    command = [sys.executable, "-c", IMPORT, *needs]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    expected = [
        f"{module} needs {package} {versions.RANGES[package].oldest} or later, found 0.0.1; "
        for module, package in NEEDS
    ]
    lines = result.stdout.splitlines()
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


def test_a_newer_package_is_told_at_the_line_that_imports(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(IMPORT.replace("importlib.import_module(module)", "import purepruning"))
    command = [sys.executable, "-W", "default::UserWarning", script, "purepruning jax 9.1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert result.stderr.count("UserWarning: jax 9.1 is newer than 0.12") == 1
    assert result.stderr.splitlines()[-1].strip() == "import purepruning"


BARE = """
import importlib.metadata
version = importlib.metadata.version

def unknown(name):
    if name == "purepruning":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = unknown
import sys
import numpy as np
import purepruning as pp
pp.save_masks(sys.argv[1], {"w": np.ones(2, bool)}, {"w": np.ones(2, np.float32)})
assert pp.load_masks(sys.argv[1], {"w": np.ones(2, np.float32)})["w"].all()
print(pp.__version__)
"""


def test_a_checkout_that_is_not_installed_can_be_used(tmp_path):
    command = [sys.executable, "-c", BARE, tmp_path / "masks.safetensors"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == purepruning.__version__, result.stderr


def test_only_the_check_of_versions_asks_what_is_installed():
    asking = [source.name for source in SOURCES if "importlib.metadata" in source.read_text()]
    assert asking == ["versions.py"]


def private_names(source):
    """What a file uses of JAX, Flax, Equinox and Haiku that they do not document."""
    text = source.read_text()
    found = set(re.findall(r"\b(?:jax\.(?:extend|interpreters|_\w+)|_pytree__is\w*)\b", text))
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            modules = [ast.unparse(node)]
            documented = ("jax.core.Tracer", "jax.core.ShapedArray")
            if modules[0].startswith("jax.core.") and modules[0] not in documented:
                found.add(modules[0])
        for module in modules:
            first, *rest = module.split(".")
            if first in ("jax", "flax", "nn", "nnx", "eqx", "equinox", "hk", "haiku"):
                found |= {module for part in rest if re.match(r"_(?!_)", part)}
    return found


def test_internals_of_jax_are_used_in_one_module():
    ours = [source for source in SOURCES if "torch" not in source.parts]
    users = {source.relative_to(ROOT).as_posix(): private_names(source) for source in ours}
    users = {name: found for name, found in users.items() if found}
    assert users.keys() == {"purepruning/jaxpr/internals.py"}, users


IMPORT_SECONDS = """
import time
import jax, optax
start = time.process_time()
import purepruning
print(time.process_time() - start)
"""


def test_importing_the_library_takes_a_quarter_of_a_second_at_most():
    # As for a user, whose Python keeps what it compiled; the first process may compile.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", IMPORT_SECONDS]

    def seconds():
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        return float(result.stdout)

    assert any(seconds() <= 0.25 for _ in range(3))


def names_of_torch(source):
    """The operators and private names, below ``torch``, that a file of its adapter uses."""
    tree = ast.parse(source.read_text())
    roots = {"torch": "", "aten": "ops.aten", "_aten": "ops.aten", "_Tensor": "Tensor"}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "torch":
            for alias in node.names:
                name = ".".join([*node.module.split(".")[1:], alias.name])
                roots[alias.asname or alias.name] = name
                found.add(name)
    for node in ast.walk(tree):
        first, *rest = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else [""]
        if first in roots and all(part.isidentifier() for part in rest):
            rest = [part for part in rest if not part.startswith("__")]
            found.add(".".join([*filter(None, [roots[first]]), *rest]))
    private = {n for n in found if re.search(r"(^|\.)_(?!_)", n)}
    called = {n for n in found if re.fullmatch(r"ops\.aten\.\w+\.\w+", n)}
    return {n for n in private | called if not n.startswith("ops.") or n in called}


def test_names_of_torch_are_those_that_importing_checks():
    used = {
        n for source in (ROOT / "interop").rglob("torch/**/*.py") for n in names_of_torch(source)
    }
    longest = {n for n in used if not any(other.startswith(f"{n}.") for other in used)}
    assert longest - set(internals.NAMES) == set(), "used: write them into internals.py"
    assert set(internals.NAMES) - longest == set(), "not used: take them out of internals.py"


LACKING = """
import torch.fx.graph
del torch.fx.graph._PyTreeInfo
import purepruning_interop.torch
"""


def test_importing_the_adapter_checks_the_names():
    command = [sys.executable, "-c", LACKING]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: purepruning_interop.torch needs torch.fx.graph._PyTree")


def test_a_torch_without_a_name_is_refused():
    internals.check(internals.NAMES)
    gone = ["nn.Linear", "ops.aten.relu.default", "ops.aten.relu.other", "_nothing.at_all"]
    with raises(
        ImportError,
        f"purepruning_interop.torch needs torch.ops.aten.relu.other and torch._nothing.at_all, "
        f"which torch {torch.__version__} does not have; run: pip install 'torch==2.13.*'",
    ):
        internals.check(gone)
