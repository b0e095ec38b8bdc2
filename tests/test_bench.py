"""Benchmarks: rounds that interleave, phases that add up, limits and memory that are measured, honest reports."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_pruner_jax.bench import machine, modes
from safe_pruner_jax.bench.baseline import Openpi, OpenpiUnavailable
from safe_pruner_jax.bench.measure import Bench, weights_bytes
from safe_pruner_jax.cli.bench import run_bench
from safe_pruner_jax.engine.flops import exact_flops
from safe_pruner_jax.engine.xla import options
from safe_pruner_jax.model import config as sizes
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import GemmaConfig, SiglipConfig
from safe_pruner_jax.model.params import init_params
from safe_pruner_jax.policy.policy import layout_of
from safe_pruner_jax.pruners import full, safe
from safe_pruner_jax.robots import configs
from safe_pruner_jax.timing import interleave, ratio, spread

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def tiny():
    gemma = GemmaConfig(width=32, depth=4, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=8)
    return sizes.mini(prefix=gemma, expert=gemma, vision=SiglipConfig(16, 1, 32, 2), image_size=56, action_horizon=4)


@pytest.fixture
def tiny_libero(tiny, monkeypatch):
    config = dataclasses.replace(configs.get_config("mini_libero"), model=tiny)
    monkeypatch.setitem(configs.CONFIGS, "mini_libero", config)


# clock


def test_every_round_runs_every_step_and_the_first_rounds_do_not_count():
    ran, now = [], [0.0]

    def step(name, seconds):
        def run():
            ran.append(name)
            now[0] += seconds

        return run

    told, clock = [], lambda: now[0]
    both = {"a": step("a", 1), "b": step("b", 3)}
    times = interleave(both, 2, warm_up=1, on_round=lambda *row: told.append(row), clock=clock)
    assert ran == ["a", "b"] * 3 and told == [(i, {"a": 1.0, "b": 3.0}) for i in (1, 2, 3)]
    assert times["a"].tolist() == [1, 1] and times["b"].tolist() == [3, 3]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        interleave({}, 0)
    # time is up before the second round, and the first one that counts runs all the same
    enough = interleave({"a": step("a", 1)}, 9, warm_up=1, seconds=0.5, clock=clock)
    assert enough["a"].tolist() == [1]
    assert len(interleave({"a": step("a", 1)}, 9, warm_up=0, seconds=2.5, clock=clock)["a"]) == 3


def test_a_ratio_is_taken_within_rounds():
    slow_moment = np.array([1.0, 10.0, 1.0])
    assert ratio(slow_moment, 2 * slow_moment).median == 2
    assert not ratio(slow_moment, 2 * slow_moment).disturbed
    assert spread(np.array([1.0, 1.0, 2.0, 2.0])).disturbed and not spread(np.array([1.0, 1.01, 1.02])).disturbed


# machine


def test_limits_are_those_of_this_machine_and_a_roofline_takes_the_larger():
    limits = machine.limits("float32", side=256, repeats=2)
    assert 1e7 < limits.macs_per_s < 1e16 and 1e7 < limits.bytes_per_s < 1e14
    limits = machine.Limits(macs_per_s=10.0, bytes_per_s=100.0)
    assert limits.seconds(50, 100) == 5 and limits.seconds(50, 1000) == 10


def test_peak_memory_is_that_of_the_step():
    size = 256 * 2**20
    before = machine.resident_bytes()
    small = machine.peak_bytes(lambda: None)
    large = machine.peak_bytes(lambda: np.ones(size // 8).sum())
    again = machine.peak_bytes(lambda: None)
    assert large - small > 0.9 * size and abs(small - before) < 0.5 * size
    assert large - again > 0.9 * size  # an earlier peak is forgotten


def test_a_machine_is_described_without_paths():
    told = machine.describe()
    assert told["versions"]["jax"] == jax.__version__ and "/" not in str(told["flags"])


# modes


def test_random_weights_have_the_layout_of_prepared_ones_and_run(tiny):
    for upright in (False, True):
        ours = modes.random_weights(tiny, upright=upright)
        prepared = lambda key, upright=upright: pi0.prepare(init_params(key, tiny), tiny, upright=upright)
        theirs = jax.eval_shape(prepared, jax.random.key(0))
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
    half = modes.random_weights(tiny.replace(dtype="bfloat16"))
    assert half.prefix[0].qkv.dtype == jnp.bfloat16 and half.embedding.dtype == jnp.bfloat16


def test_bytes_read_are_those_of_the_weights_the_products_touch(tiny):
    weights = modes.random_weights(tiny)
    read, c = modes.weight_bytes(weights), tiny.prefix
    layer = c.width * (c.num_heads + 2) * c.head_dim + c.num_heads * c.head_dim * c.width + 3 * c.width * c.mlp_dim
    norms = 2 * c.width
    assert read["prefix"] == 4 * (3 * (layer + norms) + c.width * 2 * c.head_dim + norms)
    assert read["expert"] == 10 * 4 * 4 * layer


def test_roofline_adds_the_parts(tiny):
    limits = machine.Limits(macs_per_s=1.0, bytes_per_s=1.0)
    macs = {"vision": 5, "prefix": 1, "matching": 1, "capture": 2, "expert": 2}
    assert modes.roofline_s(macs, {"vision": 1, "prefix": 10, "expert": 3}, limits) == 5 + 10 + 4


def test_phases_add_up_to_the_step_and_counts_are_those_of_the_plan(tiny):
    weights, example = modes.random_weights(tiny), modes.example_of(tiny, 2, 9)
    layout, pruner = layout_of(example, tiny), safe(keep=0.25, cut=2, threshold=-1.0)
    mode = modes.step_mode("safe", weights, tiny, layout, example, pruner)
    times = interleave({"step": mode.step, **mode.marks}, 2)
    phases = mode.phases(times)
    assert tuple(phases) == modes.PHASES
    np.testing.assert_allclose(sum(phases.values()), times["step"], rtol=1e-9)
    assert mode.facts["tokens_per_layer"] == [48, 48, 24, 24]
    assert mode.facts["macs"]["total"] == exact_flops(tiny, pruner.plan, layout, pruned=True).total
    # XLA counts two operations per multiply-add, and the small ones beside the products
    second = mode.facts["xla_flops"]["second"]
    assert second is not None and second > 2 * mode.facts["macs"]["expert"] / 10


@pytest.mark.nightly
def test_robots_at_a_keyframe_are_those_asked_for(tiny):
    weights, example = modes.random_weights(tiny), modes.example_of(tiny, 1, 9)
    layout = layout_of(example, tiny)
    pruner = lambda: safe(keep=0.25, cut=2, threshold=-1.0)
    mixed = modes.step_mode("x", weights, tiny, layout, example, pruner(), robots=2, keyframes=1)
    assert mixed.facts["keyframes"] == 1 and not mixed.marks
    alone = modes.step_mode("x", weights, tiny, layout, example, full(), robots=2, phases=False)
    assert alone.facts["keyframes"] == 2
    with pytest.raises(ValueError, match="views: expected 1 to 3, got 4"):
        modes.example_of(tiny, 4, 9)
    always = safe(keep=0.25, cut=2, every=1)
    with pytest.raises(ValueError, match="expected a pruned step on a still scene"):
        modes.step_mode("x", weights, tiny, layout, example, always)


# command

STAND_IN = """
import sys, json
assert sys.argv[sys.argv.index("--dtype") + 1] == "float32"
print("some chatter")
print("ready", json.dumps({"jax": "0.5.3", "first_call_s": 1.0}), flush=True)
for number, line in enumerate(sys.stdin):
    print(0.5, flush=True)
