"""Chunks that are executed while the next is computed; simulated delays, records and the report of them."""

import dataclasses
import json
import threading

import fake_libero
import numpy as np
import pytest
from fake_libero import Scripted, chunk
from fake_robots import FakeRobots
from toy_records import CONFIGURATION, FULL, group, record

from safe_pruner_jax.client.real_time import Asynchronous, jumps
from safe_pruner_jax.evaluation.evaluate import episodes, play
from safe_pruner_jax.evaluation.records import RecordFile, read_records
from safe_pruner_jax.evaluation.report import markdown, summarise
from safe_pruner_jax.evaluation.rollout import rollout
from safe_pruner_jax.evaluation.sources import Source

pytestmark = pytest.mark.newest

WAIT_S = 100.0


class Policy:
    """Chunks of 10 whose actions name the step they are meant for, and the observation they come from."""

    def __init__(self):
        self.asked, self.may_answer, self.answered = [], threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, request):
        self.asked.append(request)
        if len(self.asked) > 1:
            assert self.may_answer.acquire(timeout=WAIT_S)
        steps = request["step"] + np.arange(10.0)
        return {"actions": np.stack([steps, np.full(10, request["step"])], axis=1)}


class Robot:
    """A control loop of one thread."""

    def __init__(self, policy, **options):
        self.steps, self.actions, self.policy = 0, [], policy
        self.pipeline = Asynchronous(policy, **options)

    def run(self, steps):
        for _ in range(steps):
            self.actions.append(self.pipeline.act(lambda: {"step": self.steps}))
            self.steps += 1
        return [tuple(map(int, action)) for action in self.actions[-steps:]]

    def reply_arrives(self):
        """The reply that is due is there before the next step."""
        self.policy.may_answer.release()
        self.pipeline._pending.exception(WAIT_S)


@pytest.mark.parametrize("replan, delay", [(5, 0), (5, 1), (5, 4), (5, 5), (3, 5), (1, 3), (10, 0)])
def test_every_action_is_executed_at_the_step_it_is_meant_for(replan, delay):
    env = Scripted()
    episode = rollout(env, chunk, init_state=0, replan=replan, delay=delay)
    np.testing.assert_array_equal([a[0] for a in env.actions], range(env.max_steps))
    assert (episode.outcome, episode.error) == ("failure", None)
    every = range(replan, env.max_steps, max(replan, delay))  # nobody asks while a reply is due
    assert [call.step for call in episode.calls] == [0, *every]


def test_with_a_delay_the_old_chunk_is_executed_meanwhile():
    policy = Policy()
    robot = Robot(policy, execute=4, delay=3, rtc=True)
    assert robot.run(4) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    for _ in range(2):
        policy.may_answer.release()
    assert robot.run(8) == [(4, 0), (5, 0), (6, 0), (7, 4), (8, 4), (9, 4), (10, 4), (11, 8)]
    assert robot.pipeline.borders == [7, 11] and robot.pipeline.stalls == 0
    robot.pipeline.close()
    assert [asked["rtc"] for asked in policy.asked] == [{"executed": 4, "delay": 3}] * 3


def test_a_reply_is_used_as_soon_as_it_is_there_and_its_delay_is_expected_again():
    policy = Policy()
    robot = Robot(policy, execute=4, rtc=True, expected=2)
    robot.run(6)  # asked before the fifth step, and two steps executed since
    robot.reply_arrives()
    assert robot.run(2) == [(6, 4), (7, 4)] and robot.pipeline.borders == [6]
    robot.run(3)  # asked again at step 8, three steps executed since
    robot.reply_arrives()
    assert robot.run(1) == [(11, 8)]
    assert robot.run(1) == [(12, 8)]
    policy.may_answer.release()
    robot.pipeline.close()
    assert [asked["rtc"]["delay"] for asked in policy.asked] == [2, 2, 2, 3]
    assert [asked["rtc"]["executed"] for asked in policy.asked] == [4] * 4


def test_who_waits_longer_than_its_chunk_stalls_and_goes_on():
    policy = Policy()
    robot = Robot(policy, execute=4)
    assert robot.run(10)[-1] == (9, 0)
    threading.Timer(0.1, policy.may_answer.release).start()
    assert robot.run(1) == [(10, 4)]
    assert robot.pipeline.stalls == 1 and "rtc" not in policy.asked[0]
    policy.may_answer.release()
    robot.pipeline.close()


def test_what_the_policy_raises_is_raised_where_its_reply_is_needed():
    def policy(request):
        if request["step"]:
            raise ConnectionError("gone")
        return {"actions": np.zeros((10, 2))}

    robot = Robot(policy, execute=4, delay=2)
    robot.run(6)
    with pytest.raises(ConnectionError, match="gone"):
        robot.run(1)
    episode = rollout(Scripted(), lambda request: policy(request) | chunk(request), init_state=0, delay=2)
    assert (episode.outcome, episode.steps, episode.error) == ("error", 7, "ConnectionError: gone")


