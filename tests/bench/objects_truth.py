"""How well what a live drive says of objects agrees with taking them out of the world, and what it costs.

``python tests/bench/objects_truth.py [FRAMES [FINENESS]]``: greedy drives of the shipped student on the embedded
highway, one frame per 1.25 s. Each thing is painted over as in a live drive (carla_digr.objects) and, for the truth,
taken out and the instant rendered again (carla_digr.tasks.driving.objects). FINENESS: pixels of the segmentation for
one of the picture, along a side.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import cv2
import numpy as np
import torch

from carla_digr.driving.control import Neighbour, commands_of
from carla_digr.explainer import Explainer
from carla_digr.live.composition import WEIGHTS
from carla_digr.objects import explain_objects, viewed_objects
from carla_digr.saliency.metrics import rank_correlation
from carla_digr.simulator.sensors import instance_picture
from carla_digr.tasks.driving.drive import InProcessDrive
from carla_digr.tasks.driving.objects import scene_objects

APART = 25  # ticks between two frames
FRAMES_OF_A_DRIVE = 10
DECIDING = 0.3  # KL of a vehicle that decides


def neighbours(drive: InProcessDrive) -> dict[int, Neighbour]:
    """The vehicles around the ego, as the bridge knows them."""
    ego = drive.world.vehicle(drive.ego)
    found = {}
    for row in drive.world.vehicles:
        if row["id"] != drive.ego:
            east, south = row["x"] - ego["x"], row["y"] - ego["y"]
            cos, sin = np.cos(ego["yaw"]), np.sin(ego["yaw"])
            found[int(row["id"])] = Neighbour(float(east * cos + south * sin), float(south * cos - east * sin))
    return found


def frames(explainer: Explainer, wanted: int):
    """Drives with an instant each to ask about."""
    commands = commands_of(explainer.card)
    assert commands is not None
    seed, drive = 900_000, InProcessDrive()
    while wanted:
        seed += 1
        frame = drive.reset(seed)
        for _ in range(FRAMES_OF_A_DRIVE):
            for _ in range(APART):
                frame = drive.step(commands[explainer.decide(frame.image).action])
            if frame.collision or frame.off_road or not wanted:
                break
            wanted -= 1
            yield drive, frame


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    wanted, fineness = (*map(int, sys.argv[1:]), *(150, 2)[len(sys.argv) - 1 :])
    explainer = Explainer.from_checkpoint(WEIGHTS)
    rows, tops, costs, counts, matched = [], [], [], [], [0, 0]
    for drive, frame in frames(explainer, wanted):
        size = drive.camera.width * fineness
        labels = instance_picture(drive.world, replace(drive.camera, width=size, height=size))[:, :, 2::-1]
        around = neighbours(drive)
        decision = explainer.decide(frame.image)
        saliency = explainer.explain(decision).map
        begun = time.thread_time()
        live = explain_objects(explainer, decision, saliency, viewed_objects(labels, around, saliency.shape))
        costs.append((time.thread_time() - begun) * 1e3)
        counts.append(len(live))
        truth = scene_objects(drive)
        states = torch.from_numpy(np.stack([thing.without for thing in truth])).float() / 255
        effects, actions = explainer.instead(decision, states)
        own = []
        for thing, effect, action in zip(truth, effects, actions, strict=True):
            if thing.kind == "scenery":
                continue
            vehicle = thing.kind.endswith("vehicle")
            same = [thing.name == f"vehicle {other.seen.id}" if vehicle else not other.seen.id for other in live]
            overlaps = [int((thing.mask & other.seen.mask).sum()) * so for other, so in zip(live, same, strict=True)]
            best = int(np.argmax(overlaps)) if overlaps and max(overlaps) else None
            matched[0] += best is not None
            matched[1] += 1
            found = live[best].effect if best is not None else 0.0
            flip = live[best].flips if best is not None else False
            rows.append((vehicle, float(effect), action != decision.action, found, flip))
            if vehicle:
                own.append((float(effect), found))
        if own and max(own)[0] >= DECIDING:
            tops.append(int(np.argmax([effect for effect, _ in own])) == int(np.argmax([found for _, found in own])))
    table = np.array(rows, dtype=float)
    print(f"{wanted} frames, segmentation of {size} pixels, {np.mean(counts):.1f} objects a frame")
    print(f"truth's objects that are found in the segmentation: {matched[0]} of {matched[1]}")
    for name, keep in (
        ("vehicles", table[:, 0] == 1),
        ("lines and barriers", table[:, 0] == 0),
        ("all", table[:, 0] >= 0),
    ):
        _, effect, flip, found, said = table[keep].T
        both = (flip * said).sum()
        print(
            f"{name}: {keep.sum()} objects, rank correlation {rank_correlation(effect[None], found[None])[0]:.2f}, "
            f"{both:.0f} of {flip.sum():.0f} flips found ({both / flip.sum():.0%}), "
            f"{both:.0f} of {said.sum():.0f} said are true ({both / said.sum():.0%})"
        )
    print(f"the deciding vehicle (KL >= {DECIDING}) is named in {np.mean(tops):.0%} of {len(tops)} frames")
    print(f"CPU of objects a frame: median {np.median(costs):.1f} ms, 99 % {np.percentile(costs, 99):.1f} ms")


if __name__ == "__main__":
    main()
