"""How far pruning moves the actions: against loops, through the command, and what is refused."""

import json

import numpy as np
import pytest
from demonstrations import demo
from tiny_policy import moving_scene

from safe_pruner_jax.analysis import cost, deviation, tune
from safe_pruner_jax.analysis.rows import read_rows
from safe_pruner_jax.cli import analyze
from safe_pruner_jax.cli import main as cli
from safe_pruner_jax.cli.sweep import Sweep, cells
from safe_pruner_jax.libero.demonstrations import write_demos
from safe_pruner_jax.policy.loading import calibrated
from safe_pruner_jax.policy.spec import Embedded
from safe_pruner_jax.pruners import make

pytestmark = pytest.mark.newest

ACTIONS = cli.COMMANDS["analyze actions"].arguments


@pytest.fixture(scope="module")
def policy(plain_policy):
    return plain_policy


def test_errors_are_in_standard_deviations_of_the_commands(policy):
    calls = moving_scene(steps=6, cut_at=3)
    reference, told = deviation.actions_of(policy, calls, 4)
    assert reference.shape == (6, 4, 7) and all(pruning["keyframe"] for pruning in told)
    same = deviation.measure(policy, calls, reference)
    assert same["errors"] == [0] * 6 and same["keyframes"] == [*range(6)] and same["switched"] == 0

    pruned = policy.with_pruner(make("safe", keep=0.1, cut=1, every=4))
    row = deviation.measure(pruned, calls, reference)
    assert row["keyframes"] == [0, 4] and row["steps"] == 24
    whole, cut = cost.shares(pruned, calls[0].request)
    assert 0 < cut < whole and row["flops"] == pytest.approx((2 * whole + 4 * cut) / 6) and same["flops"] == 1
    session, sigma = pruned.session(), policy.transform.stats["actions"].std
    for t, call in enumerate(calls):
        actions = session.infer(call.request)["actions"]
        squares = [((actions[s, d] - reference[t, s, d]) / sigma[d]) ** 2 for s in range(4) for d in range(6)]
        assert row["errors"][t] == pytest.approx(np.sqrt(np.mean(squares)), abs=1e-6)
    assert row["errors"][0] == 0 < row["errors"][1]
    with pytest.raises(ValueError, match="at least one call"):
        deviation.measure(policy, [], reference)


def test_a_summary_weighs_calls_and_not_episodes():
    row = {"method": "safe", "keep": 0.2, "steps": 10, "flops": 0.5}
    rows = [
        row | {"calls": 2, "errors": [0.0, 1.0], "keyframes": [0], "kept": 6.0, "switched": 1},
        row | {"calls": 3, "errors": [0.0, 2.0, 3.0], "keyframes": [0], "kept": 1.0, "switched": 4, "flops": 1.0},
        row | {"method": "fastv", "calls": 1, "errors": [0.5], "keyframes": [0], "kept": 4.0, "switched": 0},
    ]
    found = deviation.summary(rows)
    safe, fastv = found["safe", 0.2], found["fastv", 0.2]
    assert safe["calls"] == 5 and safe["keyframes"] == 0.4 and safe["kept"] == 3 and safe["switched"] == 0.25
    assert safe["rms"] == pytest.approx(np.sqrt(14 / 5)) and safe["pruned"] == pytest.approx(np.sqrt(14 / 3))
    assert fastv["pruned"] is None and fastv["p90"] is None
    text = deviation.table(rows)
    assert text.index("fastv") < text.index("safe")  # the smaller error first
    assert "| safe | 20% | 3.0 | 40.0% | 0.800× | 1.673 | 2.160 |" in text
    kept, along = deviation.figure(rows).axes
    assert len(kept.lines) == 2 and len(along.lines) == 1  # fastv has no pruned call here


