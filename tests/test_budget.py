"""A budget in, settings out: the choice, the settings between, and what is said of the neighbours."""

import functools
from types import SimpleNamespace

import pytest

from safe_pruner_jax.analysis import budget
from safe_pruner_jax.analysis.budget import Budget
from safe_pruner_jax.analysis.rows import Rows
from safe_pruner_jax.cli import budget as command
from safe_pruner_jax.cli.main import COMMANDS
from safe_pruner_jax.policy.loading import calibrated
from safe_pruner_jax.policy.spec import Embedded
from safe_pruner_jax.pruners import make

pytestmark = pytest.mark.newest


def point(keep: float, share: float = 0.1) -> dict:
    """Cost grows with what is kept and with keyframes, error falls."""
    flops = share + (1 - share) * (0.4 + 0.6 * keep)
    error = 0.3 * (1 - share) * (1 - keep) ** 2
    own = {"keep": keep, "share": share, "threshold": 1 - share, "queries": "text", "fuse": 0.5, "keyframes": share}
    return own | {"flops": flops, "ms": 50 * flops, "error": error}


@pytest.mark.parametrize("text", ["", "ms", "-1", "0", "1.2x", "nan", "inf", "fast"])
def test_other_budgets_are_refused(text):
    with pytest.raises(ValueError, match=r"budget: expected 25ms, 0\.05"):
        budget.read_budget(text)


@pytest.mark.parametrize("b", [Budget("ms", 32.0), Budget("flops", 0.66), Budget("error", 0.05)])
def test_what_is_proposed_is_near_the_budget_and_within_it(b, monkeypatch):
    monkeypatch.setattr(command, "inherited", lambda _: {"warm_start": 3})
    played = []

    def plays(choices, share):
        assert (choices["warm_start"], choices["cut"]) == (3, 1)
        played.append(choices["keep"])
        return point(choices["keep"], share) | {"cut": choices["cut"]}

    args = SimpleNamespace(budget_keeps=(0.05, 0.2, 0.7))
    proposal = {"choices": {"queries": "text", "fuse": 0.5, "threshold": 0.8, "cut": 1}}
    points, chosen = command.settle(plays, proposal, {0.1: 0.9, 0.3: 0.7}, args, b)
    assert len(played) <= 6 + command.TRIES
    assert (1 - budget.NEAR) * b.value <= points[chosen][b.kind] <= b.value
    text = budget.table(points, chosen, b)
    assert "**chosen**" in text and "Next cheaper" in text and "Next dearer" in text and "--pruner.keep" in text
    assert "--pruner.cut 1" in text, "γ holds for the cut that it was measured at"
    assert len(budget.figure(points, chosen, b).axes) == 1


@pytest.mark.nightly
def test_on_the_embedded_policy_a_proposal_is_within_a_tenth_of_its_budget(tmp_path):
    """Settings are played on the recording inside the package; the second budget reuses what the first has played."""
    args = COMMANDS["analyze calibrate"].arguments(
        budget_keeps=(0.2, 0.7), out=tmp_path, policy=Embedded(), replan=5
    )  # twice as many calls as when it plays
    known = calibrated()
    proposal, thresholds = {"choices": {"queries": known["queries"], "fuse": known["fuse"]}}, {0.1: known["threshold"]}
    load = functools.cache(lambda: args.load("LIBERO", make("full")))
    count = []
    for b in (Budget("flops", 0.87), Budget("error", 0.027)):
        with Rows(tmp_path / "budget.jsonl", {}) as file:
            points, chosen = command.settle(command.Plays(args, load, file), proposal, thresholds, args, b)
            count.append(len(file.finished))
        own = points[chosen]
        assert (1 - budget.NEAR) * b.value <= own[b.kind] <= b.value
        (again,) = [p for p in points if p["keep"] == own["keep"]]
        assert again["keyframes"] < 0.5 and 0.2 < own["keep"] < 0.7, "it is neither end of what was played"
    assert count[0] <= 2 + command.TRIES and count[1] <= 2 + 2 * command.TRIES


def test_a_budget_below_everything_says_what_there_is():
    with pytest.raises(ValueError, match=r"expected at least 0\.487 .* got 0\.1 "):
        budget.choose([point(0.05), point(0.5)], Budget("flops", 0.1))


def test_the_frontier_leaves_out_what_another_beats_in_both():
    beaten = point(0.2) | {"error": 0.9, "flops": 0.9}
    points = [point(0.5), beaten, point(0.1)]
    assert budget.frontier(points, "flops") == [2, 0]
    assert budget.neighbours(points, 0, "flops") == {"cheaper": points[2], "dearer": None}


def test_numbers_are_of_all_calls_keyframes_in():
    rows = [{"errors": [0.0, 0.3, 0.3], "ms": [40, 20, 22], "flops": [1.0, 0.6, 0.6], "keyframes": [0]}]
    found = budget.summary(rows)
    assert found["keyframes"] == pytest.approx(1 / 3) and found["flops"] == pytest.approx(2.2 / 3)
    assert found["ms"] == pytest.approx((40 + 2 * 21) / 3) and found["error"] == pytest.approx((0.18 / 3) ** 0.5)
