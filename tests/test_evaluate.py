"""Many robots on one device, simulators that die, and the command line; all but one test without the simulator."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
import time

import fake_libero
import numpy as np
import pytest
from fake_libero import LIMIT, SOLVED_AFTER
from rich.console import Console
from test_loading import DATA, tiny_config
from test_records import CONFIGURATION

from safe_pruner_jax import cli
from safe_pruner_jax.configs import CONFIGS
from safe_pruner_jax.evaluation import evaluate, sources
from safe_pruner_jax.evaluation.batched import Robots
from safe_pruner_jax.evaluation.display import Display
from safe_pruner_jax.evaluation.evaluate import EvaluationError, episodes, play
from safe_pruner_jax.evaluation.records import RecordFile, RecordsError, episode_seed, read_records
from safe_pruner_jax.evaluation.simulator import LiberoUnavailable
from safe_pruner_jax.evaluation.sources import SERVED, Cost, Source, describe, local, remote
from safe_pruner_jax.evaluation.workers import Job, PolicyFailed
from safe_pruner_jax.flops import exact_flops, paper_flops, tokens_per_layer
from safe_pruner_jax.loading import EMBEDDED, embedded_folder, load_policy
from safe_pruner_jax.policy import Policy
from safe_pruner_jax.pruners import full, safe
from safe_pruner_jax.serving.server import running
from safe_pruner_jax.tokens import PrefixLayout

SUITE = "libero_object"


# --------------------------------------------------------------------------------------------- robots on one device


@pytest.fixture(scope="module")
def tiny():
    """The tiny policy; its first step is a keyframe and no other."""
    files = {"checkpoint": DATA / "ckpt_tiny_pi05", "tokenizer": DATA / "toy_sentencepiece.model"}
    return load_policy(tiny_config(False), **files, pruner=safe(keep=0.2, threshold=-1.0), num_steps=2)


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


class FakeRobots:
    """Actions without a model; `failing` are the calls that raise instead."""

    def __init__(self, failing=()):
        self.started, self.calls, self.failing, self.together = [], 0, failing, []

    def start(self, name, seed):
        self.started.append(seed)

    def step(self, requests):
        self.together.append(len(requests))
        replies = {}
        for name in requests:
            self.calls += 1
            pruning = {"keyframe": True, "kept": 512, "alive": 512, "views": ["a", "b"], "text": 16}
            timing = {"infer_ms": 1.0, "batch": len(requests)}
            reply = {"actions": np.zeros((10, 7)), "pruning": pruning, "policy_timing": timing}
            replies[name] = PolicyFailed("OSError: no") if self.calls in self.failing else reply
        return replies


def run(path, jobs, make_env=fake_libero.FakeEnv, robots=None, **options):
    """Plays, and returns the records by (task, trial)."""
    source = Source(robots or FakeRobots(), device="cpu")
    with RecordFile(path, CONFIGURATION) as file:
        play(jobs, file, source, make_env=make_env, **options)
    return {(r.task, r.trial): r for r in read_records(path)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


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
    monkeypatch.setattr(evaluate, "STALL_S", 4)
    monkeypatch.setattr(evaluate, "PATIENCE_S", 0.2)
    found = run(path, episodes(SUITE, (0,), 2), fake_libero.Stuck, workers=2)
    assert found[0, 0].outcome == "success"
    assert found[0, 1].outcome == "error" and "after 4 s without a word" in found[0, 1].error


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
    _, error = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in error
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        for _ in range(50):
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
    assert all(r.prompt_slots == 16 for r in found) and all(r.kept <= r.alive == 512 for r in found)
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


# ------------------------------------------------------------------------------------------------------ a server


class Session:
    def __init__(self, requests):
        self._requests = requests

    def infer(self, request):
        self._requests.append(request["seed"] if request.get("reset") else False)
        pruning = {"keyframe": False, "kept": 102, "alive": 512, "kappa": None}
        return {"actions": np.zeros((10, 7)), "pruning": pruning, "policy_timing": {"infer_ms": 2.0}}


class Backend:
    def __init__(self, told=True):
        pruner = safe(keep=0.2)
        config = describe(EMBEDDED, embedded_folder(), pruner, {"keep": 0.2})
        self.metadata = {SERVED: {"configuration": config.as_json(), "device": "gpu"}} if told else {}
        self.requests = []

    def warmup(self):
        pass

    def session(self):
        return Session(self.requests)


def test_episodes_against_a_server(path):
    backend = Backend()
    with running(backend) as server:
        address = f"ws://127.0.0.1:{server.port}"
        config, source = remote(address, ("safe", {"keep": 0.2}))
        assert (config.pruner, config.policy, source.device) == ("safe", EMBEDDED, "gpu")
        assert remote(address, ("safe", {}))[0] == config  # nothing written out: whatever it has
        with pytest.raises(ValueError, match=r"runs safe \{'keep': 0.2\}, leave --pruner"):
            remote(address, ("safe", {"keep": 0.1}))
        with RecordFile(path, config) as file:
            play(episodes(SUITE, (0,), 2), file, source, make_env=fake_libero.FakeEnv, workers=1)
            first, second = file.records.values()
    seeds = [episode_seed(SUITE, 0, trial) for trial in range(2)]
    assert (first.outcome, first.seed, first.kept, first.keyframes) == ("success", seeds[0], 102, 0)
    assert first.exact_flops is None and second.outcome == "failure"
    # every episode starts afresh, from the seed that it has in this process
    assert backend.requests == [seeds[0], False, seeds[1], False, False] and config.noise == "per episode, seed 0"


def test_a_server_that_says_nothing_is_a_method_of_its_own():
    with running(Backend(told=False)) as server:
        address = f"ws://127.0.0.1:{server.port}"
        config, source = remote(address)
        assert (config.pruner, config.checkpoint, source.cost) == ("server", "unknown", None)
        with pytest.raises(ValueError, match="an unknown pruner"):
            remote(address, ("full", {}))


def test_a_server_that_leaves_stops_the_run(path):
    backend, stopped = Backend(), threading.Event()
    with running(backend) as server:
        config, source = remote(f"ws://127.0.0.1:{server.port}")

        def leave(record):
            server.stop()
            stopped.set()

        with RecordFile(path, config) as file, pytest.raises(EvaluationError, match="no policy server at ws://127"):
            play(episodes(SUITE, (0,), 9), file, source, make_env=fake_libero.Slow, workers=1, on_record=leave)
    assert stopped.is_set() and len(read_records(path)) < 4


def test_a_server_of_another_version_is_one_line():
    backend = Backend()
    del backend.metadata[SERVED]["configuration"]["replan"]
    with running(backend) as server, pytest.raises(ValueError, match="another version"):
        remote(f"ws://127.0.0.1:{server.port}")


def test_no_server_is_one_line():
    with pytest.raises(ConnectionError, match=r"no policy server at ws://127.0.0.1:1 .*start one with openpi serve"):
        remote("ws://127.0.0.1:1")


# ----------------------------------------------------------------------------------------------- the configuration


def test_what_is_described():
    config = describe(EMBEDDED, embedded_folder(), safe(keep=0.1), {"keep": 0.1}, dtype="bfloat16")
    assert (config.pruner, config.precision, config.plan["cut"]["keep"]) == ("safe", "bfloat16", 0.1)
    assert config.plan["late_layers"] == (0, 6, 7)
    with pytest.raises(ValueError, match=r"pi05_droid drives DROID.*choose pi0_libero, pi05_libero"):
        describe("pi05_droid", embedded_folder(), full(), {})
    with pytest.raises(ValueError, match="did you mean pi05_libero"):
        describe("pi05_libro", embedded_folder(), full(), {})


# ----------------------------------------------------------------------------------------------- the command line


@pytest.fixture(autouse=True)
def root_logger():
    import logging

    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level


@pytest.fixture
def no_simulator(monkeypatch):
    """The command line with fake simulators and no model."""
    monkeypatch.setattr(cli, "num_tasks", lambda suite: 2)
    monkeypatch.setattr(cli, "load_task", lambda suite, task: None)
    monkeypatch.setattr(cli.Model, "load", lambda self, environment, pruner: None)
    monkeypatch.setattr(sources, "local", lambda *args, **options: Source(FakeRobots(), device="cpu"))
    play = evaluate.play
    fake = lambda *args, **options: play(*args, **options, make_env=fake_libero.FakeEnv)
    monkeypatch.setattr(evaluate, "play", fake)


def test_evaluate_then_report(tmp_path, no_simulator, capsys):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("full", "safe")}
    common = ["evaluate", "--suite", SUITE, "--trials", "2", "policy:embedded"]
    assert cli.main([*common, "--out", str(files["full"])]) == 0
    assert cli.main([*common, "--out", str(files["safe"]), "--pruner=safe", "--pruner.keep", "0.1"]) == 0
    assert len(read_records(files["full"])) == 4
    assert "4/4 episodes: success 2/4 = 50.0%" in capsys.readouterr().err
    out = tmp_path / "report"
    assert cli.main(["report", *map(str, files.values()), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text == (out / "report.md").read_text() and "| safe | 10 % | libero_object | 4 | 0 | 50.0 [15.0" in text
    assert {p.name for p in out.iterdir()} == {
        *("report.md", "report.csv", "success_by_keep.png"),
    }
    assert cli.main(["report", str(files["safe"]), "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("checkpoint,")


def test_evaluate_shards_and_continues(tmp_path, no_simulator, monkeypatch):
    out = str(tmp_path / "records.jsonl")
    common = ["evaluate", "--suite", SUITE, "--trials", "3", "--tasks", "1", "0", "--out", out, "policy:embedded"]
    for i, done in ((1, 3), (2, 6)):
        assert cli.main([*common, "--shard", f"{i}/2"]) == 0
        assert len(read_records(out)) == done
    monkeypatch.setattr(cli.Model, "load", lambda *args: pytest.fail("nothing is left to be played"))
    assert cli.main(common) == 0 and len(read_records(out)) == 6


def test_evaluate_interrupted(tmp_path, no_simulator, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "play", interrupted)
    argv = ["evaluate", "--suite", SUITE, "--trials", "1", "--out", str(tmp_path / "r.jsonl"), "policy:embedded"]
    assert cli.main(argv) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--shard", "3/2"], "shard: expected i/n"),
        (["--shard", "half"], "shard: expected i/n"),
        (["--trials", "0"], "trials: expected"),
        (["--workers", "0"], "workers: expected"),
        (["--pruner=sfe"], "did you mean 'safe'"),
        (["--server", "ws://127.0.0.1:1"], "no policy server at"),
        (["policy:checkpoint", "--policy.config=pi05_droid", "--policy.dir=."], "drives DROID"),
        (["policy:checkpoint", "--policy.config=pi05_libero", "--policy.dir=/no/such"], "/no/such"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_exit_code_2(argv, text, tmp_path, no_simulator, capsys):
    policy = [] if "policy:checkpoint" in argv else ["policy:embedded"]
    assert cli.main(["evaluate", "--suite", SUITE, "--out", str(tmp_path / "r.jsonl"), *policy, *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("openpi evaluate: ") and text in error


def test_an_unknown_suite_is_one_line(capsys):
    assert cli.main(["evaluate", "--suite", "libero_kitchen", "policy:embedded"]) == 2
    assert "unknown suite 'libero_kitchen'; there are libero_spatial" in capsys.readouterr().err


def test_a_missing_simulator_is_one_line(capsys, monkeypatch):
    def missing(suite):
        raise LiberoUnavailable("LIBERO is not installed: run scripts/setup_libero.sh")

    monkeypatch.setattr(cli, "num_tasks", missing)
    assert cli.main(["evaluate", "--suite", SUITE, "policy:embedded"]) == 2
    assert capsys.readouterr().err.strip().endswith("LIBERO is not installed: run scripts/setup_libero.sh")


def test_records_of_another_method_are_refused(tmp_path, no_simulator, capsys):
    argv = ["evaluate", "--suite", SUITE, "--trials", "1", "--out", str(tmp_path / "r.jsonl"), "policy:embedded"]
    assert cli.main(argv) == 0
    assert cli.main([*argv, "--pruner=fastv"]) == 2
    assert "another configuration (pruner: full → fastv" in capsys.readouterr().err


def test_report_says_what_is_wrong(tmp_path, capsys):
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.touch()
    broken.write_text("{}\n")
    for argv, text in (
        ([str(tmp_path / "none.jsonl")], "none.jsonl"),
        ([str(empty)], "no records"),
        ([str(broken)], "line 1: not a record"),
        ([], "no records"),
    ):
        assert cli.main(["report", *argv]) == 2
        assert text in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- with the simulator


@pytest.mark.libero
def test_the_embedded_policy_in_libero_then_resumed(tmp_path):
    out = tmp_path / "records.jsonl"
    argv = ["evaluate", "--suite", "libero_spatial", "--tasks", "0", "--trials", "1", "--max-steps", "10"]
    argv += ["--num-steps", "2", "--workers", "1", "--pruner=safe", "--pruner.threshold=-1"]
    argv += ["--out", str(out), "policy:embedded"]
    assert cli.main(argv) == 0
    (record,) = read_records(out)
    assert (record.outcome, record.error, record.steps, record.calls) == ("failure", None, 10, 2)
    assert record.alive == 2 * CONFIGS["mini_libero"].model.tokens_per_camera > record.kept
    assert record.exact_flops > 0
    assert record.configuration["simulator"]["mujoco"] != "not installed"
    before = out.read_bytes()
    assert cli.main(argv) == 0
    assert out.read_bytes() == before and dataclasses.asdict(record)["device"]