def test_the_best_setting_of_each_method_within_a_budget():
    def row(method, keep, flops, error):
        numbers = {"keyframes": [], "kept": 1.0, "switched": 0, "steps": 1}
        return {"method": method, "keep": keep, "calls": 1, "errors": [error], "flops": flops, **numbers}

    rows = [
        row("safe", 0.2, 0.7, 0.3),
        row("safe:warm_start=1,late_layers=(0,-1)", 0.3, 0.8, 0.2),
        row("safe", 0.5, 0.9, 0.1),  # too dear
        row("fastv", 0.2, 0.6, 0.5),
        row("fastv:warm_start=1", 0.1, 0.65, 0.5),  # no better and dearer
        row("random", 0.9, 0.95, 0.1),
    ]
    chosen = tune.proposals(rows, 0.8)
    assert (chosen["safe"]["keep"], chosen["fastv"]["setting"], chosen["random"]) == (0.3, "fastv", None)
    methods = ["safe:warm_start=1,late_layers=(0,-1),keep=0.3", "fastv:keep=0.2"]
    assert tune.arguments(chosen) == methods
    text = tune.table(rows, 0.8)
    assert "| safe | 3 | warm_start=1,late_layers=(0,-1) | 30% | 0% | 0.800× | 0.200 |" in text
    assert "the comparison favours" in text and "| random | 1 | none within the budget |" in text
    assert "favours" not in tune.table(rows[:2] + rows[3:5], 0.8)
    names = [cell.name for cell in cells(Sweep(methods=tuple(methods), keeps=(0.1, 0.5)))]
    assert names == ["full", "safe-warm_start1-late_layers0_-1-keep0.3", "fastv-keep0.2"]


def test_errors_along_the_episode_are_of_pruned_calls_only():
    row = lambda errors, keyframes: {"method": "safe", "keep": 0.2, "errors": errors, "keyframes": keyframes}
    found = deviation.by_call([row([0.0, 3.0, 1.0], [0]), row([0.0, 4.0], [0]), row([5.0, 0.0, 1.0, 2.0], [1])])
    assert list(found) == [("safe", 0.2)]
    assert found["safe", 0.2] == pytest.approx({0: 5.0, 1: np.sqrt(12.5), 2: 1.0, 3: 2.0})


@pytest.mark.nightly
def test_the_command_measures_every_method_once_and_goes_on(policy, tmp_path, capsys):
    write_demos(tmp_path / "butter_demo.hdf5", [demo(seed=s, steps=20, side=56, every=2) for s in range(2)])
    own = {"data": (str(tmp_path / "butter_demo.hdf5"),), "out": tmp_path / "out", "policy": Embedded()}
    methods = ("fastv:cut=2", "safe:threshold=-1.0,cut=2,late_layers=(-1,)")
    args = ACTIONS(**own, methods=methods, keeps=(0.2,), budget="0.99x")
    analyze.run_actions(args, lambda: policy, {"policy": "tiny"})
    told = capsys.readouterr().out
    assert "safe:threshold=-1.0" in told and "At most 0.99× of the multiply-adds" in told
    file = tmp_path / "out" / "actions.jsonl"
    rows = read_rows(file)
    assert len(rows) == 2 * 2 and {row["calls"] for row in rows} == {2}, "ten actions per call, as this policy is asked"
    choices = [json.loads(row["part"].split(" | ")[2]) for row in rows if row["method"].startswith("safe")]
    assert {c["queries"] for c in choices} == {calibrated()["queries"]}
    assert {(c["keep"], c["threshold"], c["cut"]) for c in choices} == {(0.2, -1.0, 2)}
    before = file.read_bytes()
    again = ACTIONS(**own, methods=methods[:1], keeps=(0.2,))
    analyze.run_actions(again, lambda: pytest.fail("nothing is left to compute"), {"policy": "tiny"})
    assert file.read_bytes() == before and "safe" not in capsys.readouterr().out
    assert (tmp_path / "out" / "actions.png").stat().st_size > 5000


def test_a_budget_of_milliseconds_is_refused(tmp_path, capsys):
    assert cli.main(["analyze", "actions", "--out", str(tmp_path), "--budget", "20ms", "policy:embedded"]) == 2
    assert "budget: expected a share of the multiply-adds, 0.8x, got '20ms'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("fastw", "did you mean 'fastv'"),
        ("full", "none: it keeps everything"),
        ("fastv:layer=2", "choices of fastv (cut, queries, warm_start, grippers), got fastv:layer=2"),
        ("fastv:keep=0.3", "choices of fastv (cut, queries, warm_start, grippers), got fastv:keep=0.3"),
        ("fastv:cut", "expected NAME:choice=value,…, got fastv:cut (cut has no value)"),
        ("safe:pool=0.5", "pool: expected μ of at least 1, got 0.5"),
    ],
)
def test_what_is_no_method_is_told_in_one_line(method, expected, tmp_path, capsys):
    assert cli.main(["analyze", "actions", "--out", str(tmp_path), "--methods", method, "policy:embedded"]) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
