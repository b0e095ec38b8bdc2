"""The demo as a person runs it: its exit codes, its files, and that no server outlives it."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from tiers import at_night

from safe_pruner_jax.policy.embedded import EMBEDDED, EMBEDDED_WEIGHTS
from safe_pruner_jax.policy.loading import calibrated
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.tokens import budget

pytestmark = pytest.mark.newest

SCRIPT = Path(__file__).parents[1] / "scripts" / "demo.py"


def ports(output: str) -> list[int]:
    return [int(p) for p in re.findall(r"--port (\d+)", output)]


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def servers_left(started: list[int]) -> list[str]:
    """Command lines of processes that still serve on one of these ports."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        if "--port" in words and words[words.index("--port") + 1] in map(str, started):
            found.append(" ".join(words))
    return found


@pytest.fixture(scope="module")
def demo():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    module = sys.modules["demo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo"]


# ------------------------------------------------------------------------------------------- without the simulator


def test_without_the_simulator_one_line_says_what_to_run(tmp_path):
    code = (
        "import runpy, sys; sys.modules['libero'] = None\n"
        "import importlib.metadata as m; found = m.version\n"
        "def version(name):\n"
        "    if 'libero' in name: raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
        f"sys.argv = ['demo.py', '--out', {str(tmp_path)!r}]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "scripts/setup_libero.sh" in done.stderr
    assert not ports(done.stdout)  # no server was started


def test_a_server_that_dies_is_reported_with_its_log(demo, tmp_path):
    server = demo.Server("safe", ["--pruner.keep", "7.5"], tmp_path / "server.log")
    try:
        with pytest.raises(demo.DemoError, match=r"exit code 2(.|\n)*keep: expected"):
            demo.wait_for([server])
    finally:
        server.stop()


# --------------------------------------------------------------------------------------------- with the simulator


@pytest.mark.nightly
@pytest.mark.libero
def test_the_demo_shows_keyframes_and_pruned_steps_and_leaves_files(tmp_path):
    # γ = -1: every call after the warm start is pruned, whatever the weights
    command = [sys.executable, str(SCRIPT), "--steps", "50", "--threshold=-1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert EMBEDDED_WEIGHTS in done.stdout and "pruned / none" in done.stdout
    assert done.stdout.count("no success in 50 actions") == 8  # after each of four episodes, and in the summary

    records = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    visual, replan = 2 * get_config(EMBEDDED).model.tokens_per_camera, get_config(EMBEDDED).replan
    assert [(r["scene"], r["pruner"]) for r in records[::5]] == [(0, "safe"), (0, "none"), (1, "safe"), (1, "none")]
    calls = list(range(0, 50, replan))
    safe, plain = ([r for r in records if (r["scene"], r["pruner"]) == (1, name)] for name in ("safe", "none"))
    assert [r["step"] for r in safe] == [r["step"] for r in plain] == calls
    assert safe[0]["keyframe"] and safe[0]["kappa"] is None and safe[0]["kept"] == safe[0]["alive"] == visual
    pruned = [r for r in safe if not r["keyframe"]]
    assert [r["step"] for r in pruned] == calls[calibrated().get("warm_start", 1) :]
    for r in pruned:
        assert r["kept"] == len(r["index"]) == budget(0.2, visual) and r["index"] == sorted(set(r["index"]))
        assert -1 <= r["kappa"] <= 1
    for r in safe:
        assert 0 < r["shallow_ms"] < r["infer_ms"] < r["round_trip_ms"]
        assert r["shallow_ms"] + r["rest_ms"] == pytest.approx(r["infer_ms"])
    assert all(r["infer_ms"] > 0 and "kept" not in r for r in plain)

    with imageio.get_reader(tmp_path / "episode.mp4") as video:
        frames = [np.asarray(frame) for frame in video]
    assert len(frames) == 2 * (len(calls) + 20 // replan), "a second more at the end of a scene"
    assert frames[0].shape == (368, 656 + 16 + 656, 3)
    assert np.abs(frames[3][:320, :656].astype(int) - frames[3][:320, 672:]).mean() > 10  # pruned, and not
    assert frames[0].std() > 20 and np.abs(frames[1].astype(int) - frames[0]).mean() > 10
    assert imageio.imread(tmp_path / "overlay.png").std() > 20
    started = ports(done.stdout)
    assert len(started) == 2 and not any(map(listening, started)) and not servers_left(started)


SLEEPER = """
import sys, time
if sys.orig_argv[1:4] == ["-m", "safe_pruner_jax", "serve"]:
    time.sleep(900)
"""
"""A `sitecustomize` by which a server sleeps instead of loading jax."""


@pytest.mark.libero
@pytest.mark.parametrize(
    ("number", "code", "real"),
    [(signal.SIGINT, 130, True), *at_night((signal.SIGTERM, 143, False)), (signal.SIGKILL, -9, False)],
)
def test_no_server_outlives_the_demo(number, code, real, tmp_path):
    """Ctrl-C among servers that load; the other signals among stand-ins, since it is the demo that ends them."""
    command = [sys.executable, "-u", str(SCRIPT), "--out", str(tmp_path)]
    (tmp_path / "sitecustomize.py").write_text("" if real else SLEEPER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=SCRIPT.parents[1], env=environment
    )
    try:
        started = []
        while len(started) < 2:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            started += ports(line)
        assert len(servers_left(started)) == 2
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == code and "Traceback" not in errors
        end = time.monotonic() + (60 if number == signal.SIGKILL else 0)  # then nobody was left to wait for them
        while (left := servers_left(started)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left
    finally:
        process.kill()
        process.communicate()
