"""LIBERO as openpi's client plays it, with the cameras rendered only when somebody looks.

    with LiberoEnv(load_task("libero_spatial", 0)) as env:
        episode = rollout(env, policy, init_state=0)        # policy: request -> {"actions": [AH, 7], ...}

Software rendering is most of the cost of a step, and a policy that acts on chunks looks once per chunk. But robosuite
reads its sensors *during* a control step: a picture taken after it is a few milliseconds newer than the client's.
So `LiberoEnv` notes where everything is at the moment at which the cameras would have been read (MuJoCo's abstract
scenes, 0.1 ms) and makes pixels of it in `observe` and `render`. Frames and states equal the client's bit for bit.

The simulator is an optional extra (docs/libero.md); importing this module does not need it.
Reference: openpi, examples/libero/main.py (protocol, limits, request keys).
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from safe_pruner_jax.libero.cameras import CAMERAS, Cameras
from safe_pruner_jax.libero.meshes import decimate
from safe_pruner_jax.libero.simulator import OPENGL, LiberoUnavailable, one_line, simulator
from safe_pruner_jax.libero.suites import LIMITS, SUITES, Task, load_init_states, load_task, num_tasks, package, parent
from safe_pruner_jax.robots.transforms import resize_with_pad

REST = (0.0,) * 6 + (-1.0,)  # stand still, gripper open

_JOINT_NOISE = 0.02  # rad; standard deviation of the arm's joints over LIBERO's fixed initial states

__all__ = [
    "LIMITS",
    "REST",
    "SUITES",
    "LiberoEnv",
    "StepResult",
    "Task",
    "axis_angle",
    "load_task",
    "num_tasks",
    "parent",
]

logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """What a control step led to: the task is solved; the episode is over (solved, or out of steps)."""

    success: bool
    done: bool


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation vector, float64 [3] in radians, of a unit quaternion [4] (x y z w); its angle is in [0, 2π]."""
    w = min(1.0, max(-1.0, float(quaternion[3])))
    sine = math.sqrt(1.0 - w * w)
    return np.zeros(3) if sine == 0.0 else np.asarray(quaternion[:3], np.float64) * 2.0 * math.acos(w) / sine


