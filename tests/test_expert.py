"""The scripted expert: its geometry on numbers, its episodes in the simulator."""

import itertools

import numpy as np
import pytest

from safe_pruner_jax.libero.demonstrations import read_demos, write_demos
from safe_pruner_jax.libero.env import SUITES, LiberoEnv, load_task
from safe_pruner_jax.libero.expert import SUPPORTED, Expert, Pushes, Unsupported, demonstrate, led_by
from safe_pruner_jax.libero.scene import Boxes, _rotation

pytestmark = pytest.mark.newest


def test_boxes():
    turned = _rotation(np.array([0, 0, np.pi / 4]))
    boxes = Boxes(np.array([[1.0, 0, 0.5]]), np.array([[0.2, 0.1, 0.05]]), turned[None])
    assert (round(boxes.top, 9), round(boxes.bottom, 9)) == (0.55, 0.45)
    assert np.ptp(boxes.corners[0, :, 0]) == pytest.approx(0.6 / np.sqrt(2))
    along = np.array([1.0, 0, 0.5]) + 0.19 * turned[:, 0]
    across = np.array([1.0, 0, 0.5]) + 0.19 * turned[:, 1]
    assert boxes.count(np.stack([along, across])) == 1
    assert boxes.count(across[None], margin=0.1) == 1


