"""Episodes and traces: what is asked about when, and that a replay decides what a session decides."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from demonstrations import demo
from fake_libero import LIMIT, SOLVED_AFTER, FakeEnv
from tiers import at_night
from tiny_policy import moving_scene

from safe_pruner_jax.analysis.episodes import EXAMPLE, episodes, play, stride
from safe_pruner_jax.analysis.trace import Watch, replay
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.libero.demonstrations import subtasks, write_demos
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import PRUNERS, Capture

pytestmark = pytest.mark.newest

SAFE = {"cut": 2, "keep": 0.2, "queries": "text"}


@pytest.fixture(scope="module")
def policy(plain_policy):
    """With a temperature of its own, so that a trace which draws other noise than a session shows."""
    loaded = plain_policy
    engine = Engine(loaded.engine.weights, loaded.engine.config.replace(temperature=0.5), loaded.engine.pruner)
    return Policy(engine, loaded.transform, seed=loaded.seed)


@pytest.fixture(scope="module")
def watched(policy):
    return Watch(policy)(moving_scene())


# ------------------------------------------------------------------------------------------------------------ episodes


def test_a_subtask_ends_where_the_gripper_command_changes():
    rng = np.random.default_rng(0)
    commands = rng.normal(size=30)
    slow, number = [0], 0
    for before, now in pairwise(commands):
        number += (before > 0) != (now > 0)
        slow.append(number)
    assert subtasks(commands).tolist() == slow
    assert subtasks([0.0, -1.0, 0.2]).tolist() == [0, 0, 1]
    assert subtasks([]).tolist() == []


@pytest.mark.parametrize("every", [1, 3, 9])
def test_demonstrations_are_asked_about_every_replan_steps(every, tmp_path):
    recorded = demo(steps=23, side=16, every=every)
    write_demos(tmp_path / "butter_demo.hdf5", [recorded])
    (recording,) = episodes(tmp_path / "butter_demo.hdf5", replan=6)
    calls = list(recording.calls())
    frames = range(0, len(recorded.images["observation/image"]), stride(every, 6))
    assert len(calls) == len(frames)
    for call, frame in zip(calls, frames, strict=True):
        np.testing.assert_array_equal(call.request["observation/image"], recorded.images["observation/image"][frame])
        np.testing.assert_array_equal(call.request["observation/state"], recorded.state[frame * every])
        assert call.gripper == pytest.approx(recorded.actions[frame * every, 6])
        assert call.request["prompt"] == recorded.prompt
    with pytest.raises(ValueError, match="replan: expected"):
        next(episodes(EXAMPLE, replan=0))


def test_the_packaged_episode_grasps_and_releases():
    (recording,) = episodes(EXAMPLE)
    calls = list(recording.calls())
    assert calls[0].request["observation/wrist_image"].shape == (224, 224, 3)
    assert subtasks(call.gripper for call in calls).tolist() == sorted(subtasks(call.gripper for call in calls))
    assert set(subtasks(call.gripper for call in calls)) == {0, 1, 2}


@pytest.mark.parametrize(("trial", "steps"), [(0, SOLVED_AFTER), (1, LIMIT)])
def test_a_live_episode_is_observed_once_per_chunk_until_it_ends(trial, steps):
    env, asked = FakeEnv("libero_object", 0), []

    def chunk(request):
        asked.append(request)
        return [np.full(7, len(asked) / 10)] * 5

    calls = list(play(env, env.reset(trial), chunk))
    assert env.steps == steps and len(calls) == len(asked) == -(-steps // 5)
    assert [call.gripper for call in calls] == pytest.approx([0.1 * (i + 1) for i in range(len(calls))])
    assert all(call.request is request for call, request in zip(calls, asked, strict=True))


@pytest.mark.parametrize("source", ["libero:libero_object", "libero:libero_object/0", "libero:a/b/c"])
def test_a_live_source_is_suite_task_trial(source):
    with pytest.raises(ValueError, match="expected libero:SUITE/TASK/TRIAL"):
        next(episodes(source))


# ------------------------------------------------------------------------------------------------ traces and replays


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("safe", SAFE),
        *at_night(("safe", {"cut": 3, "queries": "action", "every": 3})),
        ("safe", {"cut": 2, "queries": "all", "late": "prefix", "over": "all", "features": "hidden", "every": 3}),
        ("safe", {"cut": 0, "features": "hidden", "pool": 1.5, "soft": 0.1, "every": 3}),
        *at_night(("fastv", {"cut": 1})),
        ("divprune", {}),
    ],
)
def test_a_replay_decides_what_a_session_decides(policy, watched, name, choices):
    if choices is SAFE:  # γ between the steps within a scene and the cut
        free = [s.kappa for s in replay(PRUNERS[name](**choices, threshold=-1.0), watched)]
        choices = {**SAFE, "threshold": float(np.nanmin(free) + np.nanmax(free)) / 2}
    pruner = PRUNERS[name](**choices)
    engine = Engine(policy.engine.weights, policy.engine.config, pruner)
    session = Policy(engine, policy.transform, seed=policy.seed).session()
    selections = replay(pruner, watched)
    kinds = set()
    for t, (call, selection) in enumerate(zip(moving_scene(), selections, strict=True)):
        reply = session.infer(call.request)
        told = reply["pruning"]
        kinds.add(told["keyframe"])
        assert told["keyframe"] == bool(selection.keyframe)
        if told["kappa"] is not None:
            assert told["kappa"] == pytest.approx(float(selection.kappa), abs=1e-5)
        if told["keyframe"]:
            _, context = policy.transform.prepare(call.request)
            actions = policy.transform.finish(watched.actions[t], context)["actions"]
            np.testing.assert_allclose(reply["actions"], actions, atol=1e-4)
        else:
            assert told["index"].tolist() == selection.index.tolist()
    assert kinds == ({True, False} if name == "safe" else {False})


def test_saliencies_are_distributions_over_alive_tokens(watched):
    for s in (watched.expert, watched.text, watched.last):
        np.testing.assert_allclose(s.sum(-1), 1, atol=1e-4)
    np.testing.assert_allclose(watched.late("last"), watched.expert[:, -1])
    np.testing.assert_allclose(
        watched.late("half"), np.mean([watched.expert[:, s] for s in range(5, 10)], 0), rtol=1e-5
    )
    np.testing.assert_allclose(watched.everyone.sum(-1), 1, atol=1e-4)
    for rows in ("action", "text", "last", "all"):  # the prompt, and the actions themselves, take the rest
        own, visual = (watched.captured(Capture(1, rows, over)) for over in ("all", "visual"))
        assert (own.sum(-1) < 0.999).all() and (own <= visual + 1e-6).all()
    assert watched.late(over="all").sum() < watched.late().sum()


def test_there_is_no_attention_before_the_first_layer(watched):
    with pytest.raises(ValueError, match=r"expected a layer index from 0 to .* got -1; before a cut at layer 0"):
        watched.captured(Capture(-1, "all"))


def test_a_method_that_needs_more_than_a_trace_is_refused(watched):
    for other in (PRUNERS["specprune"](), dataclasses.replace(PRUNERS["random"](), name="other")):
        with pytest.raises(ValueError, match="which needs more evidence"):
            replay(other, watched)
    selections = replay(PRUNERS["full"](), watched)
    assert all(s.keyframe for s in selections) and len(selections) == len(watched)
