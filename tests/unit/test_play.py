"""`carla-digr play`: a task on the page, with its controls."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from carla_digr.errors import UserError
from carla_digr.explainer import Explainer
from carla_digr.live.play import Play, Settings
from carla_digr.live.viewer.server import ViewerServer
from carla_digr.tasks import load_config, make_task

pytestmark = pytest.mark.slow


class Shown(ViewerServer):
    """A page's server that keeps what it is given."""

    def __init__(self, **more):
        self.frames, self.state = [], {}
        super().__init__(port=0, **more)

    def publish(self, stamp, frame, rgb, saliency, decision, state=None):
        self.frames.append((rgb.copy(), saliency, dict(decision), state.copy()))
        super().publish(stamp, frame, rgb, saliency, decision, state)

    def tell(self, state):
        self.state = {**self.state, **state}
        super().tell(state)


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def start(config="red_fetch_green", weights="red_fetch_green_student", **settings):
    return Play(make_task(load_config(config)), weights, 3, settings=Settings(rate=60.0, **settings))


@pytest.fixture
def playing():
    play = start()
    with Shown(controls=play) as page:
        thread = threading.Thread(target=play.run, args=(page,))
        thread.start()
        until(lambda: len(page.frames) > 3)
        yield play, page
        play.end()
        thread.join(20)
        assert not thread.is_alive()


def test_a_play_is_held_stepped_and_begun_anew_by_a_seed(playing):
    play, page = playing
    with pytest.raises(UserError, match="Hold the play first"):
        play.do(["step"])
    assert play.do(["pause"]) == "paused" and page.state["paused"]
    count = len(page.frames)
    until(lambda: play._changed._waiters)  # it stands; one frame was on its way
    held = len(page.frames)
    assert held <= count + 1
    for number in range(1, 4):
        play.do(["step"])
        until(lambda number=number: len(page.frames) == held + number)
    firsts = []
    for _ in range(2):  # the same seed, the same play
        before = len(page.frames)
        assert play.do(["reset", "77"]) == "Seed 77 comes next."
        until(lambda before=before: len(page.frames) > before)
        for number in range(5):
            play.do(["step"])
            until(lambda number=number, before=before: len(page.frames) > before + 1 + number)
        firsts.append(np.stack([frame[0] for frame in page.frames[before : before + 6]]))
    np.testing.assert_array_equal(*firsts)
    assert page.state["seed"] == "77"
    with pytest.raises(UserError, match="A seed is a whole number"):
        play.do(["reset", "-1"])
    play.do(["resume"])
    until(lambda: len(page.frames) > before + 20)


def test_what_is_shown_is_the_policys_decision_map_and_objects_and_settings_change_them(playing):
    play, page = playing
    explainer = Explainer.from_checkpoint("red_fetch_green_student", None)
    rgb, saliency, told, state = page.frames[2]
    decision = explainer.decide(state)
    np.testing.assert_allclose(told["probabilities"], decision.probabilities, atol=1e-6)
    np.testing.assert_allclose(saliency, explainer.explain(decision).map, atol=1e-5)
    np.testing.assert_array_equal(rgb, state)
    assert told["objects"] and all(0.0 <= thing["share"] <= 1.0 for thing in told["objects"])
    effects = [thing["effect"] for thing in told["objects"]]
    assert effects == sorted(effects, reverse=True)

    def after(name, text, holds):
        assert play.do(["set", name, text]) == f"{name}: {text}"
        before = len(page.frames)
        until(lambda: any(holds(frame) for frame in page.frames[before:]))

    after("target", decision_name := explainer.action_names[0], lambda frame: decision_name in frame[2]["map"])
    after("target", "", lambda frame: decision_name not in frame[2]["map"])
    after("method", "digr", lambda frame: frame[2]["map"] == "DIGR")
    after("explanation", "false", lambda frame: frame[1] is None)
    after("attack", "fgsm", lambda frame: "under attack: fgsm" in frame[2].get("status", ""))
    assert page.state["settings"]["attack"]["value"] == "fgsm"
    assert "plays" in play.do(["policy", "red_fetch_green_teacher"])
    until(lambda: page.frames[-1][2]["policy_hash"] != told["policy_hash"])
    for words, said in (
        (["set", "rate", "0"], "rate must be a number from 1 to 60"),
        (["set", "rate", "nan"], "rate must be"),
        (["set", "target", "fly"], "There is no action 'fly'"),
        (["set", "method", "beauty"], "beauty"),
        (["set", "explanation", "perhaps"], "choose true or false"),
        (["policy", "driving_student"], "another policy that ships"),
        (["drive", "0", "0", "0"], "held, stepped"),
    ):
        with pytest.raises(UserError, match=said):
            play.do(words)
    before = len(page.frames)
    until(lambda: len(page.frames) > before + 3)


def test_a_policy_of_another_task_is_refused():
    with pytest.raises(UserError, match="breakout"):
        start(weights="breakout_student")
