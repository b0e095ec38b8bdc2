"""Programs that are kept: a second process takes what the first compiled; nothing breaks where nothing can be kept."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from safe_pruner_jax.engine import xla

pytestmark = pytest.mark.newest

PROGRAM = """
import json
from safe_pruner_jax.engine.xla import default_folder, keep_programs
keep_programs(default_folder())
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
x = jnp.arange(6.0).reshape(2, 3)
result = float(jax.jit(lambda x: (x @ x.T).sum())(x))
print(json.dumps({"result": result, "taken": sum("cache_hits" in event for event in seen)}))
"""


def test_a_second_process_takes_what_the_first_has_compiled(tmp_path, monkeypatch):
    """Where jax can be trusted with it; an older one keeps nothing."""
    folder = tmp_path / "kept" / "programs"
    runs = []
    monkeypatch.setenv("SAFE_PRUNER_PROGRAMS", str(folder))
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    assert runs[0]["taken"] == 0 and (runs[1]["taken"] > 0) == xla.trusted()
    assert runs[0]["result"] == runs[1]["result"]
    assert any(folder.glob("*")) == xla.trusted()


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    xla.keep_programs(tmp_path / "file" / "programs")
    assert "give --programs another folder" in caplog.text
    xla.keep_programs(None)
    assert jax.config.jax_compilation_cache_dir == before


def test_the_usual_folder_follows_the_system(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    assert xla.default_folder() is None  # what the tests say
    monkeypatch.setenv("SAFE_PRUNER_PROGRAMS", "/elsewhere")
    assert xla.default_folder() == Path("/elsewhere")
    monkeypatch.delenv("SAFE_PRUNER_PROGRAMS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert xla.default_folder() == Path("/somewhere/safe_pruner_jax/programs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert xla.default_folder().parts[-3:] == (".cache", "safe_pruner_jax", "programs")
    monkeypatch.setattr(jax, "__version__", "0.5.3")
    assert xla.default_folder() is None