@pytest.mark.parametrize("bad", [{"execute": 0}, {"delay": -1}, {"expected": -1}])
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match="expected execute ≥ 1"):
        Asynchronous(chunk, **bad)


@pytest.mark.parametrize("replan, delay, least", [(5, 6, 12), (8, 3, 11), (11, 0, 11)])
def test_chunks_that_are_too_short(replan, delay, least):
    episode = rollout(Scripted(), chunk, init_state=0, replan=replan, delay=delay)
    assert f"expected actions [≥ {least}, 7], got [10, 7]" in episode.error
    with pytest.raises(ValueError, match=f"at least {least} steps"):
        Robot(Policy(), execute=replan, delay=delay).run(1)


def test_jumps_at_borders_and_inside():
    rng = np.random.default_rng(0)
    actions, borders = rng.normal(size=(12, 3)), [5, 10]
    got = jumps(list(actions), borders)
    distance = lambda step: np.sqrt(((actions[step] - actions[step - 1]) ** 2).sum())
    assert got["border"] == pytest.approx((distance(5) + distance(10)) / 2)
    assert got["inside"] == pytest.approx(np.median([distance(s) for s in range(1, 12) if s not in borders]))
    assert jumps(list(actions), []) is None and jumps([], []) is None


def test_a_rollout_measures_the_arms_jumps_and_not_the_grippers():
    def policy(request):
        actions = np.tile(np.arange(10.0)[:, None] * 0.1, (1, 7))
        actions[:, 6] = 100 * (request["step"] % 2)
        return {"actions": actions}

    jump = rollout(Scripted(), policy, init_state=0).jump
    assert jump["inside"] == pytest.approx(0.1 * 6**0.5) and jump["border"] == pytest.approx(0.4 * 6**0.5)


# --- an evaluation -----------------------------------------------------------------------------------------


class Listening(FakeRobots):
    def step(self, requests):
        self.asked = [*getattr(self, "asked", []), *(request.get("rtc") for request in requests.values())]
        return super().step(requests)


@pytest.mark.parametrize("rtc", [False, True])
def test_simulators_ask_with_their_delay(tmp_path, rtc):
    robots, path = Listening(), tmp_path / "records.jsonl"
    configuration = dataclasses.replace(CONFIGURATION, delay=3, rtc=rtc)
    jobs = episodes("libero_object", (0,), 2, delay=3, rtc=rtc)
    with RecordFile(path, configuration) as file:
        play(jobs, file, Source(robots, device="cpu"), make_env=fake_libero.FakeEnv, workers=1)
    solved, failed = read_records(path)
    assert (solved.outcome, solved.steps, solved.calls) == ("success", fake_libero.SOLVED_AFTER, 2)
    assert (failed.outcome, failed.steps, failed.calls) == ("failure", fake_libero.LIMIT, 3)
    assert solved.configuration["delay"] == 3 and solved.configuration["rtc"] is rtc
    assert failed.jump == {"border": 0.0, "inside": 0.0} and solved.jump is None  # solved before its second chunk
    assert robots.asked == [{"executed": 5, "delay": 3} if rtc else None] * 5


def test_records_from_before_there_were_delays_go_on(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordFile(path, CONFIGURATION) as file:
        file.append(record(0))
    line = json.loads(path.read_text())
    for name in ("delay", "rtc"):
        del line["configuration"][name]
    del line["jump"]
    path.write_text(json.dumps(line) + "\n")
    with RecordFile(path, CONFIGURATION) as file:
        file.append(record(1))
    first, second = read_records(path)
    assert first.configuration == second.configuration and first.jump is None
    assert len(summarise([first, second])) == 1


def test_the_report_tells_chunks_that_continue_from_chunks_that_do_not():
    jumps = lambda at: {"jump": {"border": at, "inside": 0.5}}
    delayed = dataclasses.replace(FULL, delay=4)
    rtc = dataclasses.replace(delayed, rtc=True)
    rows = summarise([*group(FULL, 8), *group(delayed, 4, **jumps(3.0)), *group(rtc, 7, **jumps(1.0))])
    assert [(row.method, row.jump, row.pairs) for row in rows] == [
        ("full", None, 0),
        ("full", 6.0, 0),
        ("full rtc", 2.0, 10),
    ]
    text = markdown(rows)
    assert text.count("| method |") == 2 and "5 actions per call, used 4 steps after their observation" in text
    assert "| 6.00 |" in text and "| 2.00 |" in text
