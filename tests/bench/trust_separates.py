"""Which agreement tells a right map from a wrong one.

``python tests/bench/trust_separates.py [FRAMES]``: frames of greedy drives of the shipped student (objects_truth.py).
Its map of each is held against the perturbation map of the same frame, and so are the map of another frame and that of
the network with random weights.
"""

from __future__ import annotations

import sys

import cv2
import numpy as np
import torch
from objects_truth import frames

from carla_digr import checkpoint
from carla_digr.explainer import Explainer
from carla_digr.live.composition import WEIGHTS
from carla_digr.live.trust import LOW, agreement
from carla_digr.saliency import METHODS
from carla_digr.saliency.faithfulness import randomised
from carla_digr.saliency.metrics import auc
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    explainer = Explainer.from_checkpoint(WEIGHTS)
    policy, card = checkpoint.load(WEIGHTS)
    *_, (_, without) = randomised(policy, 0)
    perturbation = Perturbation.from_settings(card.get("config", {}).get("saliency_dataset", {}))
    states = [explainer.decide(frame.image).state for _, frame in frames(explainer, wanted)]
    slow = [perturbation_maps(policy, state, perturbation)[0].numpy() for state in states]
    for name in ("digr", "linear"):
        right, random = (
            [METHODS[name](whose, state.clone(), None, perturbation)[0].detach().numpy() for state in states]
            for whose in (policy, without)
        )
        other = right[wanted // 2 :] + right[: wanted // 2]
        found = {
            kind: np.array([agreement(live, truth) for live, truth in zip(maps, slow, strict=True)])
            for kind, maps in (("right", right), ("another frame's", other), ("random weights'", random))
        }
        for kind, values in found.items():
            told = "" if kind == "right" else f", AUC against the right ones {auc(found['right'], values):.3f}"
            print(f"{name}, {kind}: {values.mean():.2f}, {(values < LOW).mean():.0%} under {LOW}{told}")


if __name__ == "__main__":
    main()
