"""The documentation: links that lead somewhere, pictures that are pictures."""

from __future__ import annotations

import re
import shlex
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from test_layering import FLOORS

from carla_digr.cli import parser
from carla_digr.importing import ImportOptions
from carla_digr.saliency import METHODS

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


def blocks(page: str, language: str) -> str:
    """The page's code of a language."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", ["README.md", "docs/policies.md"])
def test_python_examples_run(page):
    code = blocks(page, "python").replace("my_policy.safetensors", "driving_student")
    names = {"frames": np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)}
    exec(code, names)
    assert names["maps"].shape == (2, 128, 128) and names["maps"].dtype == np.float32
    assert names["picture"].shape == (128, 128, 3)


def test_the_example_of_options_is_read(tmp_path):
    (tmp_path / "card.yaml").write_text(blocks("docs/policies.md", "yaml"))
    options = ImportOptions.from_yaml(tmp_path / "card.yaml")
    assert len(options.actions) == len(options.controls) == 4
    assert options.input.size == (84, 84) and options.input.scale == 1 / 255


def test_every_method_is_described():
    page = (ROOT / "docs" / "methods.md").read_text()
    for name, method in METHODS.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert row.endswith(f"| {method.needs.replace('logits', 'outputs')} | {method.speed} |"), name


def test_the_architecture_lists_every_room_by_floors():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    rooms = [name for row in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", row)]
    inside = [room for room in rooms if room in FLOORS]
    assert set(inside) == set(FLOORS)
    assert inside == sorted(inside, key=FLOORS.index, reverse=True)


@pytest.mark.parametrize("page", ["docs/cluster.md", "docs/carla_server.md"])
def test_commands_of_the_pages_on_servers_are_commands(page):
    lines = re.findall(r"^(?: {4})?(carla-digr [^#&\n]*)", (ROOT / page).read_text(), re.MULTILINE)
    assert len(lines) > 3
    for line in lines:
        parser().parse_args(shlex.split(line.strip())[1:])
