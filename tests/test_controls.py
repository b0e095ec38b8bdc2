"""Controls of the forecast: the verdict on three synthetic policies, each built to be one, and the command."""

import dataclasses

import jax
import numpy as np
import pytest
from demonstrations import demo
from tiny_policy import moving_scene

from safe_pruner_jax.analysis import controls
from safe_pruner_jax.analysis.controls import Cell
from safe_pruner_jax.analysis.rows import read_rows
from safe_pruner_jax.analysis.trace import Trace, Watch
from safe_pruner_jax.cli import controls as command
from safe_pruner_jax.cli import recordings
from safe_pruner_jax.libero.demonstrations import write_demos
from safe_pruner_jax.tokens import PrefixLayout

pytestmark = pytest.mark.newest

N, DEPTH, CALLS = 24, 5, 12
KINDS = ("forecast works", "matching broken", "target wrong")


def attention(rng, peaks, *, noise=0.05):
    """[n] with most of its mass on a few tokens."""
    s = noise * rng.random(N)
    s[peaks] += 1
    return s / s.sum()


def policy_of(kind: str, seed: int) -> tuple[Trace, np.ndarray]:
    """A trace and what the actions really need [C, n].

    forecast works   needs what late layers look at; tokens wander, their saliency wanders with them; shallow is noise
    matching broken  the same, but nothing wanders and all tokens look alike: any match is as good as another
    target wrong     needs what the shallow layer looks at; late saliency is somewhere else
    """
    rng = np.random.default_rng(seed)
    wander = kind == "forecast works"
    offset = int(rng.integers(N)) if wander else 0
    scene = rng.normal(size=(N, 16)) + (100.0 if kind == "matching broken" else 0.0)
    late, shallow, visual = np.zeros((CALLS, N)), np.zeros((CALLS, N)), np.zeros((CALLS, N, 16))
    for t in range(CALLS):
        move = lambda a, t=t: np.roll(a, (t + offset) * wander, axis=0)
        late[t] = move(attention(rng, [2, 9, 17]))
        shallow[t] = attention(rng, rng.choice(N, 3, replace=False))
        fresh = rng.normal(size=(N, 16)) if kind == "matching broken" else 0.05 * rng.normal(size=(N, 16))
        visual[t] = move(scene + fresh)
    need = shallow if kind == "target wrong" else late
    prefix = np.repeat(shallow[:, None], DEPTH - 1, 1)
    expert = np.repeat(late[:, None], DEPTH, 1)[:, None].repeat(2, 1)
    prefix[:, 2:] = late[:, None]  # behind the cuts 1 and 2
    trace = Trace(
        layout=PrefixLayout(("a", "b"), N // 2, 4),
        images=[{}] * CALLS,
        subtask=np.zeros(CALLS, np.int32),
        visual=visual.astype(np.float32),
        alive=np.ones((CALLS, N), bool),
        expert=expert,
        text=prefix,
        last=prefix,
        everyone=prefix,
        probabilities={"expert": 0.5 * expert, "text": 0.5 * prefix, "last": 0.5 * prefix, "all": 0.5 * prefix},
        hidden=np.repeat(visual[:, None], 3, 1).astype(np.float32),
        actions=np.zeros((CALLS, 6, 8), np.float32),
        keys=jax.vmap(jax.random.key)(np.arange(CALLS)),
    )
    return trace, need


def played(kind: str, episodes: int = 6):
    """Rows of all episodes of a synthetic policy; an action is off by the mass of what it needs and does not get."""
    made = {f"e{seed}": policy_of(kind, seed) for seed in range(episodes)}
    means = [{"part": name} | row for name, (trace, _) in made.items() for row in controls.maps(trace, (2,))]
    rows = []
    for name, (trace, need) in made.items():

        def act(_, t, cut, kept, need=need):
            return np.broadcast_to((1 - need[t][kept].sum(1))[:, None, None], (len(kept), 6, 8))

        rows += [
            {"part": name} | row
            for row in controls.measure(trace, controls.priors(means, name), act, cuts=(2,), keep=0.25)
        ]
    return rows


@pytest.fixture(scope="module")
def all_rows():
    return {kind: played(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_names_what_the_policy_was_built_to_be(all_rows, kind):
    errors, parts = controls.collected(all_rows[kind])
    assert len(errors) == 6 and len(parts) == 6 * 10  # a keyframe at the first call and after ten
    for cell in (Cell(2, "visual", "paper"), Cell(2, "all", "expert"), Cell(2, "visual", "prefix")):
        for features in ("Z", "hidden"):
            assert controls.verdict(errors[cell], parts, f"matched {features}").word == kind, (cell, features)
    assert controls.sentence(all_rows[kind]).startswith(f"**{kind}** for `safe` as described (cut 2)")


def test_the_controls_are_what_they_are_called(all_rows):
    errors, _ = controls.collected(all_rows["forecast works"])
    cosines, _ = controls.collected(all_rows["forecast works"], "cosine")
    own, alike = errors[Cell(2, "visual", "paper")], cosines[Cell(2, "visual", "paper")]
    np.testing.assert_allclose(alike["oracle"], 1)
    assert own["oracle"].mean() <= own["matched Z"].mean() < own["same slot"].mean()  # tokens wander
    assert alike["matched Z"].mean() > 0.95 > alike["prior"].mean()
    still, _ = controls.collected(all_rows["matching broken"])
    assert still[Cell(2, "visual", "paper")]["prior"].mean() < still[Cell(2, "visual", "paper")]["matched Z"].mean()
    loss, _ = controls.collected(all_rows["forecast works"], "loss")
    assert loss[Cell(2, "visual", "paper")]["oracle"].mean() < loss[Cell(2, "visual", "paper")]["shallow"].mean()


def test_a_prior_is_the_mean_of_the_other_episodes():
    cell = {"cut": 3, "over": "visual", "target": "paper"}
    rows = [
        {"part": "a", "calls": 1, "map": [1.0, 0.0]} | cell,
        {"part": "b", "calls": 3, "map": [0.0, 1.0]} | cell,
        {"part": "c", "calls": 1, "map": [0.0, 0.0]} | cell,
    ]
    (found,) = controls.priors(rows, "c").values()
    np.testing.assert_allclose(found, [0.25, 0.75])
    with pytest.raises(ValueError, match="at least two episodes"):
        controls.priors(rows[:1], "a")


def test_an_interval_over_episodes_is_wider_than_over_calls():
    """Calls of an episode agree with each other: counted one by one they would say more than they know."""
    parts = [name for name in "abcde" for _ in range(20)]
    effect = np.repeat([0.5, -0.3, 0.4, -0.2, 0.3], 20)
    together = controls.gain(np.zeros(100), effect, parts)
    alone = controls.gain(np.zeros(100), effect, ["a"] * 100)
    assert together.mean == alone.mean == pytest.approx(0.14)
    assert together.low < 0 < alone.low


@pytest.mark.nightly
def test_acting_on_all_tokens_is_the_full_pass_and_on_others_is_not(plain_policy):
    policy = plain_policy
    trace = Watch(policy)(moving_scene(steps=2))
    n = trace.alive.shape[1]
    (everything,) = controls.Acting(policy, 1.0)(trace, 1, 2, np.arange(n)[None])
    np.testing.assert_allclose(everything, trace.actions[1], atol=1e-4)
    halves = controls.Acting(policy, 0.5)(trace, 1, 2, np.arange(n).reshape(n // 2, 2).T)
    errors = np.abs(halves - trace.actions[1]).max((1, 2))
    assert (errors > 1e-4).all() and np.abs(halves[0] - halves[1]).max() > 1e-4


def test_the_command_watches_each_episode_twice_and_goes_on(tmp_path, capsys, monkeypatch):
    demos = [demo(seed=s, steps=9, side=56, every=2) for s in range(2)]
    write_demos(tmp_path / "butter_demo.hdf5", demos)
    args = command.Controls(data=(str(tmp_path / "butter_demo.hdf5"),), out=tmp_path / "out", cuts=(2,), keep=0.25)
    loads, watched = [], []

    class Watching:
        policy = None

        def __init__(self, policy):
            assert policy == "loaded"

        def __call__(self, calls):
            state = next(iter(calls)).request["observation/state"]
            seed = next(i for i, one in enumerate(demos) if np.allclose(one.state[0], state))
            watched.append(seed)
            return policy_of("forecast works", seed)[0]

    def acting(policy, keep):
        assert keep == 0.25
        missed = lambda trace, t, kept: 1 - trace.late()[t, 0][kept].sum(1)
        return lambda trace, t, cut, kept: np.broadcast_to(missed(trace, t, kept)[:, None, None], (len(kept), 6, 8))

    monkeypatch.setattr(recordings, "Watch", Watching)
    monkeypatch.setattr(controls, "Acting", acting)
    command.run_controls(args, lambda: loads.append(1) or "loaded", {"policy": "tiny"})
    rows = read_rows(tmp_path / "out" / "controls.jsonl")
    assert loads == [1] and watched == [0, 1, 0, 1] and len(rows) == 2 * 6 * 6
    assert (tmp_path / "out" / "controls.png").stat().st_size > 5000
    text = (tmp_path / "out" / "controls.md").read_text()
    assert "**forecast works** for `safe` as described (cut 2)" in text and text in capsys.readouterr().out
    others = [policy_of("forecast works", seed)[0].late()[:, [0, -2, -1]].mean((0, 1)) for seed in (0, 1)]
    np.testing.assert_allclose(np.load(tmp_path / "out" / "prior.npy"), np.mean(others, axis=0), atol=1e-6)
    command.run_controls(args, lambda: pytest.fail("nothing is left to compute"), {"policy": "tiny"})
    with pytest.raises(ValueError, match="at least two episodes"):
        command.run_controls(dataclasses.replace(args, limit=1, out=tmp_path / "one"), lambda: "loaded", {})