"""


def stand_in(tmp_path: Path, program: str) -> str:
    """An interpreter that runs `program` whatever it is asked to run."""
    number = len(list(tmp_path.iterdir()))
    script = tmp_path / f"program{number}.py"
    script.write_text(program)
    python = tmp_path / f"python{number}"
    python.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.nightly
def test_the_command_measures_and_leaves_table_figure_and_numbers(tiny_libero, tmp_path, capsys):
    python = stand_in(tmp_path, STAND_IN)
    options = {"keeps": (0.25,), "pruners": ("safe",), "batches": (1, 2), "rounds": 2, "prompt": 9}
    options |= {"quantise": ("int8",)}
    run_bench(Bench(config="mini_libero", out=tmp_path, openpi_python=python, **options))
    report = json.loads((tmp_path / "bench.json").read_text())
    wanted = {"openpi", "all slots", "full", "safe 0.25", "safe keyframe", "full ×2", "safe 0.25 ×2"}
    wanted |= {"safe 0.25 ×2, 1 at a keyframe", "full, int8", "safe 0.25, int8"}
    assert wanted == set(report["modes"]) and report["baseline"] == "openpi"
    for name, row in report["modes"].items():
        assert row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"], name
    ours = report["modes"]["safe 0.25"]
    assert (
        ours["roofline_share"] > 0 and ours["times_full"]["median"] > 0 and set(ours["phases_ms"]) == set(modes.PHASES)
    )
    eighth = report["modes"]["full, int8"]["weight_bytes"]["prefix"]
    assert eighth < 0.5 * report["modes"]["full"]["weight_bytes"]["prefix"]
    rounds = [json.loads(line) for line in (tmp_path / "bench.rounds.jsonl").read_text().splitlines()]
    assert [row["warm_up"] for row in rounds] == [True, True, False, False]
    again = 1e3 * np.median([row["seconds"]["full/step"] for row in rounds[2:]])
    assert again == pytest.approx(report["modes"]["full"]["ms"]["median"])
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert "| openpi" in capsys.readouterr().out and "| mode |" in (tmp_path / "bench.md").read_text()


def test_without_openpi_the_baseline_says_what_it_is(tiny_libero, tmp_path, capsys):
    broken = stand_in(tmp_path, "import sys; print('no module named openpi', file=sys.stderr); sys.exit(3)")
    with pytest.raises(OpenpiUnavailable, match="no module named openpi; give --openpi-python"):
        Openpi(broken, dtype="float32")
    with pytest.raises(OpenpiUnavailable, match="--openpi-python another one"):
        Openpi(str(tmp_path / "missing"))
    with pytest.raises(OpenpiUnavailable, match="killed by signal 9"):
        Openpi(stand_in(tmp_path, "import os; os.kill(os.getpid(), 9)"))
    options = {"keeps": (0.25,), "rounds": 1, "prompt": 9, "phases": False, "pruners": (), "depth": 3}
    run_bench(Bench(config="mini_libero", out=tmp_path, openpi_python=broken, **options))
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["baseline"] == "all slots" and "no module named openpi" in report["openpi"]
    assert report["depth"] == len(report["modes"]["full"]["tokens_per_layer"]) == 3


def test_bad_choices_are_told_before_anything_is_made(tiny_libero, tmp_path, monkeypatch):
    for depth in (0, 9):
        with pytest.raises(ValueError, match=f"depth: expected 1 to 4 layers, got {depth}"):
            run_bench(Bench(config="mini_libero", depth=depth, out=tmp_path))
    with pytest.raises(ValueError, match="pruner: expected one of"):
        run_bench(Bench(config="mini_libero", out=tmp_path, pruners=("saef",)))
    monkeypatch.setattr(machine, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match=r"expected .* GB of host memory .* got .* choose --dtype bfloat16"):
        run_bench(Bench(config="mini_libero", out=tmp_path))
    assert weights_bytes(sizes.pi05()) == pytest.approx(6.7e9, rel=0.05)


@pytest.mark.nightly
def test_ablations_compare_equal_results(tiny, tiny_libero, tmp_path, capsys):
    file = Path(__file__).parents[1] / "benchmarks" / "ablations.py"
    spec = importlib.util.spec_from_file_location("ablations", file)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert program.main(config="mini_libero", rounds=1, prompt=9, out=tmp_path / "a.json") == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == (11 if options() else 8) and all(row["gain"]["median"] > 0 for row in rows)
    with pytest.raises(AssertionError, match="this one"):
        program.same(np.ones(3, np.float32), np.array([1, 1, 1.1], np.float32), "this one")
