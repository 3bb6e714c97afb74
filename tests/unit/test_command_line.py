"""The options of `carla-digr`: one name for one thing in all jobs, and every name that there ever was."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import pytest

from carla_digr import checkpoint
from carla_digr.cli import main, parser
from carla_digr.live import composition
from carla_digr.networks import LayerNetwork
from carla_digr.policy import TorchPolicy

# what a job called an option before
OLD_NAMES = {
    "make-dataset driving": [("--teacher FILE", "--weights FILE")],
    "distill driving": [("--teacher FILE", "--weights FILE")],
    "live": [("--json FILE", "--out FILE")],
    "view BAG": [("--port 9000", "--viewer-port 9000"), ("--host 0.0.0.0", "--viewer-host 0.0.0.0")],
    "explain BAG --out BAG2": [("--wrong-size resize", "--resize")],
}
# option -> what it is in every job that has it
MEANINGS = {
    "--weights": ("policy", "teacher", "weights"),
    "--out": ("results", "where", "new", "the checkpoint"),
    "--port": ("simulator", "calls", "port"),
    "--viewer-port": ("port of the web page",),
}


def jobs() -> dict[str, argparse.ArgumentParser]:
    [action] = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return action.choices


@pytest.mark.parametrize(
    ("job", "old", "new"), [(job, old, new) for job, names in OLD_NAMES.items() for old, new in names]
)
def test_an_old_name_means_what_the_new_one_means(job, old, new):
    def parsed(option):
        return {k: v for k, v in vars(parser().parse_args([*job.split(), *option.split()])).items() if k != "run"}

    assert parsed(old) == parsed(new)
    assert parsed(new) != parsed("")


def test_an_option_stands_for_one_thing_in_all_jobs():
    """The first name that the help shows; older ones may clash, as view's --port with the simulator's."""
    targets, texts = defaultdict(set), defaultdict(set)
    for job in jobs().values():
        for action in job._actions:
            if action.option_strings:
                targets[action.option_strings[0]].add(action.dest)
                texts[action.option_strings[0]].add(action.help)
    assert not {option: found for option, found in targets.items() if len(found) > 1}
    for option, words in MEANINGS.items():
        for text in texts[option]:
            assert any(word in text for word in words), (option, text)


def test_every_policy_is_named_by_weights_and_every_result_by_out():
    for name, job in jobs().items():
        options = {action.option_strings[0]: action for action in job._actions if action.option_strings}
        paths = {option for option, action in options.items() if action.type is Path}
        others = {
            "evaluate": {"--teacher", "--student"},
            "import": {"--card", "--controls"},
        }  # two policies; what to know
        assert paths <= {"--weights", "--out", *others.get(name, set())}, name


def test_a_drive_and_a_replay_take_the_name_of_a_policy_that_ships(tmp_path):
    def weights(processes):
        return {p.name: p.parameters["weights"] for p in processes if "weights" in p.parameters}

    values = {argument.name: argument.default for argument in composition.ARGUMENTS}
    named = weights(composition.live({**values, "weights": "driving_teacher", "record": str(tmp_path)}))
    assert set(named) == {"recorder", "explainer"}
    assert set(named.values()) == {str(composition.WEIGHTS.with_name("driving_teacher.safetensors"))}
    values = {argument.name: argument.default for argument in composition.REPLAY_ARGUMENTS} | {
        "bag": "b",
        "method": "vg",
    }
    assert weights(composition.replay({**values, "weights": "mine.safetensors"})) == {"explainer": "mine.safetensors"}


def test_a_continuous_policy_is_refused_as_a_driver_though_its_card_has_controls(tmp_path, capsys):
    layers = [{"layer": "flatten"}, {"layer": "linear", "in_features": 3 * 16 * 16, "out_features": 2}]
    policy = TorchPolicy(LayerNetwork([], layers), (3, 16, 16), 2, "deterministic")
    card = {"role": "imported", "action_names": ["a", "b"], "controls": [{"steer": 0.1}, {"brake": 1.0}]}
    network = {"kind": "layers", "shared": [], "outputs": layers}
    checkpoint.save(tmp_path / "policy.safetensors", policy, {**card, "network": network})
    (tmp_path / "rollout.yaml").write_text("simulators: ['127.0.0.1:1']\n")
    arguments = ["rollout", str(tmp_path / "rollout.yaml"), "--weights", str(tmp_path / "policy.safetensors")]
    assert main(arguments) == 2
    assert "is continuous, which can be explained but does not drive" in capsys.readouterr().err
