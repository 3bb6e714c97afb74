"""The configuration of a tiny Red-Fetch-Green run that tests of the offline stages share."""

from __future__ import annotations

TINY = {
    "task": "red_fetch_green",
    "seed": 3,
    "policy": {"convolutions": [[8, 8, 4], [8, 4, 2], [8, 3, 1]], "features": 16},
    "environment": {"max_steps": 40},
    "teacher": {
        "total_steps": 3840,
        "environments": 8,
        "rollout_steps": 16,
        "epochs": 2,
        "minibatch_size": 64,
        "learning_rate_end": 1e-4,
        "checkpoint_interval": 640,
    },
    "saliency_dataset": {"maps": 44, "shard_size": 4, "stride": 4, "state_interval": 3, "environments": 4},
    "distill": {
        "iterations": 60,
        "environments": 4,
        "environment_steps": 2,
        "buffer_states": 400,
        "saliency_batch": 8,
        "buffer_batch": 8,
        "hard_states": 0.5,
        "validation_interval": 20,
        "checkpoint_interval": 10,
    },
    "evaluation": {
        "episodes": 6,
        "environments": 4,
        "saliency_states": 12,
        "examples": 2,
        "table_states": 20,
        "slow_states": 5,
        "attack_episodes": 2,
        "attack_epsilons": [0.05],
    },
}
