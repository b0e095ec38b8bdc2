"""Many robots behind one policy: each as if alone, memories evicted, steps that are not finite computed again."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import TOKENS, request

from safe_pruner_jax.policy.fleet import Fleet
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.policy.reply import NonFinite
from safe_pruner_jax.robots.robots import RequestError

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def tiny(two_step_policy):
    """The tiny policy; its first step is a keyframe and no other."""
    return two_step_policy


def ask(fleet, *requests):
    """{robot: request} in one step → {robot: outcome}."""
    jobs = [(robot, fleet.prepare(robot, asked)) for robot, asked in requests]
    return dict(zip((robot for robot, _ in requests), fleet.step(jobs), strict=True))


def test_a_robot_in_a_batch_equals_the_same_robot_alone(tiny):
    fleet, alone = Fleet(tiny, limit=2), [tiny.session(), tiny.session()]
    for step, together in enumerate([(0,), (0, 1), (1, 0), (0, 1)]):  # in the second round one is at its keyframe
        outcomes = ask(fleet, *((robot, request(robot, step)) for robot in together))
        for robot in together:
            reply, want = outcomes[robot].reply, alone[robot].infer(request(robot, step))
            np.testing.assert_allclose(reply["actions"], want["actions"], atol=1e-5)
            for key in ("kept", "alive", "keyframe"):
                assert reply["pruning"][key] == want["pruning"][key]
            assert outcomes[robot].fresh == reply["pruning"]["keyframe"] == (step == (0, 1)[robot])


def test_alone_it_is_a_session_bit_for_bit(tiny):
    fleet, session = Fleet(tiny, limit=2), tiny.session()
    for step in range(3):
        got = ask(fleet, ("r", request(0, step)))["r"].reply["actions"]
        assert got.tobytes() == session.infer(request(0, step))["actions"].tobytes()


def test_layouts_do_not_mix(tiny):
    fleet = Fleet(tiny, limit=2)
    short, long = fleet.prepare(0, request(0)), fleet.prepare(1, request(1, prompt="go " * 15))
    assert short.group != long.group
    with pytest.raises(ValueError, match="1 to 2 requests of one group"):
        fleet.step([(0, short), (1, long)])
    with pytest.raises(RequestError, match="observation/state"):
        fleet.prepare(0, request(0, **{"observation/state": np.full(8, np.nan)}))


def test_memories_are_evicted_by_number_and_by_age_and_come_back_with_a_keyframe(tiny):
    now = [0.0]
    fleet = Fleet(tiny, limit=1, max_robots=2, max_age_s=10.0, clock=lambda: now[0])
    first = {}
    for robot in (0, 1):
        first[robot] = ask(fleet, (robot, request(robot)))[robot].reply["actions"]
    assert not ask(fleet, (0, request(0)))[0].fresh and (fleet.robots, fleet.evicted) == (2, 0)
    ask(fleet, (2, request(2)))  # the third: robot 1 was unused for longest
    assert (fleet.robots, fleet.evicted) == (2, 1)
    back = ask(fleet, (1, request(1)))[1]
    assert back.fresh and back.pruning["keyframe"] and back.reply["actions"].tobytes() == first[1].tobytes()
    now[0] = 10.5
    assert fleet.evicted == 2 and ask(fleet, (1, request(1)))[1].fresh  # too old, like the others
    assert (fleet.robots, fleet.evicted) == (1, 4)
    now[0] = 20.0
    assert not ask(fleet, (1, request(1)))[1].fresh
    fleet.forget(1)
    assert ask(fleet, (1, request(1)))[1].fresh and fleet.evicted == 4  # not evicted: it had left


@pytest.mark.parametrize(("limits", "says"), [({"limit": 0}, "at least 1"), ({"limit": 8, "max_robots": 4}, "limit 8")])
def test_limits_that_cannot_be(tiny, limits, says):
    with pytest.raises(ValueError, match=says):
        Fleet(tiny, **limits)


# --- what is not finite ------------------------------------------------------------------------------------


class Spoilt:
    """An engine whose pruned steps come back with something that is not finite, for some rows."""

    def __init__(self, engine, what, rows=(0,), full=False):
        self._engine, self._what, self._rows, self._full = engine, what, rows, full

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self, control, inputs, noise=None, *, full=False, guide=None):
        actions, control, info = self._engine.step(control, inputs, noise, full=full, guide=guide)
        if full and not self._full:
            return actions, control, info
        for row in (r for r in self._rows if r < actions.shape[0]):
            if self._what == "actions":
                actions = actions.at[row, 1, 2].set(jnp.nan)
            else:
                value = getattr(info.selection, self._what)
                broken = value.at[row].set(jnp.inf)
                object.__setattr__(info, "selection", info.selection.replace(**{self._what: broken}))
        return actions, control, info


@pytest.mark.parametrize("what", ["actions", "score", "kappa"])
def test_a_pruned_step_that_is_not_finite_is_computed_again_on_the_full_path(tiny, what):
    fleet, spoilt = Fleet(tiny, limit=2), Policy(Spoilt(tiny.engine, what), tiny.transform, prompt_lengths=(16, 32))
    ask(fleet, ("sick", request(0)), ("well", request(1)))
    fleet.policy = spoilt
    outcomes = ask(fleet, ("sick", request(0, 1)), ("well", request(1, 1)))
    sick, well = outcomes["sick"], outcomes["well"]
    assert sick.pruning["fallback"] and sick.pruning["keyframe"] and sick.pruning["kept"] == 2 * TOKENS
    assert "fallback" not in well.pruning and not well.pruning["keyframe"]
    # the same noise as the step would have had, every token, and no memory
    episode = tiny.session()
    episode.infer(request(0))
    full = load_full(tiny).session()
    full.infer(request(0))
    np.testing.assert_allclose(sick.reply["actions"], full.infer(request(0, 1))["actions"], atol=1e-5)
    # and it is the keyframe that later steps refer to
    fleet.policy = tiny
    after = ask(fleet, ("sick", request(0, 1)), ("well", request(1, 2)))["sick"]
    assert not after.pruning["keyframe"] and after.pruning["kappa"] > 0.9


def load_full(tiny):
    """The tiny policy without pruning."""
    from safe_pruner_jax.engine.engine import Engine
    from safe_pruner_jax.pruners import full

    return Policy(Engine(tiny.engine.weights, tiny.engine.config, full()), tiny.transform, prompt_lengths=(16, 32))


def test_not_finite_on_the_full_path_either_is_an_error_and_resets_one_robot(tiny):
    fleet = Fleet(tiny, limit=2)
    ask(fleet, ("sick", request(0)), ("well", request(1)))
    fleet.policy = Policy(Spoilt(tiny.engine, "actions", full=True), tiny.transform, prompt_lengths=(16, 32))
    outcomes = ask(fleet, ("sick", request(0, 1)), ("well", request(1, 1)))
    assert isinstance(outcomes["sick"].error, NonFinite) and outcomes["sick"].reply is None
    assert outcomes["well"].error is None
    fleet.policy = tiny
    outcomes = ask(fleet, ("sick", request(0, 1)), ("well", request(1, 2)))
    assert outcomes["sick"].fresh and not outcomes["well"].fresh


def test_a_memory_that_is_not_finite_heals_by_a_keyframe(tiny):
    fleet = Fleet(tiny, limit=1)
    ask(fleet, ("r", request(0)))
    episode = fleet._episodes["r"]
    spoil = lambda a: a.at[0, 0].set(jnp.nan) if a.dtype == jnp.float32 and a.size else a
    episode.control = episode.control.replace(pruner=jax.tree.map(spoil, episode.control.pruner))
    healed = ask(fleet, ("r", request(0, 1)))["r"]
    assert healed.pruning["keyframe"] and np.isfinite(healed.reply["actions"]).all()
    assert not ask(fleet, ("r", request(0, 2)))["r"].pruning["keyframe"]


def test_warm_up_compiles_every_size_and_split(tiny):
    policy = Policy(tiny.engine, tiny.transform, prompt_lengths=(16,))
    fleet = Fleet(policy, limit=2)
    fleet.warmup()
    compiled = []
    with jax.log_compiles():
        handler = logging.Handler()
        handler.emit = lambda record: compiled.append(record.getMessage())
        logging.getLogger("jax").addHandler(handler)
        try:
            ask(fleet, (0, request(0)))
            ask(fleet, (0, request(0, 1)), (1, request(1)))  # one keyframe, one pruned
            ask(fleet, (0, request(0, 2)), (1, request(1, 1)))
            before = len([message for message in compiled if "Compiling" in message])
            jax.jit(lambda x: x * 3.25)(1.5)
        finally:
            logging.getLogger("jax").removeHandler(handler)
    assert before == 0 and [message for message in compiled if "Compiling" in message]
