"""Real-time chunking: the mask, the guidance, chunks that continue one another, robots that ask for it."""

import json
import threading
import urllib.request
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from tiny_policy import request

from safe_pruner_jax.model.guidance import MAX_GUIDANCE, Guide, guided, strength
from safe_pruner_jax.policy.fleet import Fleet
from safe_pruner_jax.policy.overlap import Overlap, rebase, remaining, soft_mask
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.robots import RequestError
from safe_pruner_jax.robots.transform import RobotIO
from safe_pruner_jax.robots.transforms import NormStats
from safe_pruner_jax.serving import running

pytestmark = pytest.mark.newest

DATA = Path(__file__).parent / "data"
A, D = 10, 4


# --- mask and strength -------------------------------------------------------------------------------------


@pytest.mark.parametrize("executed", [0, 1, 4, 9, 10, 99])
@pytest.mark.parametrize("delay", [0, 1, 5, 12])
def test_the_mask_is_the_papers(executed, delay):
    got = soft_mask(A, Overlap(executed, delay))
    for i, weight in enumerate(got):
        if i >= A - executed:
            want = 0.0
        elif i < delay:
            want = 1.0
        else:
            c = (A - executed - i) / (A - executed - delay + 1)
            want = c * (np.exp(c) - 1) / (np.exp(1) - 1)
        assert weight == pytest.approx(want, abs=1e-6)
    assert all(a >= b for a, b in pairwise(got))


@pytest.mark.parametrize("bad", [(-1, 0), (0, -1), (1.0, 0), (True, 0), ("1", 0), (0, None)])
def test_an_overlap_that_cannot_be(bad):
    with pytest.raises(ValueError, match=r"(executed|delay): expected a whole number .* got"):
        Overlap(*bad)


def test_what_remains_of_a_chunk():
    chunk = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    assert remaining(chunk, Overlap(1, 0)).tolist() == [[3, 4], [5, 6], [7, 8], [0, 0]]
    assert not remaining(chunk, Overlap(4, 2)).any() and not remaining(chunk, Overlap(7, 2)).any()
    assert (remaining(chunk, Overlap(0, 0)) == chunk).all()


def test_the_strength_is_the_papers_and_clipped():
    for t in (0.01, 0.1, 0.3, 0.5, 0.9, 0.999):
        tau = 1 - t
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        assert float(strength(jnp.float32(t), 5.0)) == pytest.approx(min(5.0, (1 - tau) / (tau * r2)), rel=1e-4)
    assert float(strength(jnp.float32(1.0), MAX_GUIDANCE)) == MAX_GUIDANCE


def guide(target, weight, limit=MAX_GUIDANCE):
    batch = len(target)
    return Guide(jnp.asarray(target, jnp.float32), jnp.broadcast_to(weight, (batch, A)), jnp.full(batch, limit))


def test_the_correction_is_the_gradient_of_the_weighted_distance():
    rng = np.random.default_rng(0)
    mix, x, target = rng.normal(size=(A * D, A * D)) / 4, rng.normal(size=(1, A, D)), rng.normal(size=(1, A, D))
    weight, t = soft_mask(A, Overlap(3, 2)).astype(np.float64), 0.7

    def distance(x):
        finished = x - t * np.tanh(x.reshape(-1) @ mix).reshape(x.shape)
        return 0.5 * (weight[:, None] * (target - finished) ** 2).sum()

    slope = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[at] = 1e-5
        slope[at] = (distance(x + step) - distance(x - step)) / 2e-5
    velocity = lambda x: (jnp.tanh(x.reshape(1, -1) @ mix.astype(np.float32)).reshape(x.shape), "kept")
    x = jnp.asarray(x, jnp.float32)
    got, more = guided(velocity, x, jnp.float32(t), guide(target, weight.astype(np.float32), 1e9))
    factor = (t**2 + (1 - t) ** 2) / (t * (1 - t))
    np.testing.assert_allclose(got, np.asarray(velocity(x)[0]) + factor * slope, atol=2e-4)
    assert more == "kept"


# --- a flow that is known ----------------------------------------------------------------------------------


def two_ways(x, t, spread=0.1):
    """Exact velocity of a flow whose chunks are all +1 or all -1, half and half, with a little noise."""
    variance = ((1 - t) * spread) ** 2 + t**2
    means, modes = [], []
    for sign in (1.0, -1.0):
        off = x - (1 - t) * sign
        modes.append(-0.5 * jnp.square(off).sum((1, 2)) / variance)
        means.append(sign + (1 - t) * spread**2 / variance * off)
    share = jax.nn.softmax(jnp.stack(modes), axis=0)[:, :, None, None]
    return (x - (share * jnp.stack(means)).sum(0)) / t


