"""What the README shows is what the examples run, and what CONTRIBUTING shows works."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.granularity import grid

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("example", ["quickstart_jax.py", "quickstart_torch.py"])
def test_the_snippets_are_the_example_files(example):
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(rf"<!-- examples/{example} -->\n```python\n(.*?)\n```", readme, re.DOTALL)
    _, _, code = (ROOT / "examples" / example).read_text().split('"""', 2)
    assert shown == code.strip()


@pytest.mark.parametrize("subject", ["quickstart", "statistics"])
def test_lines_that_differ_between_frameworks_are_marked(subject):
    by_jax, by_torch = (
        (ROOT / "examples" / f"{subject}_{framework}.py").read_text().split('"""', 2)[2]
        for framework in ("jax", "torch")
    )
    same = [line for line in by_torch.splitlines() if not line.endswith("# changed")]
    assert all(line in by_jax.splitlines() for line in same)


@pytest.mark.parametrize("example", ["quickstart_jax.py", "quickstart_torch.py", "schedule_jax.py"])
def test_the_short_examples_have_twelve_lines(example):
    code = (ROOT / "examples" / example).read_text().split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line]) <= 12


def test_every_public_name_in_the_readme_exists():
    names = re.findall(r"\bpp\.(\w+)", (ROOT / "README.md").read_text())
    assert [name for name in names if not hasattr(pp, name)] == []


def test_the_pruner_in_contributing():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    weight = np.float32([[1, -9, 2, 0], [-3, 4, 2, 1]])
    layer = pp.Layer("fc", "Linear", "w", (2, 4), out_axes=(1,), in_axes=(0,))
    rules = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    config = pp.resolve(rules, [layer], granularity="output_channel")
    elements = pp.resolve(rules, [layer])
    for array in (jnp.asarray(weight), torch.from_numpy(weight)):
        masks = names["max_norm"]({"w": array}, None, config)
        assert masks["w"].tolist() == [[True, True, False, False]]
        masks = names["max_norm"]({"w": array}, None, elements)
        assert masks["w"].tolist() == [[False, True, False, False], [True, True, True, False]]
    # A call on one CPU hands NumPy arrays in.
    score = names["_MAX_NORM"].channel(weight, None, grid(layer, "output_channel"))
    assert score.tolist() == [[3, 9, 2, 1]]