class LiberoEnv:
    """One task in the simulator. Holds an OpenGL context: use it from one thread, and close it.

    Several may live in one process, but not beside environments that render through robosuite: those draw into, and
    on closing delete from, whichever context is current.

    Attributes: `task`, `max_steps`, `steps` (executed since the reset), `num_init_states` (50 in LIBERO's suites),
    and `simulator`, LIBERO's own environment for whoever needs privileged state; None once closed.

    Args:
      task: from `load_task`.
      image_size: pixels per side of the rendered frames.
      observed_size: pixels per side of the images for the policy.
      seed: with the initial state's index it decides where the fixtures stand (within 2 cm).
      wait: steps of REST after a reset, while the objects settle; they do not count.
      max_steps: per episode; the suite's limit if None.
      coarse: whether pictures are drawn fast, from decimated meshes (`meshes.decimate`) and without multisampling: for
        training, never for evaluation.

    Raises:
      LiberoUnavailable: without the simulator or software OpenGL.
    """

    def __init__(
        self,
        task: Task,
        *,
        image_size: int = 256,
        observed_size: int = 224,
        seed: int = 7,
        wait: int = 10,
        max_steps: int | None = None,
        coarse: bool = False,
    ):
        self._lib = lib = simulator(package(task.suite))
        self.task, self.steps = task, 0
        self.max_steps = LIMITS[parent(task.suite)] if max_steps is None else max_steps
        self._init_states = load_init_states(task.suite, task.index)
        self.num_init_states = len(self._init_states)
        self._observed_size, self._wait = observed_size, wait
        self._seen, self._running = None, False  # robosuite's last observation; whether step() may be called
        # Entry k: numpy's global generator before reset k of openpi's client, which seeds it once per task.
        self._generators = [np.random.RandomState(seed).get_state()]
        with _global_generator(self._generators[0]):
            self.simulator = lib.ControlEnv(
                bddl_file_name=str(task.bddl),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                hard_reset=False,  # a hard one rebuilds the model: 2-5 s
                horizon=self.max_steps + wait + 1,
            )
        self._cameras = self._open_cameras(image_size, coarse)
        robosuite_env = self.simulator.env
        watch = lib.sensor(modality="image")(lambda _cache: self._watch())
        observable = lib.Observable("watch", watch, sampling_rate=robosuite_env.control_freq, active=False)
        robosuite_env.add_observable(observable)

    def _open_cameras(self, image_size: int, coarse: bool) -> Cameras:
        """What renders; without OpenGL the simulator is closed. Raises LiberoUnavailable."""
        try:
            model = self.simulator.sim.model._model
            if coarse:
                decimate(model)
                model.vis.quality.offsamples = 0
            return Cameras(self._lib.mujoco, model, image_size)
        except (ImportError, AttributeError, OSError, RuntimeError, self._lib.mujoco.FatalError) as error:
            self.simulator.close()
            raise LiberoUnavailable(f"no software OpenGL ({one_line(error)}): {OPENGL}") from error

    @property
    def running(self) -> bool:
        """Whether an episode is under way, so that `step` may be called."""
        return self._running

    def reset(self, init_state: int) -> dict[str, Any]:
        """Starts an episode from a fixed initial state, lets the objects settle, returns `observe()`.

        Whatever was played before, the episode is the one that openpi's client plays as its `init_state`-th trial.

        Raises:
          ValueError: for an initial state that the task does not have.
        """
        if self.simulator is None:
            raise RuntimeError("the environment is closed")
        if not 0 <= init_state < self.num_init_states:
            raise ValueError(f"{self.task.name} has initial states 0 to {self.num_init_states - 1}, got {init_state}")
        for k in range(min(init_state, len(self._generators) - 1), init_state + 1):
            with _global_generator(self._generators[k]) as state_now:
                self._soft_reset()
                self._generators[k + 1 :] = self._generators[k + 1 :] or [state_now()]
        self._start(self._init_states[init_state])
        return self.observe()

    def randomize(self, seed: int) -> None:
        """Starts an episode from a new initial state and lets the objects settle; renders nothing.

        LIBERO's own sampler places objects and fixtures, and the arm's joints get the Gaussian noise that the fixed
        initial states have (0.02 rad). The episode depends on seed and task alone, not on what was played before.

        Args:
          seed: ≥ 0; no seed reproduces a fixed initial state.
        """
        if self.simulator is None:
            raise RuntimeError("the environment is closed")
        generator = np.random.RandomState([seed, SUITES.index(parent(self.task.suite)), self.task.index])
        model, env = self.simulator.sim.model, self.simulator.env
        for fixture in env.fixtures_dict.values():  # the sampler adds a fixture's new place to where its parts are now
            body = model.body_name2id(fixture.root_body)
            model.body_pos[body], model.body_quat[body] = (0, 0, 0), (1, 0, 0, 0)  # as in a rebuilt model
        with _global_generator(generator.get_state()):
            self._soft_reset()
        state = self.simulator.get_sim_state()  # time, positions, velocities
        joints = 1 + np.asarray(self.simulator.robots[0]._ref_joint_pos_indexes)
        state[joints] += generator.normal(0.0, _JOINT_NOISE, len(joints))
        self._start(state)

    def step(self, action: np.ndarray) -> StepResult:
        """Executes one action (50 ms of simulated time) without rendering.

        Args:
          action: [7]; translation 3, rotation 3, gripper (-1 open, 1 closed); clipped to [-1, 1] by the controller.

        Raises:
          ValueError: for another shape, or values that are not finite.
          RuntimeError: before the first reset and after the end of an episode.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers, got {action}")
        if not self._running:
            raise RuntimeError("no episode is running: call reset()")
        self._seen, _, success, _ = self.simulator.step(action.tolist())
        self.steps += 1
        self._running = not success and self.steps < self.max_steps
        return StepResult(bool(success), not self._running)

    def advance(self, action: np.ndarray) -> None:
        """`step` without an episode: no success, no limit; for labels and for goals other than the task's."""
        self._seen, *_ = self.simulator.step(np.asarray(action, np.float64).tolist())
        self.simulator.env.done = False
        self.steps += 1

    def look(self) -> None:
        """What `render` shows is now the simulator's present state, also between steps."""
        self._cameras.look(self.simulator.sim.data._data)
        self._seen = self._seen if self._seen is not None else {}

    @property
    def init_states(self) -> np.ndarray:
        """The fixed initial states, flattened: float64 [num_init_states, 1 + nq + nv]."""
        return self._init_states

    @property
    def progress(self) -> tuple[Any, ...]:
        """What this class itself remembers of an episode; see `snapshot`."""
        return self._seen, self.steps, self._running

    @progress.setter
    def progress(self, values: tuple[Any, ...]) -> None:
        self._seen, self.steps, self._running = values

    def begin(self, state: np.ndarray, *, reset: bool = True) -> None:
        """Starts an episode in a flattened simulator state (time, positions, velocities); the objects settle.

        A reset draws anew where the fixtures stand; without one they stay, and the gripper's command, too.
        """
        if reset:
            self._soft_reset()
        self.simulator.env.timestep, self.simulator.env.done = 0, False
        self._start(state)

    def observe(self) -> dict[str, Any]:
        """Renders both cameras; returns the request that openpi's client would send now.

        Raises:
          RuntimeError: before the first reset, and when closed.

        Returns:
          "observation/image", "observation/wrist_image": uint8 [observed_size, observed_size, 3], rotated by 180°.
          "observation/state": float64 [8], end-effector position (m) 3, rotation vector (rad) 3, fingers (m) 2.
          "prompt": the task's language.
        """
        size = self._observed_size
        images = {key: resize_with_pad(self.render(camera), size, size) for key, camera in CAMERAS.items()}
        return {**images, "observation/state": self.proprioception(), "prompt": self.task.language}

    def proprioception(self) -> np.ndarray:
        """`observe()["observation/state"]` alone, without rendering: float64 [8]."""
        if self._seen is None:
            raise RuntimeError("there is nothing to sense: call reset()")
        pose = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        position, quaternion, fingers = (self._seen[key] for key in pose)
        return np.concatenate([position, axis_angle(quaternion), fingers])

    def render(self, camera: str = "agentview") -> np.ndarray:
        """One camera's frame at the last step, rotated by 180°: uint8 [image_size, image_size, 3]."""
        if self._seen is None:
            raise RuntimeError("there is nothing to see: call reset()")
        return np.ascontiguousarray(self._cameras.frame(camera)[::-1, ::-1])

    def segment(self, camera: str, classes: np.ndarray, size: int) -> np.ndarray:
        """Class of what every pixel of `render` shows, the nearest of every few pixels: uint8 [size, size].

        Args:
          camera: as in `render`.
          classes: uint8 [geometries]; 0 where nothing is.
          size: pixels per side of the result.
        """
        ids = self._cameras.identities(camera)[::-1, ::-1]
        at = (np.arange(size) * 2 + 1) * len(ids) // (2 * size)
        ids = ids[np.ix_(at, at)]
        return np.where(ids < 0, 0, classes[ids]).astype(np.uint8)

    def close(self) -> None:
        """Frees the simulator and its OpenGL context; may be called again."""
        if self.simulator is not None:
            self._cameras.close()
            self.simulator.close()
            self.simulator, self._seen, self._running = None, None, False

    def __enter__(self) -> "LiberoEnv":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _watch(self) -> np.ndarray:
        """The sensor that robosuite calls exactly when it would have read the cameras."""
        self._cameras.look(self.simulator.sim.data._data)
        return np.zeros(1)

    def _start(self, state: np.ndarray) -> None:
        """Begins an episode in a flattened simulator state, after a soft reset."""
        self._seen = self.simulator.set_init_state(state)
        for _ in range(self._wait):
            self._seen, *_ = self.simulator.step(list(REST))
        self.steps, self._running = 0, True

    def _soft_reset(self) -> None:
        """Resets without rebuilding the model, to the state that a rebuilt one has."""
        env = self.simulator.env  # LIBERO's wrapper would swallow every exception of reset, and try for ever
        for _ in range(100):
            with contextlib.suppress(self._lib.RandomizationError):  # the fixtures did not fit: draw again
                env.reset()
                break
        else:
            raise RuntimeError(f"{self.task.name}: no placement of the fixtures in 100 draws")
        for robot in env.robots:  # the gripper integrates its commands, and a soft reset forgets to clear them
            robot.gripper.current_action = np.zeros(robot.gripper.dof)


@contextlib.contextmanager
def _global_generator(state: Any) -> Iterator[Callable[[], Any]]:
    """Puts numpy's global generator, from which robosuite draws, into a state for a while; yields its reader."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.set_state(state)  # noqa: NPY002
    try:
        yield np.random.get_state
    finally:
        np.random.set_state(before)  # noqa: NPY002