@partial(jax.jit, static_argnames="steps")
def drawn(noise, guide, steps=10):
    x = noise
    for t in np.linspace(1, 0, steps, endpoint=False, dtype=np.float32):
        velocity = lambda x: (two_ways(x, t), None)  # noqa: B023
        v, _ = velocity(x) if guide is None else guided(velocity, x, t, guide)
        x = x - v / steps
    return x


def test_guidance_continues_the_way_that_was_begun():
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(200, A, D)), jnp.float32)
    overlap = Overlap(executed=4, delay=2)
    old = np.repeat(remaining(np.ones((A, D), np.float32), overlap)[None], len(noise), 0)
    jump = lambda chunks: np.abs(chunks[:, 2] - 1.0).mean()  # the third step is the first one executed
    alone, guided_ = (np.asarray(drawn(noise, g)) for g in (None, guide(old, soft_mask(A, overlap))))
    assert 0.4 < (alone.mean((1, 2)) < 0).mean() < 0.6  # half of them turn round
    assert (guided_.mean((1, 2)) < 0).mean() < 0.02
    assert jump(guided_) < 0.3 * jump(alone)
    np.testing.assert_allclose(drawn(noise, guide(old, np.zeros(A, np.float32))), alone, atol=1e-5)


# --- actions that are relative to the state ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["pi05_libero", "pi0_libero", "pi05_droid_jointpos_polaris", "pi0_aloha"])
def test_a_rebased_chunk_is_the_same_motion(name):
    rng, config = np.random.default_rng(1), get_config(name)
    stats = {}
    for key, size in (("state", config.robot.state_dim), ("actions", config.robot.action_dim)):
        low = rng.normal(size=size)
        stats[key] = NormStats(rng.normal(size=size), rng.uniform(0.1, 2, size), low, low + rng.uniform(0.1, 2, size))

    class NoTokens:
        max_token_len, vocab_size = config.model.max_token_len, 1

        def encode(self, prompt, state=None):
            return np.zeros(1, np.int32)

    io = RobotIO(config, stats, NoTokens())
    states = [k for k in config.robot.example(rng) if "state" in k or "position" in k]
    asked = [config.robot.example(rng) | {"prompt": "go"} for _ in range(2)]
    asked[1] |= {key: asked[0][key] * 0.9 + 0.05 for key in states}
    before, now = (io.prepare(one)[1] for one in asked)
    chunk = rng.normal(size=(A, config.model.action_dim)).astype(np.float32)
    sent = io.finish(chunk, before)["actions"]
    got = rebase(chunk, sent, lambda actions: io.finish(actions, now)["actions"])
    np.testing.assert_allclose(io.finish(got, now)["actions"], sent, atol=1e-5)
    assert got.dtype == np.float32 and (got[:, sent.shape[1] :] == chunk[:, sent.shape[1] :]).all()
    moved = np.abs(got - chunk).max() > 1e-3
    assert moved == (config.delta_mask is not None)


def test_a_constant_action_is_not_divided_by_its_scale():
    chunk = np.full((A, D), 0.5, np.float32)
    finish = lambda actions: actions[:, :2] * np.array([2.0, 1e-9]) + 1.0
    got = rebase(chunk, finish(chunk) + 0.25, finish)
    np.testing.assert_allclose(got[:, 0], 0.625)
    assert (got[:, 1:] == chunk[:, 1:]).all()


# --- the model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(ten_step_policy):
    """The tiny policy; its first step is a keyframe and no other."""
    return ten_step_policy


def asking(robot, step, executed=4, delay=3, **changes):
    return request(robot, step, rtc={"executed": executed, "delay": delay}, **changes)


@pytest.fixture(scope="module")
def played(tiny):
    """Three steps of robots 0 and 1, each alone: with guidance, without it, and with an overlap of nothing."""
    replies = {}
    for kind in ("guided", "plain", "nothing left"):
        for robot in (0, 1):
            session, asked = tiny.session(), {"guided": {}, "plain": None, "nothing left": {"executed": 99}}[kind]
            replies[kind, robot] = [
                session.infer(request(robot, step) if asked is None else asking(robot, step, **asked))
                for step in range(3)
            ]
    return replies


