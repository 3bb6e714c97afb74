"""The licences of what a drive needs: none that binds who uses it."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
BINDING = re.compile(r"(?<!L)(?<!Lesser )(GPL|General Public License)")
EITHER = {"docutils"}  # the GPL's part of it is an editor's mode


def pinned(name: str) -> list[Requirement]:
    """The requirements of a file for this Python."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return [r for r in found if r.marker is None or r.marker.evaluate()]


def closure(requirements: list[Requirement]) -> dict[str, metadata.Distribution]:
    """All distributions that these need, by name."""
    found: dict[str, metadata.Distribution] = {}
    left = [(r.name, extra) for r in requirements for extra in ("", *r.extras)]
    seen = set()
    while left:
        name, extra = left.pop()
        if (name.lower(), extra) in seen:
            continue
        seen.add((name.lower(), extra))
        found[name.lower()] = metadata.distribution(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                left += [(requirement.name, more) for more in ("", *requirement.extras)]
    return found


def licence(distribution: metadata.Distribution) -> str:
    """What a package says of its licence; the ROS wheels say it in their package.xml alone."""
    about = distribution.metadata
    said = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    said += [about["License-Expression"] or "", (about["License"] or "").partition("\n")[0]]
    share = Path(sys.prefix) / "share" / about["Name"].removeprefix("ros-").replace("-", "_") / "package.xml"
    if not any(said) and share.is_file():
        said += re.findall(r"<license[^>]*>([^<]*)<", share.read_text())
    return "; ".join(filter(None, said))


def test_what_a_drive_needs_binds_nobody():
    needed = closure(pinned("base.txt") + pinned("ros.txt"))
    assert {"torch", "carla", "ros-rclpy"} <= set(needed)
    binding = {name: licence(d) for name, d in needed.items() if name not in EITHER and BINDING.search(licence(d))}
    assert not binding
    assert "ale-py" not in needed


def test_the_game_that_is_asked_for_has_the_gpl():
    assert BINDING.search(licence(metadata.distribution("ale-py")))
    assert not BINDING.search(licence(metadata.distribution("pygame-ce")))  # the lesser one
