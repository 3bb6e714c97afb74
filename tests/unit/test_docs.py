"""The documentation: links that lead somewhere, pictures that are pictures."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("weights/*.md")),
]


def anchors(page: Path) -> set[str]:
    """What its headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not heading or heading in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_and_tests_that_are_named_are_there(page):
    for name in re.findall(r"\b(?:configs/\w+\.yaml|tests/[\w/]+\.py|carla_digr/[\w/]+\.py)", page.read_text()):
        assert (ROOT / name).exists(), name


def test_drawings_are_well_formed():
    for file in ROOT.glob("docs/*.svg"):
        assert ElementTree.parse(file).getroot().tag.endswith("svg")


def test_nothing_but_documentation_lies_in_docs():
    tracked = subprocess.run(["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in tracked if name.endswith((".safetensors", ".json"))]
