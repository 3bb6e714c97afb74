"""What the evaluation of a task without a report of its own has besides: all that needs no knowledge of the task.

Deletion and insertion, layers drawn anew, and the return under attack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from carla_digr.config import Config
from carla_digr.evaluation import figures
from carla_digr.evaluation.causal import asked_of, draw_causal, measure_causal, report_causal
from carla_digr.evaluation.decision import (
    maps_of,
    measure_decision,
    measure_randomised,
    report_decision,
    report_randomised,
)
from carla_digr.evaluation.report import Evaluation, attack_table, fresh_states
from carla_digr.evaluation.robustness import independent_parts, measure_robustness

QUICK_STEPS = 100  # longest episode, where the task has such a setting


def quick(config: Config) -> Config:
    """Of few and short episodes, for nothing is known of how long they are."""
    evaluation = replace(config.evaluation, episodes=2, attack_episodes=1)
    environment = config.environment
    if hasattr(environment, "max_steps"):
        environment = replace(environment, max_steps=min(environment.max_steps or QUICK_STEPS, QUICK_STEPS))
    return replace(config, evaluation=evaluation, environment=environment)


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """Everything of this module.

    Returns:
        "causal": ``measure_causal``, if the task knows objects; "decision": ``measure_decision``; "randomised":
        ``measure_randomised``; "robustness": ``measure_robustness``.
    """
    settings = evaluation.config.evaluation
    states = functools.cache(lambda: fresh_states(evaluation, settings.saliency_states)[0])
    maps = functools.cache(lambda name: maps_of(name, evaluation.methods[name], states(), settings.slow_states))
    causal = {"causal": measure_causal(evaluation)} if asked_of(evaluation) else {}
    return {
        **causal,
        "decision": measure_decision(evaluation, states, maps),
        "randomised": measure_randomised(evaluation, states),
        "robustness": measure_robustness(evaluation, "return"),
    }


def independent(evaluation: Evaluation) -> dict[str, Callable[[], Any]]:
    """See ``report.TaskReport``."""
    return independent_parts(evaluation, "return")


def draw(evaluation: Evaluation, results: dict[str, Any]) -> dict[str, bytes]:
    """The figures of ``measure``'s results."""
    episodes = evaluation.config.evaluation.attack_episodes
    band = f"{episodes} episodes a point; band: one standard deviation over the episodes"
    drawn = {
        "figure_attacks.png": figures.success_against_epsilon(results["robustness"], band, "return", share=False),
        "figure_decision.png": figures.decision_curves(results["decision"]),
    }
    if "causal" in results:
        drawn |= draw_causal(evaluation)
    if results["randomised"]:
        drawn["figure_randomised.png"] = figures.randomised_curves(results["randomised"])
    return drawn


def report(evaluation: Evaluation, results: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    causal = report_causal(results["causal"]) if "causal" in results else []
    return [
        *causal,
        "## Do the maps tell the truth?",
        "",
        *report_decision(results["decision"]),
        *report_randomised(results["randomised"]),
        f"## Return under attack, {evaluation.config.evaluation.attack_episodes} episodes, "
        "mean ± one standard deviation over the episodes",
        "",
        *attack_table(results["robustness"]),
        "",
    ]
