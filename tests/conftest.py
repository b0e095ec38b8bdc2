"""Hypothesis profiles, assert rewriting, and what makes compiling cheap; shared by all tests."""

import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings

from safe_pruner_jax.engine import xla

pytest.register_assert_rewrite("fake_server", "laws", "live_server", "synthetic", "tiny_checkpoint", "tiny_engine")

# the models are tiny, so compiling is most of the time: a quarter less with code that is not optimised
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ["SAFE_PRUNER_PROGRAMS"] = "none"  # servers leave nothing behind

# one program is compiled once for all workers, servers and notebooks of a run; the folder goes with the run
PROGRAMS = None
if "PYTEST_XDIST_WORKER" not in os.environ and xla.trusted():
    PROGRAMS = tempfile.mkdtemp(prefix="programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    xla.keep_programs(PROGRAMS)  # for this process, which has imported jax; the variables are for its children


def pytest_unconfigure():
    if PROGRAMS is not None:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # the first example compiles
settings.register_profile("local", max_examples=50, **QUIET)
settings.register_profile("ci", max_examples=50, derandomize=True, **QUIET)
settings.load_profile("ci" if os.environ.get("CI") else "local")
