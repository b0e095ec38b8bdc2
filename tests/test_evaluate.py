"""Many robots on one device, simulators that die, and runs that continue; without the simulator."""

import io
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import fake_libero
import numpy as np
import pytest
from fake_libero import LIMIT, SOLVED_AFTER
from fake_robots import SUITE, FakeRobots
from rich.console import Console
from tiny_policy import TOKENS
from toy_records import CONFIGURATION

from safe_pruner_jax.engine.flops import exact_flops, paper_flops, tokens_per_layer
from safe_pruner_jax.evaluation import crew, evaluate
from safe_pruner_jax.evaluation.batched import Robots
from safe_pruner_jax.evaluation.display import Display
from safe_pruner_jax.evaluation.evaluate import EvaluationError, episodes, play
from safe_pruner_jax.evaluation.records import RecordFile, RecordsError, episode_seed, read_records
from safe_pruner_jax.evaluation.sources import Cost, Source, local
from safe_pruner_jax.evaluation.workers import Job, PolicyFailed
from safe_pruner_jax.policy.embedded import EMBEDDED
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import safe
from safe_pruner_jax.robots.configs import CONFIGS
from safe_pruner_jax.tokens import PrefixLayout

pytestmark = pytest.mark.newest

# --------------------------------------------------------------------------------------------- robots on one device


@pytest.fixture(scope="module")
def tiny(two_step_policy):
    """The tiny policy; its first step is a keyframe and no other."""
    return Policy(two_step_policy.engine, two_step_policy.transform)


def asked(robot, step):
    env = fake_libero.FakeEnv(SUITE, robot)
    env.trial, env.steps = robot, step
    return env.observe()


SCHEDULE = ((0,), (1, 2, 0), (2, 0, 1), (0,))
"""Who asks together; in the second round two robots are at their keyframe and the third is not."""


@pytest.mark.parametrize("limit", [8, 1])
def test_a_robot_in_a_batch_equals_the_same_robot_alone(tiny, limit):
    robots, seeds = Robots(tiny, limit), {0: 11, 1: 12, 2: 13}
    alone = {r: Policy(tiny.engine, tiny.transform, seed=seed).session() for r, seed in seeds.items()}
    for robot, seed in seeds.items():
        robots.start(robot, seed)
    steps = dict.fromkeys(seeds, 0)
    for together in SCHEDULE:
        requests = {robot: asked(robot, steps[robot]) for robot in together}
        replies = robots.step(requests)
        assert set(replies) == set(together)
        for robot, reply in replies.items():
            expected, steps[robot] = alone[robot].infer(requests[robot]), steps[robot] + 1
            if limit == 1:
                np.testing.assert_array_equal(reply["actions"], expected["actions"])
            np.testing.assert_allclose(reply["actions"], expected["actions"], atol=1e-5)
            told = reply["pruning"]
            assert [told[k] for k in ("kept", "alive", "keyframe")] == [
                expected["pruning"][k] for k in ("kept", "alive", "keyframe")
            ]
            assert (told["kappa"] is None) == told["keyframe"]
            assert told["kappa"] == pytest.approx(expected["pruning"]["kappa"], abs=1e-4)
            assert told["keyframe"] == (steps[robot] == 1)
            assert told["text"] == 16 and reply["policy_timing"]["batch"] == min(limit, len(together))


def test_robots_of_one_layout_share_device_steps(tiny, monkeypatch):
    together = []
    note = lambda self, part: together.append((part[0][1].layout.text, part)) or {}
    monkeypatch.setattr(Robots, "_together", note)
    robots = Robots(tiny, limit=2)
    for name in range(5):
        robots.start(name, name)
    robots.step({name: asked(name, 0) | ({"prompt": "go " * 20} if name % 2 else {}) for name in range(5)})
    (a, first), (b, rest), (c, other) = [(text, [name for name, _ in part]) for text, part in together]
    assert a == b == 16 < c and (first, rest, other) == ([0, 2], [4], [1, 3])


def test_a_new_episode_starts_from_its_seed(tiny):
    robots = Robots(tiny, 1)
    first = []
    for seed in (1, 1, 2):
        robots.start("robot", seed)
        first.append(robots.step({"robot": asked(0, 0)})["robot"]["actions"])
        robots.step({"robot": asked(0, 1)})
    np.testing.assert_array_equal(first[0], first[1])
    assert not np.array_equal(first[0], first[2])


def test_a_robot_that_fails_does_not_fail_the_others(tiny):
    robots = Robots(tiny)
    for name in (0, 2):
        robots.start(name, name)
    replies = robots.step({0: asked(0, 0) | {"observation/state": np.zeros(3)}, 2: asked(2, 0)})
    assert isinstance(replies[0], PolicyFailed) and "observation/state" in str(replies[0])
    assert replies[2]["actions"].shape == (10, 7)
    with pytest.raises(ValueError, match="batch: expected at least 1"):
        Robots(tiny, 0)


