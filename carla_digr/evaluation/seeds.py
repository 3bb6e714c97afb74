"""Evaluations of several seeds as one: the mean over the seeds and one standard deviation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from carla_digr.errors import UserError
from carla_digr.evaluation import figures
from carla_digr.evaluation.report import markdown_table, spread
from carla_digr.files import atomic_write, read_json

MEASURED = ("performance", "saliency", "table_1", "robustness")  # keys of results.json


def combine_seeds(directories: list[Path], out: Path) -> None:
    """Write ``results.json``, ``report.md`` and, where attacks were measured, ``figure_attacks.png`` to ``out``.

    Every number in them is that of all evaluations, as mean, standard deviation over the seeds (n - 1 in the
    denominator) and standard error.

    Args:
        directories: each with the ``results.json`` of one seed's evaluation of the same task.

    Raises:
        UserError: one is missing or damaged, of another task, or given twice.
    """
    seeds = [_read(directory) for directory in directories]
    for directory, results in zip(directories, seeds, strict=True):
        if results["task"] != seeds[0]["task"]:
            raise UserError(f"{directory} is of the task {results['task']}, {directories[0]} of {seeds[0]['task']}.")
    students = [results["student"]["weights_sha256"] for results in seeds]
    for first, second in zip(sorted(students), sorted(students)[1:], strict=False):
        if first == second:
            twice = [str(directories[i]) for i, student in enumerate(students) if student == first]
            raise UserError(f"{' and '.join(twice)} evaluate the same student; give each seed once.")
    combined = {
        "task": seeds[0]["task"],
        "seeds": [results["seed"] for results in seeds],
        "students": students,
        **{key: over_seeds([results[key] for results in seeds]) for key in MEASURED if all(key in r for r in seeds)},
    }
    report = _report(combined)
    if "robustness" in combined:
        episodes = seeds[0]["config"]["evaluation"]["attack_episodes"]
        band = f"{len(seeds)} seeds of {episodes} episodes a point; band: one standard deviation over the seeds"
        with atomic_write(out / "figure_attacks.png") as file:
            file.write(figures.success_against_epsilon(combined["robustness"], band))
        report += ["![figure attacks](figure_attacks.png)", ""]
    text = "\n".join(report)
    for name, content in (("results.json", json.dumps(combined, indent=1) + "\n"), ("report.md", text)):
        with atomic_write(out / name) as file:
            file.write(content.encode())
    print(text)


def over_seeds(values: list[Any]) -> Any:
    """``spread`` of numbers in the same place of each tree; a tree's own means count, its deviations do not.

    What only some of the trees have, or is None in one, is left out.
    """
    if all(isinstance(value, (int, float)) for value in values):
        return spread(values)
    if all("mean" in value for value in values):
        return spread([value["mean"] for value in values])
    common = [key for key in values[0] if all(value.get(key) is not None for value in values)]
    return {key: over_seeds([value[key] for value in values]) for key in common}


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "results.json"
    try:
        results = read_json(path)
        if {"task", "seed", "config", "student", "performance", "saliency"} <= results.keys():
            return results
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}; give directories that evaluate has written.") from error
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} is not the result of an evaluation; run evaluate again.")


def _report(combined: dict[str, Any]) -> list[str]:
    """Markdown with a table for each part."""
    lines = [
        f"# {combined['task']}: seeds {', '.join(map(str, combined['seeds']))}",
        "",
        "Mean ± one standard deviation over the seeds.",
        "",
    ]
    titles = {"performance": "Performance", "saliency": "Saliency", "table_1": "Table 1"}
    for key, title in titles.items():
        if key not in combined:
            continue
        rows = combined[key]
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        columns = [column for column in columns if column != "milliseconds_deviation"]
        lines += [f"## {title}", ""]
        lines += markdown_table(
            ["", *columns],
            [
                [name, *(_text(row[column]) if column in row else "-" for column in columns)]
                for name, row in rows.items()
            ],
        )
        lines.append("")
    if "robustness" in combined:
        curves = combined["robustness"]
        epsilons = list(next(iter(next(iter(curves.values())).values())))
        lines += ["## Success under attack", ""]
        lines += markdown_table(
            ["policy", "attack", *(f"ε {epsilon}" for epsilon in epsilons)],
            [
                [policy, attack, *(_text(point) for point in points.values())]
                for policy, by_attack in curves.items()
                for attack, points in by_attack.items()
            ],
        )
        lines.append("")
    return lines


def _text(point: dict[str, float]) -> str:
    return f"{point['mean']:.4g} ± {point['standard_deviation']:.2g}"