def test_nothing_to_agree_with_changes_nothing(played):
    for robot in (0, 1):
        for got, want in zip(played["nothing left", robot], played["plain", robot], strict=True):
            np.testing.assert_allclose(got["actions"], want["actions"], atol=2e-5)
            assert got["rtc"] == {"frozen": 0, "overlap": 0} and "rtc" not in want
        first = played["guided", robot][0]
        np.testing.assert_allclose(first["actions"], played["plain", robot][0]["actions"], atol=2e-5)
        assert first["rtc"] == {"frozen": 0, "overlap": 0}


def test_a_new_chunk_agrees_with_what_is_executed_meanwhile(played):
    for robot in (0, 1):
        keyframes = [reply["pruning"]["keyframe"] for reply in played["guided", robot]]
        assert keyframes == [True, False, False]
        for kind, factor in (("guided", 1.0), ("plain", 0.2)):
            for old, new in pairwise(reply["actions"] for reply in played[kind, robot]):
                off = np.abs(new[:3] - old[4:7]).mean()
                if kind == "guided":
                    close = off
                    assert off < 0.05
                assert close <= factor * off
        assert all(reply["rtc"] == {"frozen": 3, "overlap": 6} for reply in played["guided", robot][1:])


def test_robots_of_one_step_equal_robots_alone(tiny, played):
    fleet = Fleet(tiny, limit=2, real_time=True)
    ask = lambda robot, step: (robot, fleet.prepare(robot, asking(robot, step)))
    for robot in (0, 1):
        fleet.step([ask(robot, 0)])
    for step in (1, 2):
        for robot, outcome in enumerate(fleet.step([ask(0, step), ask(1, step)])):
            np.testing.assert_allclose(outcome.reply["actions"], played["guided", robot][step]["actions"], atol=1e-4)


def test_who_asks_for_it_does_not_share_a_step_with_who_does_not(tiny):
    assert tiny.prepare(asking(0, 0)).group != tiny.prepare(request(0, 0)).group
    assert tiny.prepare(asking(0, 0)).group == tiny.prepare(asking(1, 0, delay=1)).group


def test_a_fresh_episode_has_nothing_to_continue(tiny):
    session = tiny.session()
    for step, changes in enumerate(({}, {}, {"reset": True}, {"prompt": "open it"}, {})):
        overlap = session.infer(asking(0, step, **changes))["rtc"]["overlap"]
        assert overlap == (6 if step == 1 else 0)  # the prompt of the last one is another again
    session.reset()
    assert session.infer(asking(0, 9))["rtc"]["overlap"] == 0


def test_a_pruned_step_that_is_not_finite_is_guided_on_the_full_path(tiny, monkeypatch):
    session = tiny.session()
    old = session.infer(asking(0, 0))["actions"]
    engine_step = tiny.engine.step

    def spoilt(control, inputs, noise=None, *, full=False, guide=None):
        actions, control, info = engine_step(control, inputs, noise, full=full, guide=guide)
        return (actions if full else actions * jnp.nan), control, info

    monkeypatch.setattr(tiny.engine, "step", spoilt)
    reply = session.infer(asking(0, 1))
    assert reply["pruning"]["fallback"] and np.abs(reply["actions"][:3] - old[4:7]).mean() < 0.05


@pytest.mark.parametrize("bad", [[4, 3], {"executed": 4}, {"executed": 4.5, "delay": 1}, {"executed": 4, "delay": -1}])
def test_a_bad_request_says_what_is_expected(tiny, bad):
    with pytest.raises(RequestError, match=r"request\['rtc'\]: expected .* got .*"):
        tiny.prepare(request(0, rtc=bad))


def test_a_fleet_that_is_not_prepared_for_it_refuses(tiny):
    with pytest.raises(RequestError, match=r"rtc.*--serving.real-time"):
        Fleet(tiny, limit=1).prepare(0, asking(0, 0))


def test_over_the_wire_it_is_the_session(tiny, played):
    with running(Fleet(tiny, limit=1, real_time=True), client_errors=(RequestError,)) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/info") as info:
            assert json.load(info)["real_time"]
        clients = [WebsocketClientPolicy("127.0.0.1", server.port) for _ in range(2)]

        def play(robot):
            for step in range(3):
                reply = clients[robot].infer(asking(robot, step))
                want = played["guided", robot][step]
                assert reply["rtc"] == want["rtc"]
                got[robot].append(reply["actions"].tobytes() == want["actions"].tobytes())

        got = ([], [])
        robots = [threading.Thread(target=play, args=(robot,)) for robot in range(2)]
        for robot in robots:
            robot.start()
        for robot in robots:
            robot.join()
        assert got == ([True] * 3, [True] * 3)