def test_not_finite_actions_end_one_episode(tiny, monkeypatch):
    robots, step, calls = Robots(tiny, 1), tiny.engine.step, []

    def poisoned(*args, **options):
        actions, control, info = step(*args, **options)
        calls.append(1)
        return actions * (np.nan if len(calls) == 1 else 1), control, info

    monkeypatch.setattr(tiny.engine, "step", poisoned)
    for name in (0, 2):
        robots.start(name, name)
    replies = robots.step({0: asked(0, 0), 2: asked(2, 0)})
    assert "NonFinite" in str(replies[0]) and "actions" in replies[2]


def test_a_device_that_refuses_is_an_error_of_every_episode_in_the_step(tiny, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(tiny.engine, "step", refuse)
    robots = Robots(tiny)
    for name in (0, 2):
        robots.start(name, name)
    replies = robots.step({0: asked(0, 0), 2: asked(2, 0)})
    assert all("RESOURCE_EXHAUSTED" in str(reply) for reply in replies.values())


# ------------------------------------------------------------------------------------------------------- the loop


def run(path, jobs, make_env=fake_libero.FakeEnv, robots=None, **options):
    """Plays, and returns the records by (task, trial)."""
    source = Source(robots or FakeRobots(), device="cpu")
    with RecordFile(path, CONFIGURATION) as file:
        play(jobs, file, source, make_env=make_env, **options)
    return {(r.task, r.trial): r for r in read_records(path)}


def test_episodes_and_shards():
    jobs = episodes(SUITE, (3, 1, 3), 4)
    assert [(job.task, job.trial) for job in jobs] == [(t, k) for t in (3, 1) for k in range(4)]
    parts = [episodes(SUITE, (3, 1), 4, shard=(i, 3)) for i in (1, 2, 3)]
    assert [*parts[0], *parts[1], *parts[2]] == jobs and max(map(len, parts)) - min(map(len, parts)) <= 1
    for bad in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match="shard: expected i/n"):
            episodes(SUITE, (0,), 1, shard=bad)
    with pytest.raises(ValueError, match="trials: expected at least 1"):
        episodes(SUITE, (0,), 0)


def test_every_episode_is_played_once_and_recorded(path):
    robots, seen = FakeRobots(), []
    found = run(path, episodes(SUITE, (0, 1), 3), robots=robots, workers=2, on_record=seen.append)
    assert set(found) == {(t, k) for t in (0, 1) for k in range(3)} and len(seen) == 6
    for (task, trial), r in found.items():
        assert r.outcome == ("failure" if trial % 2 else "success")
        assert r.steps == (LIMIT if trial % 2 else SOLVED_AFTER) and r.calls == r.keyframes == -(-r.steps // 5)
        assert r.seed == episode_seed(SUITE, task, trial) and r.views == ["a", "b"] and r.prompt_slots == 16
    assert sorted(robots.started) == sorted(r.seed for r in found.values())
    assert found[0, 0].configuration == CONFIGURATION.as_json()


def test_a_run_continues_where_it_stopped(path):
    run(path, episodes(SUITE, (0,), 2), workers=1)
    robots = FakeRobots()
    before = path.read_bytes()
    found = run(path, episodes(SUITE, (0,), 3), robots=robots, workers=1)
    assert robots.started == [episode_seed(SUITE, 0, 2)] and set(found) == {(0, 0), (0, 1), (0, 2)}
    assert path.read_bytes().startswith(before)


def test_a_policy_that_raises_is_an_error_and_can_be_played_again(path):
    jobs = episodes(SUITE, (0,), 2)
    found = run(path, jobs, robots=FakeRobots(failing=(2,)), workers=1)
    assert (found[0, 0].outcome, found[0, 0].error) == ("error", "PolicyFailed: OSError: no")
    assert (found[0, 0].calls, found[0, 1].outcome) == (1, "failure")
    assert run(path, jobs, workers=1) == found
    assert run(path, jobs, workers=1, retry_errors=True)[0, 0].outcome == "success"
    assert len(read_records(path)) == 3


def test_a_killed_simulator_is_an_error_and_another_one_goes_on(path):
    found = run(path, episodes(SUITE, (0,), 4), fake_libero.Killed, workers=2)
    assert [found[0, k].outcome for k in range(4)] == ["success", "error", "success", "failure"]
    assert "signal SIGKILL" in found[0, 1].error


def test_a_simulator_that_hangs_is_killed(path, monkeypatch):
    """By a clock that jumps once the other episode has ended."""
    late = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 2 * crew.STALL_S * len(late))
    monkeypatch.setattr(crew, "time", clock)
    monkeypatch.setattr(crew, "PATIENCE_S", 0.2)
    found = run(path, episodes(SUITE, (0,), 2), fake_libero.Stuck, workers=2, on_record=late.append)
    assert found[0, 0].outcome == "success"
    assert found[0, 1].outcome == "error" and "after 600 s without a word" in found[0, 1].error


