"""The ordinary drive's pictures and poses are those of the day on which drives were last allowed to change.

Its facts lie beside this file; ``python tests/unit/test_same_bytes.py`` writes them anew. They are compared to the byte
where the machine is like the one that wrote them: fused multiply-adds, which pictures may use, the compiler and the
C library, which has sine and cosine. Elsewhere a last bit may differ, so there the drive must be the same to the eye.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np

from carla_digr.driving.control import ACTIONS
from carla_digr.simulator.lidar import Beams
from carla_digr.tasks.driving.drive import InProcessDrive

FACTS = Path(__file__).with_name("ordinary_drive.json")
FRAMES, SEED, BLOCK = 40, 5, 32


def machine() -> dict[str, Any]:
    """What may change the last bit of a result."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return {
        "architecture": platform.machine(),
        "fused multiply-add": "fma" in flags,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "C library": " ".join(platform.libc_ver()),
    }


def ordinary_drive() -> dict[str, Any]:
    """Hashes of everything that a drive of 40 frames shows, and what of it can be compared with a tolerance."""
    drive = InProcessDrive(vehicles=64)
    frame = drive.reset(SEED)
    wheels = tuple(ACTIONS["wheels"].values())
    choice = np.repeat(np.random.default_rng(SEED).integers(0, len(wheels), FRAMES // 5), 5)
    hashes = {name: hashlib.sha256() for name in ("poses", "pictures", "ids", "depths", "lidar")}
    means, places = [], []
    for number in choice:
        world = drive.world
        hashes["poses"].update(world.vehicles.tobytes())
        hashes["pictures"].update(frame.image.tobytes())
        hashes["ids"].update(world.instances(drive.camera).tobytes())
        hashes["depths"].update(world.depths(drive.camera).tobytes())
        ego = world.vehicle(drive.ego)
        seen = world.scan(
            (float(ego["x"]), float(ego["y"]), 2.4, 0.0, float(ego["yaw"]), 0.0), Beams(range=60.0), 0, 0.05
        )
        hashes["lidar"].update(seen.points.tobytes() + seen.ids.tobytes())
        side = frame.image.shape[0] // BLOCK
        means.append(frame.image.reshape(side, BLOCK, side, BLOCK, 3).mean(axis=(1, 3, 4)).round(1).ravel().tolist())
        places.append([round(float(v), 3) for v in (ego["x"], ego["y"], ego["yaw"], ego["speed"])])
        frame = drive.step(wheels[number])
    return {"hashes": {name: h.hexdigest() for name, h in hashes.items()}, "means": means, "places": places}


def test_the_ordinary_drive_has_not_changed():
    before, now = json.loads(FACTS.read_text()), ordinary_drive()
    if machine() == before["machine"]:
        assert now["hashes"] == before["hashes"]
    np.testing.assert_allclose(now["places"], before["places"], atol=0.05)
    assert np.abs(np.array(now["means"]) - np.array(before["means"])).mean() < 0.5


def test_a_changed_drive_is_seen():
    """The tolerance of other machines is narrower than one vehicle's place in the picture."""
    before = np.array(json.loads(FACTS.read_text())["means"])
    assert np.abs(before[1:] - before[:-1]).mean() > 0.5
    assert len(set(map(tuple, json.loads(FACTS.read_text())["places"]))) == FRAMES


if __name__ == "__main__":
    FACTS.write_text(json.dumps({"machine": machine(), **ordinary_drive()}) + "\n")
