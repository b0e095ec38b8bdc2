"""Full steps for any method: at the start, and after a grasp."""

import inspect

import numpy as np
import pytest
import synthetic
from oracles.full_steps import slow_full_steps
from synthetic import case, episode, kept, play, put

from safe_pruner_jax.pruners import Plan, after_grasp, fastv, make, warm
from safe_pruner_jax.pruners.full_steps import CHOICES, with_full_steps

STEPS = 9


def scene(c, seed):
    """Some tokens disappear at step 6."""
    seen = episode(seed, c.pruner, steps=STEPS)
    return seen.replace(alive=put(seen.alive, slice(6, None), ~seen.alive[6] | (np.arange(synthetic.N) < 12)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["random", "fastv", "sparsevlm"])
@pytest.mark.parametrize(
    "choices",
    [
        {"warm_start": 2},
        {"grippers": (1,)},
        {"grippers": (0, 2)},
        {"warm_start": 2, "grippers": (1,)},
    ],
    ids=str,
)
def test_steps_run_in_full_where_the_loops_say_so_and_the_method_keeps_what_it_kept(name, choices, seed):
    c = case(name, **choices)
    seen = scene(c, seed)
    selections, free = play(c, seen)[1], play(case(name), seen)[1]
    expected = slow_full_steps(seen, **choices)
    assert [bool(s.keyframe) for s in selections] == expected
    assert any(expected) and not all(expected)
    assert [kept(s) for s in selections] == [kept(s) for s in free]


def test_a_method_that_refreshes_by_itself_still_does():
    choices = {"threshold": 0.9, "grippers": (1,)}
    c, plain = case("safe", **choices), case("safe", threshold=0.9)
    seen = episode(0, c.pruner, steps=STEPS)
    overruled = [s for s, now in zip(play(c, seen)[1], slow_full_steps(seen, grippers=(1,)), strict=True) if now]
    own = [bool(s.keyframe) for s in play(plain, seen)[1]]
    assert overruled and all(s.keyframe for s in overruled) and sum(own) > 1
    first = next(t for t, now in enumerate(slow_full_steps(seen, grippers=(1,))) if now)
    assert [bool(s.keyframe) for s in play(c, seen)[1]][:first] == own[:first]


def test_nothing_is_added_to_a_method_that_drops_nothing():
    for pruner in (warm(make("full"), 3), after_grasp(make("full"), (0,))):
        assert pruner.plan == Plan() and pruner.step is make("full").step


def test_a_factory_gets_the_choices_that_it_lacks():
    assert list(inspect.signature(fastv).parameters)[-2:] == list(CHOICES)
    assert with_full_steps(fastv) is fastv

    def own(*, grippers: int = 0):
        """A method with another idea of grippers.

        Args:
          grippers: how many.
        """
        assert grippers == 2
        return make("random")

    extended = with_full_steps(own)
    assert list(inspect.signature(extended).parameters) == ["grippers", "warm_start"]
    assert "warm_start: w ≥ 1 steps" in extended.__doc__ and extended.__doc__.count("grippers:") == 1
    assert extended(grippers=2, warm_start=2).name == "random"


def test_a_gripper_that_the_robot_does_not_have_is_named():
    c = case("fastv", grippers=(synthetic.ACTION,))
    expected = rf"grippers: expected indices below {synthetic.ACTION}, .* got \({synthetic.ACTION},\)"
    with pytest.raises(ValueError, match=expected):
        play(c, episode(0, c.pruner))
    assert after_grasp(make("fastv"), [1]).plan == make("fastv").plan  # as a JSON file has it
