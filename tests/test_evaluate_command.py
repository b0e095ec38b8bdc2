"""Episodes against a server, and the command line; all but one test without the simulator."""

import dataclasses
import threading

import fake_libero
import numpy as np
import pytest
from fake_robots import SUITE, FakeRobots

from safe_pruner_jax.cli import evaluate as command
from safe_pruner_jax.cli import main as cli
from safe_pruner_jax.evaluation import evaluate, sources
from safe_pruner_jax.evaluation.evaluate import EvaluationError, episodes, play
from safe_pruner_jax.evaluation.records import RecordFile, episode_seed, read_records
from safe_pruner_jax.evaluation.sources import Source, remote
from safe_pruner_jax.libero.simulator import LiberoUnavailable
from safe_pruner_jax.policy.embedded import EMBEDDED, embedded_folder
from safe_pruner_jax.policy.identity import SERVED, describe
from safe_pruner_jax.policy.spec import Model
from safe_pruner_jax.pruners import full, make, safe
from safe_pruner_jax.robots.configs import CONFIGS
from safe_pruner_jax.serving.server import running

pytestmark = pytest.mark.newest

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
    assert config.plan["late_layers"] == (0, 16, 17)
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
    monkeypatch.setattr(command, "num_tasks", lambda suite: 2)
    monkeypatch.setattr(command, "load_task", lambda suite, task: None)
    monkeypatch.setattr(Model, "load", lambda self, environment, pruner: None)
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
    assert text == (out / "report.md").read_text() and " | 10 % | libero_object | 4 | 0 | 50.0 [15.0" in text
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
    monkeypatch.setattr(Model, "load", lambda *args: pytest.fail("nothing is left to be played"))
    assert cli.main(common) == 0 and len(read_records(out)) == 6


def test_what_the_robot_executes_reaches_the_method(tmp_path, no_simulator, capsys):
    out = tmp_path / "records.jsonl"
    common = ["evaluate", "--suite", SUITE, "--trials", "1", "--tasks", "0", "--replan", "10", "policy:embedded"]
    argv = [*common, "--out", str(out), "--pruner=specprune"]
    assert cli.main(argv) == 0
    assert read_records(out)[0].configuration["choices"]["executed"] == 10
    written = [*common, "--out", str(tmp_path / "own.jsonl"), "--pruner=specprune", "--pruner.executed", "4"]
    assert cli.main(written) == 0
    assert read_records(tmp_path / "own.jsonl")[0].configuration["choices"]["executed"] == 4
    backend = Backend()
    about = describe(EMBEDDED, embedded_folder(), make("specprune"), {"executed": 5})
    backend.metadata[SERVED]["configuration"] = about.as_json()
    with running(backend) as server:
        asked = [*common[:-1], "--out", str(tmp_path / "served.jsonl"), "--server", f"ws://127.0.0.1:{server.port}"]
        assert cli.main(asked) == 2
    assert "replan: expected 5 actions per call" in capsys.readouterr().err


def test_the_actions_per_call_are_the_policys_own_unless_given(tmp_path, no_simulator):
    """10 for the embedded policy, which learned from whole chunks; openpi's 5 where a server says nothing."""
    common = ["evaluate", "--suite", SUITE, "--trials", "1", "--tasks", "0"]
    assert cli.main([*common, "--out", str(tmp_path / "own.jsonl"), "policy:embedded"]) == 0
    assert read_records(tmp_path / "own.jsonl")[0].configuration["replan"] == CONFIGS[EMBEDDED].replan == 10
    assert cli.main([*common, "--out", str(tmp_path / "given.jsonl"), "--replan", "5", "policy:embedded"]) == 0
    assert read_records(tmp_path / "given.jsonl")[0].configuration["replan"] == 5
    for told, replan in ((True, 10), (False, 5)):
        out = tmp_path / f"served{replan}.jsonl"
        with running(Backend(told)) as server:
            assert cli.main([*common, "--out", str(out), "--server", f"ws://127.0.0.1:{server.port}"]) == 0
        assert read_records(out)[0].configuration["replan"] == replan


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
        (["--workers", "0"], "workers: expected at least 1, got 0"),
        (["--batch", "0"], "batch: expected at least 1, got 0"),
        (["--replan", "0"], "replan: expected at least 1, got 0"),
        (["--replan", "11"], "max(replan, delay) + delay of at most 10, got 11; a chunk of mini_libero has 10 actions"),
        (["--delay", "-1"], "delay: expected at least 0, got -1"),
        (["--delay", "6"], "max(replan, delay) + delay of at most 10, got (10, 6)"),
        (["--max-steps", "281"], "max_steps: expected 1 to 280, got 281"),
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

    monkeypatch.setattr(command, "num_tasks", missing)
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
    argv = [
        "evaluate",
        "--suite",
        "libero_spatial",
        "--tasks",
        "0",
        "--trials",
        "1",
        "--max-steps",
        "10",
        "--replan",
        "5",
    ]
    argv += ["--num-steps", "2", "--workers", "1", "--pruner=safe", "--pruner.threshold=-1", "--pruner.warm-start=1"]
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
