"""Hypothesis profiles and assert rewriting, shared by all tests."""

import os

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("laws", "synthetic", "tiny_engine")

# the models are tiny, so compiling is most of the time: a quarter less with code that is not optimised
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ["SAFE_PRUNER_PROGRAMS"] = "none"  # tests compile what they run, and leave nothing behind

QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # the first example compiles
settings.register_profile("local", max_examples=50, **QUIET)
settings.register_profile("ci", max_examples=50, derandomize=True, **QUIET)
settings.load_profile("ci" if os.environ.get("CI") else "local")
