"""Questions about a picture, answered by the process that a page asks."""

from __future__ import annotations

import math

import live_support
import numpy as np
import pytest

from carla_digr.errors import UserError
from carla_digr.explainer import Explainer
from carla_digr.live.composition import WEIGHTS
from carla_digr.live.questions import Question, Questions, shipped_policy
from carla_digr.objects import painted_over

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(live_support.make_weights(tmp_path_factory.mktemp("policy")))


@pytest.fixture(scope="module")
def ask(weights):
    questions = Questions()

    def ask(kind, what, weights=weights, progress=lambda share: None):
        return questions.ask(Question(weights, kind, what), PICTURE, progress)

    ask.questions = questions
    yield ask
    questions.close()


PICTURE = np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8)


def test_the_maps_are_those_of_the_explainer(ask, weights):
    for kind, what, method, target in (
        ("map", "digr", "digr", None),
        ("map", "linear", "linear", None),
        ("target", "right", "linear", "right"),
    ):
        explainer = Explainer.from_checkpoint(weights, None, method, target)
        decision = explainer.decide(PICTURE)
        answer = ask(kind, what)
        np.testing.assert_allclose(answer.map, explainer.explain(decision).map, atol=2e-3)
        assert answer.found["decision"]["action"] == decision.action
        np.testing.assert_allclose(answer.found["decision"]["probabilities"], decision.probabilities, atol=1e-5)
        np.testing.assert_array_equal(answer.picture, PICTURE)


def test_without_a_part_the_picture_is_painted_over_there_and_decided_on_anew(ask, weights):
    answer = ask("without", "40,50,60,70")
    mask = np.zeros((1, 128, 128), bool)
    mask[0, 50:71, 40:61] = True
    assert answer.map is None
    np.testing.assert_array_equal(answer.picture[~mask[0]], PICTURE[~mask[0]])
    painted = painted_over(PICTURE.transpose(2, 0, 1).astype(np.float32), mask)[0].transpose(1, 2, 0)
    assert abs(answer.picture - painted).max() <= 0.5
    explainer = Explainer.from_checkpoint(weights, None)
    for key, picture in (("decision", PICTURE), ("without", answer.picture)):
        np.testing.assert_allclose(
            answer.found[key]["probabilities"], explainer.decide(picture).probabilities, atol=1e-5
        )


def test_what_takes_long_tells_its_progress_and_the_teacher_is_asked_where_it_ships(ask):
    shares = []
    answer = ask("teacher", "gb", str(WEIGHTS), shares.append)
    assert len(shares) >= 5 and shares == sorted(shares) and shares[-1] == 1.0
    student, taught_by = Explainer.from_checkpoint(WEIGHTS), answer.found["decision"]["policy_hash"]
    assert student.card["teacher_sha256"].startswith(taught_by) and answer.map.max() == 1.0
    assert shipped_policy(taught_by).is_file() and shipped_policy("") is None and shipped_policy("0" * 12) is None


@pytest.mark.parametrize(
    ("kind", "what", "sentence"),
    [
        ("without", "1,2,3", "LEFT,TOP,RIGHT,BOTTOM"),
        ("target", "fly", "There is no action 'fly'"),
        ("map", "beauty", "beauty"),
    ],
)
def test_what_has_no_answer_is_one_sentence(ask, kind, what, sentence):
    with pytest.raises(UserError, match=sentence):
        ask(kind, what)
    assert math.isfinite(ask("without", "-5,0,500,500").found["without"]["probabilities"][0])  # and the next one has


def test_a_process_that_was_killed_is_told_and_started_anew(ask):
    ask.questions._process.kill()
    ask.questions._process.wait()
    assert ask("without", "0,0,9,9").found["decision"]
    ask.questions._process.stdin.close()  # breaks while it is asked
    with pytest.raises(UserError, match="ask again"):
        ask("without", "0,0,9,9")
    assert ask("without", "0,0,9,9").found["decision"]
