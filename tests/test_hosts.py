"""Training over several hosts, two processes on this machine: the same curve as one, and a run that changes hands."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import train_hosts
from tiny_training import SETTINGS

from safe_pruner_jax.training import hosts

pytestmark = pytest.mark.newest

PROGRAM = Path(train_hosts.__file__)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(folder: Path, stop: int, processes: int) -> list[int]:
    """The step at which each of them ended; one alone is this process."""
    if processes == 1:
        return [train_hosts.train(folder, stop)]
    tests = PROGRAM.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))}
    command, address = [sys.executable, str(PROGRAM), str(folder), str(stop)], f"127.0.0.1:{free_port()}"
    places = [[address, str(processes), str(place)] for place in range(processes)]
    started = [
        subprocess.Popen([*command, *place], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for place in places
    ]
    try:
        said = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, error) in zip(started, said, strict=True):
        assert process.returncode == 0, error
    return [int(out.split()[-1]) for out, _ in said]


def curve(folder: Path) -> dict[int, tuple[float, float]]:
    """Step → loss and gradient norm."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row}


@pytest.mark.nightly
def test_two_hosts_learn_what_one_does_and_a_run_changes_hands(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, SETTINGS.steps, 1) == [SETTINGS.steps]
    assert train(two, 3, 2) == [3, 3]  # stops early, and is gone on with by one
    assert train(two, SETTINGS.steps, 1) == [SETTINGS.steps]
    assert sorted(curve(one)) == sorted(curve(two)) == list(range(1, SETTINGS.steps + 1))
    for step, values in curve(one).items():
        np.testing.assert_allclose(curve(two)[step], values, rtol=2e-4)
    with np.load(one / "w.npz") as a, np.load(two / "w.npz") as b:
        assert set(a.files) == set(b.files)
        for name in a.files:
            np.testing.assert_allclose(a[name], b[name], atol=2e-5)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (("here", 2, 0), "coordinator: expected HOST:PORT"),
        (("127.0.0.1:1", 2, 2), "host: expected --hosts N and --host from 0"),
        (("127.0.0.1:1", 2, None), "host: expected --hosts N and --host from 0"),
    ],
)
def test_a_place_that_does_not_exist_is_one_line(place, text):
    with pytest.raises(ValueError, match=text):
        hosts.join(*place)


def test_alone_nothing_is_exchanged():
    assert hosts.first() and hosts.agree(True) and not hosts.agree(False)
    np.testing.assert_array_equal(hosts.gather({"a": np.arange(3)})["a"], np.arange(3))
