"""`carla-digr benchmark simulator`: what it writes; how fast this machine is is not judged here."""

from __future__ import annotations

import json

import cv2
import pytest

from carla_digr.cli import main
from carla_digr.driving.benchmark import SIZES, VEHICLES


def test_it_writes_figures_and_plots_of_both_routes(tmp_path, capsys):
    out = tmp_path / "new" / "results"
    assert main(["benchmark", "simulator", "--out", str(out), "--seconds", "0.01"]) in (0, 1)
    results = json.loads((out / "results.json").read_text())
    for by, points in (("by_vehicles", VEHICLES), ("by_picture_size", SIZES)):
        for route in ("steps", "round_trips"):
            assert list(results[by][route]) == [str(n) for n in points]
            assert all(rate > 0.0 for point in results[by][route].values() for rate in point.values())
    assert {goal["goal"] for goal in results["goals"].values()} == {1000.0, 600.0}
    for name in ("vehicles.png", "picture_size.png"):
        assert cv2.imread(str(out / name)).shape[0] > 300
    said = capsys.readouterr().out
    assert "steps/s with picture, 28 vehicles: " in said
    assert "round trips/s, 20 vehicles: " in said


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--seconds", "0"], "choose a positive time"), (["--out", "/dev/null/results"], "choose another directory")],
)
def test_what_cannot_be_measured_is_one_sentence(options, named, capsys):
    assert main(["benchmark", "simulator", *options]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert named in seen.err and seen.err.count("\n") == 1
