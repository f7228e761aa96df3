"""Every page of the documentation, run as it stands; and what a site cannot check of itself."""

import os
import re
from pathlib import Path

import jax
import pytest
import torch

import purepruning as pp

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

#: Run by test_coming_from_nni, with more to say of what comes out.
WITH_CODE = [p for p in PAGES if BLOCK.search(p.read_text()) and p.name != "coming_from_nni.md"]

pytestmark = pytest.mark.usefixtures("unoptimized")


def name(page):
    return page.relative_to(ROOT / "docs").as_posix()


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = page.read_text()
    names = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in BLOCK.finditer(text):
            line = text[: block.start(1)].count("\n")
            code = "\n" * line + block[1]
            exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_and_images_of_a_page_exist(page):
    text = page.read_text()
    assert [n for n in re.findall(r"\bpp\.(\w+)", text) if not hasattr(pp, n)] == []
    for alternative, target in re.findall(r"!\[(.*?)\]\((.*?)[)#\s]", text):
        assert alternative, f"{target} needs a text for those who do not see it"
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {name(page) for page in PAGES}


def test_every_public_name_is_in_the_reference():
    text = "".join(p.read_text() for p in PAGES if p.parent.name == "reference")
    documented = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    missing = []
    for public in pp.__all__:
        found = getattr(pp, public)
        module = getattr(found, "__module__", "")
        places = {f"purepruning.{public}", module, getattr(found, "__name__", "")}
        if not places & documented:
            missing.append(public)
    assert missing == []


def test_readme_is_short_enough_to_be_read():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    wanted = text.partition("## What you want")[2].partition("\n\nAdapters")[0]
    assert len([line for line in wanted.splitlines() if line.startswith("|")]) <= 2 + 8


def test_links_of_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(
        r'(?:src|srcset)="([^"]+)"', text
    ):
        if not target.startswith("http"):
            assert os.path.exists(ROOT / target), target
