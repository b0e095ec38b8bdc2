"""Hypothesis profiles, assert rewriting and a compilation cache, shared by all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("laws")

# Tests spend their time compiling, often the same program in several processes (servers, workers, resumed runs).
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # the first example compiles
settings.register_profile("local", max_examples=50, **QUIET)
settings.register_profile("ci", max_examples=50, derandomize=True, **QUIET)
settings.load_profile("ci" if os.environ.get("CI") else "local")
