"""Sessions: what a reply says, what starts an episode afresh, what an error leaves behind."""

import jax
import numpy as np
import pytest
from tiny_engine import SLOTS, BadRequest, FakeTransform, close, compilations, example, inputs_of, poisoned

from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.robots.robots import RequestError


@pytest.fixture
def policy(ref, engine):
    return Policy(engine, FakeTransform(ref.config), prompt_lengths=(SLOTS,), seed=7, metadata={"robot": "fake"})


@pytest.fixture
def ask(ref, scenes):
    """A request: the frame's name, the cameras that are real, and anything else."""

    def request(frame="a", mask=(True, True), **more):
        return FakeTransform.request(example(ref.config, scenes[frame], mask=mask), **more)

    return request


def test_a_reply_has_openpis_keys_and_says_what_was_pruned(policy, ask, alone):
    session = policy.session()
    first, second = session.infer(ask("a", context="c")), session.infer(ask("a0"))
    assert set(first) == {"actions", "context", "policy_timing", "pruning"}
    assert first["context"] == "c" and policy.metadata == {"robot": "fake"}
    # the session is the engine with the policy's seed
    np.testing.assert_array_equal(first["actions"], alone[0][0][0, :, :7])
    np.testing.assert_array_equal(second["actions"], alone[1][0][0, :, :7])
    for reply in (first, second):
        timing = reply["policy_timing"]
        assert set(timing) == {"infer_ms", "shallow_ms", "rest_ms"} and min(timing.values()) > 0
        assert timing["infer_ms"] == pytest.approx(timing["shallow_ms"] + timing["rest_ms"])
        assert all(type(v) is float for v in timing.values())
        pruning = reply["pruning"]
        assert set(pruning) == {"kept", "alive", "keyframe", "kappa", "index", "views", "text"}
        assert (len(pruning["views"]), pruning["text"]) == (2, SLOTS)
        assert pruning["alive"] == 32 and pruning["kept"] == len(pruning["index"])
        assert type(pruning["keyframe"]) is bool
        assert pruning["index"].dtype == np.int32 and (np.diff(pruning["index"]) > 0).all()
    assert first["pruning"]["keyframe"] and first["pruning"]["kept"] == 32 and first["pruning"]["kappa"] is None
    assert not second["pruning"]["keyframe"] and second["pruning"]["kept"] == 6
    assert 0.988 < second["pruning"]["kappa"] <= 1.0001


def test_a_policy_can_keep_its_thoughts_to_itself(engine, ref, ask):
    quiet = Policy(engine, FakeTransform(ref.config), prompt_lengths=(SLOTS,), describe=False)
    assert set(quiet.session().infer(ask())) == {"actions", "context", "policy_timing"}


def test_a_policy_that_decides_nothing_times_the_whole(full_engine, ref, ask, scenes):
    session = Policy(full_engine, FakeTransform(ref.config), prompt_lengths=(SLOTS,)).session()
    noise = ref.arrays["in/noise"]
    reply = session.infer(ask(), noise=noise[0].astype(np.float64))
    assert set(reply["policy_timing"]) == {"infer_ms"}
    inputs = inputs_of(ref.config, example(ref.config, scenes["a"]))
    want, _, _ = full_engine.step(full_engine.init((0,), 2), inputs, jax.device_put(noise[:1]))
    close(reply["actions"], want[0, :, :7])
    assert (reply["pruning"]["kept"], reply["pruning"]["keyframe"], reply["pruning"]["kappa"]) == (32, True, None)


def started_afresh(reply):
    return reply["pruning"]["keyframe"] and reply["pruning"]["kappa"] is None


def test_what_starts_an_episode_afresh(policy, ask):
    session = policy.session()
    first = session.infer(ask())
    assert started_afresh(first)
    assert not session.infer(ask("a0"))["pruning"]["keyframe"]
    again = session.infer(ask(reset=True))
    assert started_afresh(again)
    np.testing.assert_array_equal(again["actions"], first["actions"])  # the noise starts anew as well
    assert not session.infer(ask(reset=False))["pruning"]["keyframe"]
    assert started_afresh(session.infer(ask(prompt="stop")))
    assert not session.infer(ask(prompt="stop"))["pruning"]["keyframe"]
    assert started_afresh(session.infer(ask(prompt="stop", mask=(True, False))))
    assert not session.infer(ask(prompt="stop", mask=(True, False)))["pruning"]["keyframe"]
    assert started_afresh(session.infer(ask(prompt="stop")))
    session.reset()
    assert started_afresh(session.infer(ask(prompt="stop")))


def test_an_episode_draws_its_noise_from_the_seed_it_is_given(policy, ask):
    session, other = policy.session(), policy.session()
    own = session.infer(ask(reset=True))["actions"]
    seeded = session.infer(ask(reset=True, seed=5))["actions"]
    assert not np.array_equal(own, seeded)
    np.testing.assert_array_equal(other.infer(ask(seed=5))["actions"], seeded)  # the first step begins an episode
    # within an episode it changes nothing, and the next one begins from the last seed
    np.testing.assert_array_equal(other.infer(ask("a0", seed=9))["actions"], session.infer(ask("a0"))["actions"])
    np.testing.assert_array_equal(other.infer(ask(reset=True))["actions"], seeded)
    for bad in (-1, 2**31, 1.5, True, "1"):
        with pytest.raises(RequestError, match=r"\['seed'\]: expected a whole number from 0 to 2³¹ - 1, got "):
            session.infer(ask(seed=bad))


def test_sessions_do_not_share_anything(policy, ask):
    one, two = policy.session(), policy.session()
    first = one.infer(ask())
    assert started_afresh(two.infer(ask("b")))
    assert not one.infer(ask("a0"))["pruning"]["keyframe"]
    np.testing.assert_array_equal(policy.session().infer(ask())["actions"], first["actions"])


def test_a_bad_request_leaves_the_session_as_it_was(policy, ask, alone, ref, scenes):
    session = policy.session()
    session.infer(ask())
    too_long = FakeTransform.request(example(ref.config, scenes["a"], length=201), prompt="another", reset=True)
    with pytest.raises(BadRequest):
        session.infer({"prompt": "another", "reset": True})
    with pytest.raises(ValueError, match="at most 200 tokens, got 201"):
        session.infer(too_long)
    reply = session.infer(ask("a0"))
    assert not reply["pruning"]["keyframe"]
    np.testing.assert_array_equal(reply["actions"], alone[1][0][0, :, :7])


def test_actions_that_are_not_finite_are_an_error_and_reset_the_session(policy, engine, ask, alone):
    session = policy.session()
    session.infer(ask())
    policy.engine = poisoned(engine, "after the cut")
    with pytest.raises(FloatingPointError, match=r"expected finite actions.* memory was reset"):
        session.infer(ask("a0"))
    policy.engine = engine
    reply = session.infer(ask())
    assert started_afresh(reply)
    np.testing.assert_array_equal(reply["actions"], alone[0][0][0, :, :7])


def test_a_session_copies_nothing_implicitly(policy, ask):
    session = policy.session()
    session.infer(ask())
    session.infer(ask("a0"))
    before = len(compilations)
    with jax.transfer_guard("disallow"):
        pruned, keyframe = session.infer(ask("a1")), session.infer(ask("b"))
    assert not pruned["pruning"]["keyframe"] and keyframe["pruning"]["keyframe"]
    assert len(compilations) == before
