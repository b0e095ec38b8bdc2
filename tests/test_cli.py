"""The command line: arguments, and one clear line with exit code 2 for what cannot be served."""

import dataclasses
import importlib
import inspect
import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from safe_pruner_jax.cli import main as cli
from safe_pruner_jax.cli.evaluate import Evaluate
from safe_pruner_jax.cli.main import parse, split_pruner
from safe_pruner_jax.cli.serve import Serve
from safe_pruner_jax.policy import spec
from safe_pruner_jax.policy.loading import calibrated
from safe_pruner_jax.policy.spec import Checkpoint, Default, Embedded, EnvMode
from safe_pruner_jax.pruners import PRUNERS
from safe_pruner_jax.serving.options import Serving

pytestmark = pytest.mark.newest


@pytest.fixture(autouse=True)
def root_logger():
    """`main` sends the log to this test's stderr, which is closed afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level


def serve_args(*argv: str):
    return parse(Serve, argv, "openpi serve")


def test_openpis_own_arguments():
    args, method = serve_args(
        *("--env", "LIBERO", "--port", "8123", "--default-prompt", "fold", "--record"),
        *("policy:checkpoint", "--policy.config=pi05_libero", "--policy.dir=/checkpoints/x"),
    )
    assert (args.env, args.port, args.default_prompt, args.record) == (EnvMode.LIBERO, 8123, "fold", True)
    assert args.policy == Checkpoint("pi05_libero", "/checkpoints/x")
    assert method.name == "full" and not method.describe


def test_defaults_are_openpis_but_for_the_loopback_address():
    args, *_ = serve_args()
    assert (args.env, args.port, args.policy) == (EnvMode.ALOHA_SIM, 8000, Default())
    assert args.host == "127.0.0.1"


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_pruners_factory_arguments_may_stand_anywhere(where):
    pruner = ["--pruner=safe", "--pruner.keep", "0.3", "--pruner.queries", "text", "--pruner.late-layers", "0", "-1"]
    policy = ["policy:embedded", "--port", "1"]
    args, method = serve_args(*(pruner + policy if where == "before" else policy + pruner))
    made = method.make()
    assert args.policy == Embedded() and args.port == 1 and method.describe
    assert method.given == {"keep", "queries", "late_layers"}
    assert made.plan.cut.keep == 0.3 and made.plan.capture[0].rows == "text" and made.plan.late_layers == (0, -1)


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_takes_its_choices_from_the_command_line(name):
    _, method = serve_args(f"--pruner={name}")
    assert method.name == name and method.make().plan == PRUNERS[name]().plan and method.describe and not method.given
    if "layers" in method.choices:
        _, method = serve_args(f"--pruner={name}", "--pruner.layers", "3", "9", "12")
        assert method.make().plan == PRUNERS[name](layers=(3, 9, 12)).plan


def test_safe_takes_what_the_policy_was_calibrated_to_unless_told_otherwise(tmp_path):
    fitted = lambda *argv: (lambda args, method: args.fit("LIBERO", method).choices)(*serve_args(*argv))
    paper = inspect.signature(PRUNERS["safe"]).parameters
    found = calibrated()
    assert {"queries", "fuse", "threshold"} <= set(found)
    assert found["threshold"] != paper["threshold"].default
    chosen = fitted("policy:embedded", "--pruner=safe", "--pruner.keep", "0.3", "--pruner.fuse=0")
    assert chosen["keep"] == 0.3 and chosen["fuse"] == 0 and chosen["threshold"] == found["threshold"]
    written = fitted("policy:embedded", "--pruner=safe", "--pruner.threshold", str(paper["threshold"].default))
    assert written["threshold"] == paper["threshold"].default and written["queries"] == found["queries"]
    assert "fuse" not in fitted("policy:embedded", "--pruner=random")
    own = ["policy:checkpoint", "--policy.config=mini_libero", f"--policy.dir={tmp_path}", "--pruner=safe"]
    assert fitted(*own)["threshold"] == paper["threshold"].default
    (tmp_path / "calibrate.json").write_text('{"choices": {"threshold": 0.5}}')
    assert fitted(*own)["threshold"] == 0.5
    (tmp_path / "calibrate.json").write_text('{"choices": {"threshold": 5}}')
    with pytest.raises(ValueError, match=r"calibrate.json: expected what .* threshold: expected γ"):
        fitted(*own)


def test_a_threshold_of_another_kappa_is_told(tmp_path, caplog):
    fitted = lambda *argv: (lambda args, method: args.fit("LIBERO", method).choices)(*serve_args(*argv))
    own = ["policy:checkpoint", "--policy.config=mini_libero", f"--policy.dir={tmp_path}", "--pruner=safe"]
    (tmp_path / "calibrate.json").write_text('{"choices": {"threshold": 0.5, "cut": 1}}')
    assert fitted(*own)["cut"] == 1 and "was calibrated with" not in caplog.text
    embedded = ("policy:embedded", "--pruner=safe")
    fitted(*embedded, "--pruner.cut", "0", "--pruner.threshold", "-1")
    fitted(*embedded, "--pruner.fuse", "0.3")
    assert "was calibrated with" not in caplog.text
    for argv, name, value, measured in (
        (embedded, "cut", "0", "3"),
        (embedded, "soft", "0.1", "0.0"),
        (embedded, "queries", "text", "all"),
        (own, "cut", "0", "1"),
    ):
        caplog.clear()
        fitted(*argv, f"--pruner.{name}", value)
        assert f"was calibrated with {name} = {measured}, not {value}; give --pruner.threshold" in caplog.text
        assert caplog.text.count("was calibrated with") == 1


def test_split_pruner():
    assert split_pruner(["a", "--pruner", "fastv", "b"]) == ("fastv", ["a", "b"])
    assert split_pruner(["--pruner.keep", "1"]) == ("none", ["--pruner.keep", "1"])


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--pruner=sfe"], "did you mean 'safe'"),
        (["--pruner"], "expected one of full"),
        (["--pruner=safe", "--pruner.keep", "1.5"], "keep: expected"),
        (["--pruner=safe", "--pruner.threshold", "3"], "threshold: expected"),
        (["policy:checkpoint", "--policy.config=pi05_libro", "--policy.dir=x"], "did you mean pi05_libero"),
        (["policy:checkpoint", "--policy.config=pi05_libero", "--policy.dir=/no/such"], "/no/such"),
        (["policy:embedded", "--pruner=fastv", "--pruner.cut", "40"], "below the model's depth 18, got 40"),
        (["policy:embedded", "--pruner=safe", "--pruner.keep", "600"], "visual tokens (2 cameras ×"),
        (
            ["policy:embedded", "--pruner=safe", "--pruner.grippers", "9"],
            "grippers: expected indices below 8, the number of action values, got (9,)",
        ),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_code_2(argv, text, capsys):
    assert cli.main(["serve", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("openpi serve: ") and text in error


def test_a_port_in_use_is_one_line_and_exit_code_2(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["serve", "policy:embedded", "--port", str(taken.getsockname()[1])]) == 2
    assert "port" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["sreve"], 2)])
def test_without_a_command_it_says_which_there_are(argv, code, capsys):
    assert cli.main(argv) == code
    assert "serve" in capsys.readouterr().out


def test_help_shows_the_pruners_own_choices(capsys):
    assert cli.main(["serve", "--pruner=safe", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--pruner.threshold" in text and "γ" in text and "policy:embedded" in text


def test_delays_and_real_time_chunking_are_chosen_in_words():
    options = ["--suite", "libero_object", "--delay", "4", "--rtc", "policy:embedded"]
    args, *_ = parse(Evaluate, options, "openpi evaluate")
    assert (args.delay, args.rtc) == (4, True)
    args, *_ = parse(Serve, ["--serving.real-time", "policy:embedded"], "openpi serve")
    assert args.serving.real_time and not Serving().real_time


def test_evaluates_arguments():
    args, method = parse(
        Evaluate,
        [
            "--suite",
            "libero_object",
            "--tasks",
            "0",
            "1",
            "policy:embedded",
            "--pruner",
            "safe",
            "--pruner.keep",
            "0.1",
        ],
        "openpi evaluate",
    )
    assert (args.suite, args.tasks, args.trials, args.shard) == ("libero_object", (0, 1), 50, "1/1")
    assert (args.policy, args.out, args.server) == (Embedded(), Path("records.jsonl"), None)
    assert method.choices["keep"] == method.make().plan.cut.keep == 0.1


def test_the_default_policy_of_evaluate_is_liberos():
    args, *_ = parse(Evaluate, ["--suite", "libero_object"], "openpi evaluate")
    assert args.named("LIBERO") == ("pi05_libero", "gs://openpi-assets/checkpoints/pi05_libero")


def test_a_command_without_a_pruner_does_not_know_one(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", "records.jsonl", "--pruner=safe"])
    assert stop.value.code == 2 and "pruner" in capsys.readouterr().err


@pytest.mark.parametrize("pruner", ["none", *PRUNERS])
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help_on_one_screen(command, pruner, capsys):
    assert cli.main([command, "--help", f"--pruner={pruner}"]) == 0
    text = capsys.readouterr().out
    assert f"openpi {command}" in text and len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 110
    for field in dataclasses.fields(cli.COMMANDS[command].arguments):
        assert f"--{field.name.replace('_', '-')}" in text, "a command hides an option"


@pytest.mark.parametrize(
    ("argv", "option"),
    [(["serve"], "--serving.tls-key"), (["train"], "--settings.steps"), (["analyze recall"], "--cut")],
)
def test_the_whole_help_has_everything(argv, option, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, "--help-all"])
    assert stop.value.code == 0 and option in capsys.readouterr().out


def test_help_for_a_pruner_that_is_not_there_is_an_error(capsys):
    assert cli.main(["serve", "--pruner=sfe", "--help"]) == 2
    assert "did you mean 'safe'" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(spec, "load_policy", lambda *args, **options: interrupted())
    assert cli.main(["serve", "policy:embedded"]) == 130
    assert capsys.readouterr().err.strip().endswith("openpi serve: interrupted")


def test_commands_are_imported_when_they_are_asked_for():
    """A server starts without what draws, trains and analyses; every analysis is known without its module."""
    code = (
        "import sys; from safe_pruner_jax.cli import main; main.COMMANDS['serve']\n"
        "print([name for name in ('matplotlib', 'optax', 'safe_pruner_jax.analysis') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    modules = {importlib.import_module(f"safe_pruner_jax.cli.{module}") for module in cli.ANALYSES.values()}
    assert set(cli.ANALYSES) == {name for module in modules for name in module.COMMANDS}
    assert "analyse" not in cli.COMMANDS and "serve" in cli.COMMANDS
