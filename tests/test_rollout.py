"""The rollout against a scripted environment: when it asks, when it ends, what it records and what it refuses."""

import numpy as np
import pytest
from fake_libero import Scripted, chunk

from safe_pruner_jax.evaluation.rollout import rollout

pytestmark = pytest.mark.newest


def test_rollout_executes_the_head_of_each_chunk_until_success():
    env = Scripted(solved_after=12)
    episode = rollout(env, chunk, init_state=4)
    assert (episode.outcome, episode.steps, episode.init_state, episode.task) == ("success", 12, 4, 3)
    assert [call.step for call in episode.calls] == [0, 5, 10] and env.observed == 3
    np.testing.assert_array_equal([a[0] for a in env.actions], range(12))


@pytest.mark.parametrize("limit, replan, calls", [(None, 5, 5), (None, 10, 3), (7, 5, 2), (5, 5, 1)])
def test_rollout_fails_at_the_limit_and_never_steps_past_it(limit, replan, calls):
    env = Scripted()
    episode = rollout(env, chunk, init_state=0, replan=replan, max_steps=limit)
    assert episode.outcome == "failure" and episode.error is None
    assert episode.steps == len(env.actions) == (limit or env.max_steps)
    assert len(episode.calls) == calls


def test_rollout_records_pruning_and_timing():
    reply = {"pruning": {"kept": 64}, "server_timing": {"infer_ms": 3.0}}
    episode = rollout(Scripted(), lambda request: {**chunk(request), **reply}, init_state=0, max_steps=5)
    (call,) = episode.calls
    assert call.pruning == {"kept": 64} and call.timing == {"server_timing": {"infer_ms": 3.0}} and call.seconds >= 0


def test_rollout_counts_an_exception_as_the_outcome_error(caplog):
    def policy(request):
        if request["step"] >= 10:
            raise ConnectionError("the server is gone")
        return chunk(request)

    episode = rollout(Scripted(), policy, init_state=0)
    assert (episode.outcome, episode.error) == ("error", "ConnectionError: the server is gone")
    assert episode.steps == 10 and len(episode.calls) == 2
    assert "Traceback" in caplog.text and "libero_goal task 3" in caplog.text


@pytest.mark.parametrize("actions", [np.zeros((4, 7)), np.zeros((10, 32)), np.zeros(7)])
def test_rollout_refuses_a_chunk_that_does_not_fit(actions):
    episode = rollout(Scripted(), lambda request: {"actions": actions}, init_state=0)
    assert episode.outcome == "error" and "expected actions [≥ 5, 7]" in episode.error


def test_rollout_does_not_swallow_an_interruption():
    def policy(request):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout(Scripted(), policy, init_state=0)


@pytest.mark.parametrize("arguments", [{"replan": 0}, {"max_steps": 0}, {"max_steps": 24}])
def test_rollout_checks_its_arguments(arguments):
    with pytest.raises(ValueError, match="1 ≤ max_steps ≤ 23"):
        rollout(Scripted(), chunk, init_state=0, **arguments)


def test_on_step_sees_every_step():
    seen, env = [], Scripted(solved_after=7)
    rollout(env, chunk, init_state=0, on_step=lambda env: seen.append(len(env.actions)))
    assert seen == list(range(1, 8))
