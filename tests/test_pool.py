"""Jobs in processes that die: nothing is lost, nothing hangs, and at some point it is enough."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safe_pruner_jax.training.pool import DEATHS, finish

pytestmark = pytest.mark.newest


def work(path, deadly):
    """Writes a file; the first time it is asked for a deadly one, the process dies instead."""
    if path.name in deadly and not path.with_suffix(".died").exists():
        path.with_suffix(".died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    path.write_text("done")
    return path.name


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(path):
    raise OSError(f"no space for {path.name}")


def test_what_a_dead_worker_was_at_is_done_again(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(4)]
    missing = lambda: [path for path in paths if not path.exists()]
    rows = list(finish(missing, functools.partial(work, deadly=("1.txt",)), 1))
    assert (tmp_path / "1.died").exists() and not missing()
    assert {name for _, _, name in rows} == {path.name for path in paths}
    number, count, _ = rows[-1]
    assert number == count < 4  # what was there is not done again


def test_workers_that_always_die_end_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=f"gave up: workers died {DEATHS} times"):
        list(finish(lambda: [tmp_path / "a"], die, 1))


def test_what_a_job_raises_is_passed_on(tmp_path):
    with pytest.raises(OSError, match="no space for a"):
        list(finish(lambda: [tmp_path / "a"], refuse, 1))
    assert list(finish(lambda: [], refuse, 1)) == []


def wait(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(600)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = f"import test_pool, pathlib; test_pool.start(pathlib.Path({str(tmp_path)!r}))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    try:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        worker = int((tmp_path / "pid").read_text())
        assert alive(worker)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not alive(worker))


def start(folder: Path) -> None:
    """In the parent: one worker that does not end by itself."""
    list(finish(lambda: [folder / "pid"], wait, 1))


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has buried yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
