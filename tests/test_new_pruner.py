"""Pruners from outside the package: the template runs, and an installed package's factory is found by name."""

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import laws
import pytest
import synthetic

from safe_pruner_jax import pruners
from safe_pruner_jax.cli import main as cli
from safe_pruner_jax.cli.serve import Serve

pytestmark = pytest.mark.newest

TEMPLATE = Path(__file__).parents[1] / "docs" / "new_pruner.py"


def load():
    spec = importlib.util.spec_from_file_location("new_pruner", TEMPLATE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_template_runs():
    out = subprocess.run([sys.executable, TEMPLATE], capture_output=True, text=True, check=True).stdout
    assert [line.split(": ")[0] for line in out.splitlines()] == ["step 0", "step 1", "step 2"]
    assert "keyframe" in out.splitlines()[0]
    assert all("32 of 128 tokens" in line for line in out.splitlines()[1:])


@pytest.fixture
def announced(tmp_path, monkeypatch):
    """A distribution that announces two pruners, one of which is none."""
    (tmp_path / "outside.py").write_text(TEMPLATE.read_text() + "\nnumber = 3\n")
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{pruners.GROUP}]\nsticky = outside:sticky\nbad = outside:number\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("outside", None)


def test_an_installed_package_brings_a_pruner(announced):
    assert {e.name for e in metadata.entry_points(group=pruners.GROUP)} >= {"sticky", "bad"}
    assert "sticky" in pruners.names() and "outside" not in sys.modules
    assert pruners.make("sticky", keep=7).plan.cut.keep == 7
    _, method = cli.parse(Serve, ["--pruner=sticky", "--pruner.bonus", "2"], "openpi serve")
    assert method.make().name == "sticky" and method.choices["bonus"] == 2 and method.describe
    with pytest.raises(ValueError, match="expected a factory behind the entry point 'bad', got int"):
        pruners.factory("bad")
    with pytest.raises(ValueError, match="did you mean 'sticky'"):
        pruners.factory("stiky")


def test_a_name_of_this_package_stays_its_own(tmp_path, monkeypatch):
    info = tmp_path / "thief-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thief\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{pruners.GROUP}]\nsafe = nowhere:safe\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert pruners.factory("safe") is pruners.PRUNERS["safe"] and pruners.names().count("safe") == 1


def test_the_template_obeys_the_laws(monkeypatch):
    monkeypatch.setitem(pruners.PRUNERS, "sticky", load().sticky)
    monkeypatch.setitem(laws.BAD, "bonus", (-0.1, float("nan")))
    for law in laws.LAWS:
        law(synthetic.case("sticky"))