def test_simulators_that_always_die_stop_the_run(path, monkeypatch):
    monkeypatch.setattr(evaluate, "RESTARTS", 1)
    with pytest.raises(EvaluationError, match=r"2 simulator processes have died.*SIGKILL"):
        run(path, episodes(SUITE, (0,), 9), fake_libero.AlwaysKilled, workers=1)
    assert [r.outcome for r in read_records(path)] == ["error", "error"]


def test_errors_in_a_row_stop_the_run(path, monkeypatch):
    monkeypatch.setattr(evaluate, "ERRORS_IN_A_ROW", 3)
    with pytest.raises(EvaluationError, match=r"3 episodes in a row.*contact buffer full.*--retry-errors"):
        run(path, episodes(SUITE, (0,), 9), fake_libero.Broken, workers=1)
    assert len(read_records(path)) == 3


@pytest.mark.parametrize(
    ("make_env", "trials", "text"),
    [(fake_libero.missing, 1, "LIBERO is not installed: run this"), (fake_libero.FakeEnv, 21, "has 20 trials, got 21")],
)
def test_what_no_other_try_would_mend_stops_the_run(path, make_env, trials, text):
    with pytest.raises(EvaluationError, match=text):
        run(path, [Job(SUITE, 0, trials - 1)], make_env, workers=1)
    assert read_records(path) == []


def test_a_full_disk_stops_the_run_and_keeps_what_was_finished(path, monkeypatch):
    append, count = RecordFile.append, []

    def full_disk(self, record):
        count.append(1)
        if len(count) > 1:
            raise RecordsError("the disk is full")
        append(self, record)

    monkeypatch.setattr(RecordFile, "append", full_disk)
    with pytest.raises(RecordsError, match="full"):
        run(path, episodes(SUITE, (0,), 5), workers=1)
    assert len(read_records(path)) == 1


def test_an_interrupted_process_leaves_a_file_that_continues(path, tmp_path):
    """SIGINT to a process that plays, as Ctrl-C sends it to a whole group; its simulators end with it."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nimport fake_libero, test_evaluate as t\n"
        "t.run(Path(sys.argv[1]), t.episodes(t.SUITE, (0,), 40), fake_libero.Slow, workers=2,"
        " on_record=lambda r: print(r.trial, flush=True))\n"
    )
    child = subprocess.Popen(
        [sys.executable, str(program), str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell starts what runs in the background with SIGINT ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    child.stdout.readline()
    os.killpg(child.pid, signal.SIGINT)
    _, error = child.communicate(timeout=300)
    assert "KeyboardInterrupt" in error
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        for _ in range(600):
            os.killpg(child.pid, 0)
            time.sleep(0.1)
    done = len(read_records(path))
    assert 1 <= done < 40
    robots = FakeRobots()
    assert len(run(path, episodes(SUITE, (0,), 4), robots=robots, workers=1)) == max(done, 4)


def test_cost_is_the_mean_over_calls(path):
    model, plan = CONFIGS[EMBEDDED].model, safe(keep=0.2).plan
    cost = Cost(model, plan, 10)
    with RecordFile(path, CONFIGURATION) as file:
        play([Job(SUITE, 0, 0)], file, Source(FakeRobots(), cost=cost), make_env=fake_libero.FakeEnv, workers=1)
        (record,) = file.records.values()
    layout = PrefixLayout(("a", "b"), model.tokens_per_camera, 16)
    tokens = tokens_per_layer(plan, layout, model.depth, pruned=False)
    assert record.paper_flops == paper_flops(tokens, model.prefix.width, model.prefix.mlp_dim)
    assert record.exact_flops == exact_flops(model, plan, layout, pruned=False).total


def test_the_tiny_policy_plays(path, tiny):
    """The whole in-process path: model, control states, records."""
    source = local(tiny, CONFIGURATION, batch=1)
    with RecordFile(path, CONFIGURATION) as file:
        play(episodes(SUITE, (0, 1), 1), file, source, make_env=fake_libero.FakeEnv, workers=2)
        found = list(file.records.values())
    assert [r.outcome for r in found] == ["success"] * 2
    assert all(r.prompt_slots == 16 for r in found) and all(r.kept <= r.alive == 2 * TOKENS for r in found)
    assert all(r.paper_flops > 0 and r.exact_flops > 0 and r.batch >= 1 for r in found)


def test_a_terminal_shows_the_running_success(path):
    screen, jobs = io.StringIO(), episodes(SUITE, (0,), 3)
    run(path, jobs[:1], workers=1)
    with RecordFile(path, CONFIGURATION) as file:
        console = Console(file=screen, force_terminal=True, width=100)
        with Display(jobs, file, console) as display:
            robots = Source(FakeRobots(failing=(1,)))
            play(jobs, file, robots, make_env=fake_libero.FakeEnv, workers=1, on_record=display.update)
        assert display.summary() == "success 2/2 = 100.0%, 1 errors"
    assert "success 1/1 = 100.0%" in screen.getvalue() and "3/3" in screen.getvalue()
