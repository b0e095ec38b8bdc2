"""Plans of several cuts: what is refused, and how they fit models of other depths."""

import pytest
from synthetic import case, make

from safe_pruner_jax.pruners import Capture, Cut, Later, Plan


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Plan(Cut(3, 0.2), later=(Later(3, 0.1),)), "later: expected deeper layers"),
        (lambda: Plan(Cut(3, 0.2), later=(Later(5, 0.3),)), "later: expected .* no more tokens"),
        (lambda: Plan(later=(Later(5, 0.3),)), "later: expected a first cut"),
        (lambda: Later(5, 0.3, (Capture(4, "action"),)), "capture: expected rows of the prefix"),
        (lambda: Plan(Cut(3, 0.2), dropped="keep"), "dropped: expected .* got 'keep'"),
        (lambda: Plan(Cut(3, 0.2), late_from="half"), "late_from: expected .* got 'half'"),
        (lambda: Plan(remember=(Capture(3, "each"),)), "remember: expected"),
        (lambda: Plan(Cut(3, 0.2), later=(Later(9, 0.1),)).for_depth(8), "later: expected .* depth 8, got 9"),
        (
            lambda: Plan(Cut(3, 0.2), later=(Later(6, 0.1, (Capture(2, "text"),)),)).for_depth(8),
            "capture: layer 2 is not between",
        ),
    ],
)
def test_plans_of_several_cuts_reject_what_cannot_run(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_scaled_cuts_stay_in_order_in_shallow_models():
    for name in ("specprune", "sparsevlm", "vla_cache"):
        for depth in range(4, 33, 4):
            plan = make(case(name)).plan.for_depth(depth)
            layers = [c.layer for c in plan.cuts]
            assert layers == sorted(set(layers)) and layers[-1] < depth
            assert all(0 <= c.layer < depth - 1 for c in plan.remember)
            assert plan.for_depth(depth) == plan
