"""One episode of a user: read from what a server recorded, and what it bears, on numbers known in closed form."""

from types import SimpleNamespace

import numpy as np
import pytest

from safe_pruner_jax.analysis import bears
from safe_pruner_jax.analysis.episodes import episodes
from safe_pruner_jax.serving.episodes import EpisodeRecorder
from safe_pruner_jax.serving.recorder import Step

pytestmark = pytest.mark.newest


def test_analyses_read_what_a_server_recorded(tmp_path):
    record = EpisodeRecorder(tmp_path, {"config": "mini_libero"})
    for robot, prompt in (("left", "the milk"), ("right", "the butter")):
        for t in range(3):
            request = {"observation/state": np.full(8, t, np.float32), "prompt": prompt}
            reply = {"actions": np.full((10, 7), -1.0 if t < 2 else 1.0)}
            record(Step(robot, request, reply, fresh=t == 0, batch=1))
    whole = list(episodes(tmp_path))
    assert len(whole) == 2 and len({recording.name for recording in whole}) == 2
    calls = [list(recording.calls()) for recording in whole]
    assert [[call.request["observation/state"][0] for call in own] for own in calls] == [[0, 1, 2]] * 2
    assert [call.gripper for call in calls[0]] == [-1.0, -1.0, 1.0]
    assert [own[0].request["prompt"] for own in calls] == ["the milk", "the butter"]
    (one,) = episodes(sorted(tmp_path.glob("*.episode"))[1])
    assert next(one.calls()).request["prompt"] == "the butter"


def trace(saliency):
    """A trace of which only the late saliency [calls, L, n] is there."""
    return SimpleNamespace(late=lambda: np.asarray(saliency, np.float32))


def test_tokens_that_are_needed():
    even, narrow = np.full((3, 10), 0.1), np.eye(1, 10).repeat(3, axis=0)
    assert bears.needed(trace([even, narrow])).tolist() == [9, 1]
    assert bears.needed(trace([even]), share=0.5).tolist() == [5]
    assert bears.needed(trace([even]), share=1).tolist() == [10]
    with pytest.raises(ValueError, match="share"):
        bears.needed(trace([even]), share=0)


def row(keep, error, keyframes=(0,)):
    counts = {"calls": 3, "keyframes": list(keyframes), "kept": 128 * keep, "switched": 0, "steps": 15}
    return {"method": "safe", "keep": keep, "errors": [0.0, error, error]} | counts


def test_the_verdict_is_the_smallest_share_within_the_limit():
    rows = [row(0.5, 0.02), row(0.2, 0.08), row(0.1, 0.3)]
    assert bears.verdict(rows) == "This episode bears 20% kept: pruned calls move the actions by 0.080 σ."
    assert bears.verdict(rows[2:]).startswith("No share kept")
    assert bears.verdict([row(0.2, 0.0, keyframes=(0, 1, 2))]).startswith("No share kept")  # nothing was pruned
    assert "| 20% | 26 | 1 of 3 | 0.080 |" in bears.table(rows)
    figure = bears.figure(rows, np.array([9, 5, 5]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["50% kept", "20% kept", "10% kept"]