def test_rotation_vectors():
    np.testing.assert_allclose(_rotation(np.array([0, 0, np.pi / 2])) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_array_equal(_rotation(np.zeros(3)), np.eye(3))


def test_supported_names_suites():
    assert set(SUPPORTED) <= set(SUITES) and SUPPORTED["libero_object"] == tuple(range(10))


@pytest.fixture(scope="module")
def env():
    with LiberoEnv(load_task("libero_object", 6), image_size=32, observed_size=16) as env:
        yield env


@pytest.mark.nightly
@pytest.mark.libero
def test_the_expert_solves_an_object_task_without_cameras(env):
    env.randomize(0)
    expert, done = Expert(env), False
    while not done:
        success, done = env.step(expert.act())
    assert success and env.steps < 160


@pytest.mark.nightly
@pytest.mark.libero
def test_random_initial_states_are_not_the_fixed_ones_and_repeat(env):
    objects = slice(10, 17)  # time, 9 robot joints, then the first object's pose
    drawn = []
    for seed in range(3):
        env.randomize(seed)
        drawn.append(env.simulator.get_sim_state())
    fixed = env._init_states
    assert len(fixed) == 50
    for state in drawn:
        assert np.abs(fixed[:, 1:8] - state[1:8]).max(1).min() > 1e-4
        assert np.abs(fixed[:, objects] - state[objects])[:, :2].max(1).min() > 1e-6
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    env.randomize(0)
    np.testing.assert_array_equal(env.simulator.get_sim_state(), drawn[0])


@pytest.mark.nightly
@pytest.mark.libero
def test_a_fixed_initial_state_is_the_same_after_a_random_one(env):
    def state():
        env.reset(2)
        return env.simulator.get_sim_state()

    before = state()
    env.randomize(5)
    np.testing.assert_array_equal(state(), before)


@pytest.mark.nightly
@pytest.mark.libero
def test_a_demonstration_records_the_expert_not_the_noise(env, tmp_path, monkeypatch):
    frames = itertools.count()  # rendering is tests/test_libero.py's subject, and nine tenths of an episode's time
    monkeypatch.setattr(env, "render", lambda camera: np.full((16, 16, 3), next(frames) % 256, np.uint8))
    demo, steps = demonstrate(env, 1, noise=0.08)
    assert demo is not None and len(demo) == steps
    assert demo.images["observation/image"].shape == (steps, 16, 16, 3)
    assert (demo.suite, demo.task, demo.seed, demo.prompt) == ("libero_object", 6, 1, env.task.language)
    assert set(np.unique(demo.actions[:, 6])) == {-1.0, 1.0} and np.abs(demo.actions).max() <= 1
    assert demo.extra["states"].shape[0] == steps and demo.extra["robot_states"].shape == (steps, 9)
    np.testing.assert_allclose(demo.extra["robot_states"][:, 2:5], demo.state[:, :3], atol=0.02)
    write_demos(tmp_path / "a.hdf5", [demo])
    assert list(demo.images["observation/image"][:3, 0, 0, 0]) == [0, 2, 4]
    (read,) = read_demos(tmp_path / "a.hdf5")
    np.testing.assert_array_equal(read.images["observation/wrist_image"], demo.images["observation/wrist_image"])
    again, _ = demonstrate(env, 1, noise=0.08, every=4)
    np.testing.assert_array_equal(again.state, demo.state)
    assert len(again.images["observation/image"]) == -(-steps // 4)
    env.randomize(1)
    np.testing.assert_array_equal(Expert(env).act().astype(np.float32), demo.actions[0])
    for action in demo.actions[:5]:
        env.step(action)
    assert np.abs(env.observe()["observation/state"] - demo.state[5]).max() > 1e-4


@pytest.fixture
def dark(env, monkeypatch):
    """The same environment without pictures, which are nine tenths of an episode's time."""
    monkeypatch.setattr(env, "render", lambda camera: np.zeros((16, 16, 3), np.uint8))
    return env


@pytest.mark.nightly
@pytest.mark.libero
def test_the_expert_takes_over_where_a_policy_has_led(dark):
    asked = []

    def away(request):  # to the side, with the hand closed
        asked.append(request)
        return {"actions": np.tile([0.0, 0.5, 0.0, 0, 0, 0, 1], (10, 1))}

    demo, steps = demonstrate(dark, 3, before=led_by(away, steps=(23, 23)))
    assert demo is not None and len(demo) == steps - 23
    assert len(asked) == 5 and asked[0]["reset"] and "reset" not in asked[1]
    straight, _ = demonstrate(dark, 3)
    assert demo.state[0, 1] > straight.state[0, 1] + 0.05
    assert demo.actions[0, 6] == -1  # the hand opens first
    again, _ = demonstrate(dark, 3, before=led_by(away, steps=(23, 23)))
    np.testing.assert_array_equal(again.state, demo.state)


def test_pushes_are_rare_short_and_strong():
    push = Pushes(0.03, np.random.default_rng(0))
    sizes = np.linalg.norm([push() for _ in range(20_000)], axis=1)
    assert sizes[sizes > 0].min() >= 0.5 and sizes.max() <= 1
    pushes = [len(list(steps)) for size, steps in itertools.groupby(sizes) if size > 0]  # each has a size of its own
    assert set(pushes) == {2, 3, 4, 5, 6}
    assert len(pushes) == pytest.approx(20_000 * 0.03 / (1 + 0.03 * 3), rel=0.15)


def test_without_pushes_nothing_is_drawn():
    generator = np.random.default_rng(0)
    push = Pushes(0.0, generator)
    assert not any(push().any() for _ in range(9)) and generator.random() == np.random.default_rng(0).random()


@pytest.mark.nightly
@pytest.mark.libero
def test_the_expert_comes_back_after_pushes(dark):
    straight, _ = demonstrate(dark, 3)
    pushed, _ = demonstrate(dark, 3, pushes=6)
    assert pushed is not None and len(pushed) > len(straight)
    ends = slice(0, len(straight))
    assert np.abs(pushed.state[ends, :3] - straight.state[:, :3]).max() > 0.02


class Solver:
    """A policy that is the expert itself, one action per call."""

    def __init__(self, env):
        self.env, self.expert = env, None

    def __call__(self, request):
        self.expert = Expert(self.env) if request.get("reset") else self.expert
        return {"actions": self.expert.act()[None]}


@pytest.mark.nightly
@pytest.mark.libero
def test_an_object_that_is_already_in_the_hand_is_not_put_down(dark):
    solver, found = Solver(dark), {}

    def before(env, generator):
        led_by(solver, steps=(70, 70), replan=1)(env, generator)
        thing = solver.expert.scene.goals[0][1]
        found.update(stage=solver.expert.stage, held=solver.expert.scene.lifted(thing))

    demo, _ = demonstrate(dark, 3, before=before)
    assert found == {"stage": "over", "held": True}
    assert demo is not None and demo.actions[0, 6] == 1


@pytest.mark.nightly
@pytest.mark.libero
def test_nothing_is_recorded_when_the_policy_needs_no_help(dark):
    demo, steps = demonstrate(dark, 3, before=led_by(Solver(dark), steps=(250, 250), replan=1))
    assert demo is None and steps < 250


@pytest.mark.nightly
@pytest.mark.libero
@pytest.mark.parametrize("goal", [("open", "drawer"), ("on", "butter_1", "floor_bin_region")])
def test_other_goals_are_refused(env, monkeypatch, goal):
    monkeypatch.setitem(env.simulator.env.parsed_problem, "goal_state", [goal])
    with pytest.raises(Unsupported, match=f"pick up the butter.*{goal[0]}"):
        Expert(env)
