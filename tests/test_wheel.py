"""The wheel alone: built, put in an empty environment with what it declares and nothing else, and asked for actions.

The environment is made of links to the distributions that are installed where the tests run, those that the wheel's
metadata name and what these name in turn. So a dependency that is not declared is missing, and nothing is fetched.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from packaging.requirements import Requirement

from safe_pruner_jax import __version__, get_config

pytestmark = [
    pytest.mark.newest,
    # openpi's client connects outside a `with`, which websockets deprecates since 17.1
    pytest.mark.filterwarnings(r"ignore:connect\(\) must be used:DeprecationWarning"),
]

ROOT = Path(__file__).parents[1]
LARGEST = 25_000_000
DEADLINE_S = 300.0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """`python -m build --wheel`."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def declared(lines: list[str], extra: str = "") -> Iterator[tuple[str, frozenset[str]]]:
    """Name and extras of the requirements that hold here."""
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement.name, frozenset(requirement.extras)


def closure(lines: list[str]) -> dict[str, metadata.Distribution]:
    """Installed distributions that these requirements name, and those that they name."""
    waiting, seen, distributions = list(declared(lines)), set(), {}
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = distributions[name] = metadata.distribution(name)
        for extra in {"", *extras}:
            waiting += declared(distribution.requires or [], extra)
    return distributions


def link(source: Path, place: Path) -> None:
    """One file under two names; a copy where they are on two disks."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)


@pytest.fixture(scope="module")
def room(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and its dependencies; the path of its `bin`."""
    folder = tmp_path_factory.mktemp("room")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (about,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = metadata.PathDistribution(zipfile.Path(archive, about.removesuffix("METADATA"))).requires
    for distribution in closure(lines).values():
        for file in distribution.files:
            if ".." not in file.parts:
                place = packages / file
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists() and Path(file.locate()).exists():
                    link(Path(file.locate()), place)
    install = ["--python", str(folder / "bin" / "python"), "install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    return folder / "bin"


def environment() -> dict[str, str]:
    """This process's, without anything that would let the room see the repository."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_the_wheel_is_small_and_has_the_package_alone(wheel):
    assert wheel.stat().st_size <= LARGEST
    with zipfile.ZipFile(wheel) as archive:
        rooms = {name.partition("/")[0] for name in archive.namelist()}
    assert rooms == {"safe_pruner_jax", "openpi_patch", f"safe_pruner_jax-{__version__}.dist-info"}


@pytest.mark.nightly
def test_the_version_is_said_once(room, tmp_path):
    said = subprocess.run([room / "openpi", "--version"], cwd=tmp_path, env=environment(), capture_output=True)
    assert said.stdout.decode() == f"safe_pruner_jax {__version__}\n" and said.returncode == 0, said.stderr


def test_the_citation_has_the_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.nightly
def test_the_wheel_alone_serves_the_embedded_policy(room, tmp_path):
    command = [room / "openpi", "serve", "--pruner=safe", "policy:embedded", "--port", "0", "--prompt-lengths", "16"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=out, stderr=out)
    try:
        end = time.monotonic() + DEADLINE_S
        while not (listening := re.search(r"listening on 127\.0\.0\.1:(\d+)", log.read_text())):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        client = WebsocketClientPolicy("127.0.0.1", int(listening[1]))
        request = get_config("mini_libero").robot.example(np.random.default_rng(0)) | {"prompt": "pick up the butter"}
        actions = client.infer(request)["actions"]
        assert actions.shape == (10, 7) and np.isfinite(actions).all()
        robot = [sys.executable, str(ROOT / "docs" / "first_client.py"), listening[1]]
        told = subprocess.run(robot, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        lines = told.stdout.splitlines()
        assert len(lines) == 8 and all("128 of 128 tokens, keyframe" in line for line in lines[:3]), told.stderr
        assert re.fullmatch(r"call 3: (26 of 128 tokens, κ|128 of 128 tokens, keyframe).* \d+ ms", lines[3])
        assert any(" 26 of 128 tokens" in line for line in lines)
        server.send_signal(signal.SIGTERM)
        assert server.wait(DEADLINE_S) == 0, log.read_text()
    finally:
        server.kill()
