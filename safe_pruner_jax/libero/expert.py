"""A scripted expert for LIBERO's pick-and-place tasks: privileged poses in, one action per control step out.

    env.randomize(seed)
    expert = Expert(env)
    while env.steps < env.max_steps and not env.step(expert.act()).success:
        pass

What to fetch and where to put it is read from the task's goal predicates. The script is a generator over waypoints:
above the object, down, close, lift, above the target, lower, open, retreat. Every action is proportional control
from where the gripper is *now*, so an executed action may differ from the expert's (noise) and the script still
arrives; an object that is not in the hand after lifting is fetched again.

A grasp is chosen among candidates in all directions. Objects narrower than the open hand are enclosed, the
narrowest way first; wider ones (bowls, plates) are taken by the rim. Candidates whose hand or finger would start inside
another object's collision geometry come last.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from safe_pruner_jax.libero.demonstrations import CAMERAS, EXTRA, Demo
from safe_pruner_jax.libero.env import LiberoEnv
from safe_pruner_jax.libero.scene import Scene
from safe_pruner_jax.libero.suites import Task

SUPPORTED: dict[str, tuple[int, ...]] = {
    "libero_object": tuple(range(10)),
    "libero_spatial": tuple(range(10)),
    "libero_goal": (1, 2, 4, 6, 8, 9),
    "libero_10": (0, 1),
}
"""Tasks that the expert solves (docs/demonstrations.md has the rates); others raise `Unsupported`."""

POSITION_GAIN, ORIENTATION_GAIN = 16.0, 2.0  # action per metre, per radian
ORIENTATION_LIMIT = 0.6
OPEN, CLOSED = -1.0, 1.0
CLOSING_STEPS, OPENING_STEPS = 10, 6

# The Panda hand around its grip site, metres: opening, hand's underside above the site, half sizes.
_OPENING = 0.078
_UNDERSIDE = 0.020
_FINGER_GAP = 0.046  # from the site to the middle of an open finger
_PADS = 0.008  # the pads end this far below the site
_MARGIN = 0.004  # collision geometry is grown by this when candidates are tested
_CLEARANCE = 0.04  # between what is carried and what it passes over
_LIFT, _RETREAT = np.array([0, 0, 0.06]), np.array([0, 0, 0.12])
_DIRECTIONS = np.arange(0.0, 2 * np.pi, np.pi / 12)


class Unsupported(ValueError):
    """The task's goal is not one that the script knows how to reach."""


class Grasp(NamedTuple):
    """Where to close the hand: opening direction (rad, in the table's plane), site minus object's origin (m) [3]."""

    yaw: float
    offset: np.ndarray


class Expert:
    """The expert of one episode.

    Attributes: `stage`, the name of the waypoint under way; `scene`, the privileged state.

    Args:
      env: with a running episode; read, never stepped.
      goals: predicates to make true, in this order; None takes the task's.

    Raises:
      Unsupported: for a goal other than putting objects on or into something.
    """

    def __init__(self, env: LiberoEnv, goals: Sequence[tuple[str, ...]] | None = None):
        self._env, self.scene = env, Scene(env)
        if goals is not None:
            self.scene.goals = list(goals)
        for predicate, *names in self.scene.goals:
            playable = predicate in ("on", "in") and self.scene.movable(names[0]) and self.scene.solid(names[1])
            if not playable:
                raise Unsupported(f"{env.task.suite} task {env.task.index} ({env.task.language}): {predicate} {names}")
        self._gripper, self.stage = OPEN, "start"
        self._script = self._play()

    def act(self) -> np.ndarray:
        """The next action from the present state, float64 [7]: translation 3, rotation 3, gripper (1 closed)."""
        return next(self._script)

    def _play(self) -> Iterator[np.ndarray]:
        """The whole script; it goes round until somebody stops asking."""
        while True:
            todo = [goal for goal in self.scene.goals if not self.scene.holds(goal)]
            for _, thing, target in todo[:1]:
                if not self._gripped(thing):
                    yield from self._fetch(thing, self.choose(thing))
                if self.scene.in_hand(thing):
                    yield from self._deliver(thing, target)
            yield from self._hold(1)

    def _gripped(self, thing: str) -> bool:
        """Whether somebody else has left the object in the closed hand, off the table; only before the first action."""
        if self.stage != "start" or not self.scene.in_hand(thing) or not self.scene.lifted(thing):
            return False
        self.stage, self._gripper = "lift", CLOSED
        return True

    def _fetch(self, thing: str, grasp: Grasp) -> Iterator[np.ndarray]:
        scene = self.scene
        at = lambda: scene.position(thing) + grasp.offset
        above = scene.boxes(thing).top + 0.05 + _PADS
        cruise = self._cruise(at(), _PADS, thing)
        self.stage, self._gripper = "rise", OPEN
        if scene.site[2] < cruise and np.linalg.norm((scene.site - at())[:2]) > 0.05:
            yield from self._go(lambda: np.array([*scene.site[:2], cruise]), None, tolerance=0.03)
        self.stage = "approach"
        yield from self._go(lambda: np.array([*at()[:2], max(cruise, above)]), grasp.yaw, tolerance=0.03)
        self.stage = "above"
        yield from self._go(lambda: np.array([*at()[:2], above]), grasp.yaw, tolerance=0.012)
        self.stage = "descend"
        yield from self._go(at, grasp.yaw, tolerance=0.007, patience=40)
        self.stage = "close"
        here = scene.site.copy()
        self._gripper = CLOSED
        yield from self._hold(CLOSING_STEPS, here, grasp.yaw)
        self.stage = "lift"
        yield from self._go(lambda: here + _LIFT, grasp.yaw, tolerance=0.02)

    def _deliver(self, thing: str, target: str) -> Iterator[np.ndarray]:
        scene, yaw = self.scene, self.scene.yaw
        depth = scene.site[2] - scene.boxes(thing).bottom  # of the carried thing below the site
        goal = scene.place(target)
        over = lambda: goal[:2] + (scene.site - scene.position(thing))[:2]
        carried = scene.position(thing) - scene.site
        lost = lambda: np.linalg.norm(scene.position(thing) - scene.site - carried) > 0.03
        cruise = self._cruise(goal, depth, thing)
        yield from self._go(lambda: np.array([*scene.site[:2], cruise]), yaw, tolerance=0.03, until=lost)
        self.stage = "over"
        yield from self._go(lambda: np.array([*over(), cruise]), yaw, tolerance=0.015, until=lost)
        if lost():
            return
        low = goal[2] + depth + 0.004
        walls = scene.around(target).top - _UNDERSIDE + 0.015  # the hand stays above the rim of a basket
        self.stage = "lower"
        arrived = lambda: scene.touching(thing, target) or lost()
        height = max(low, walls) if scene.hollow(target) else low
        yield from self._go(lambda: np.array([*over(), height]), yaw, tolerance=0.006, patience=50, until=arrived)
        self.stage = "open"
        self._gripper = OPEN
        here = scene.site.copy()
        yield from self._hold(OPENING_STEPS, here, yaw)
        self.stage = "retreat"
        yield from self._go(lambda: here + _RETREAT, yaw, tolerance=0.02)

    def _cruise(self, goal: np.ndarray, depth: float, thing: str) -> float:
        """Height of the site, metres, at which the hand passes from where it is to above `goal` without touching."""
        obstacle = self.scene.highest_between(self.scene.site[:2], goal[:2], 0.11, ignore=thing)
        return max(obstacle, goal[2]) + max(depth, _PADS) + _CLEARANCE

    def choose(self, thing: str) -> Grasp:
        """The best candidate: free of collisions, then narrow (or, for rims, with little rotation)."""
        scene = self.scene
        boxes, obstacles = scene.boxes(thing), scene.obstacles(ignore=thing)
        origin, corners = scene.position(thing), boxes.corners.reshape(-1, 3)
        height = max((boxes.top + boxes.bottom) / 2, boxes.top - _UNDERSIDE)
        widths = {yaw: np.ptp(corners[:, :2] @ _direction(yaw)) for yaw in _DIRECTIONS}
        candidates: list[tuple[float, Grasp]] = []
        if min(widths.values()) < _OPENING - 0.004:
            middle = (corners.max(0) + corners.min(0))[:2] / 2
            for yaw, width in widths.items():
                if width < _OPENING - 0.002:
                    point = np.array([*middle, height])
                    candidates.append((20 * width + 0.2 * abs(scene.turn(yaw)), Grasp(yaw, point - origin)))
        else:
            middle = (corners.max(0) + corners.min(0))[:2] / 2
            radius = np.linalg.norm(corners[:, :2] - middle, axis=1).max() - 0.004
            for yaw in _DIRECTIONS:
                edge = middle + radius * _direction(yaw)  # a bowl that leans has its rim higher on one side
                rim = corners[np.argsort(np.linalg.norm(corners[:, :2] - edge, axis=1))[:8], 2].max()
                for inward in (0.0, 0.012, 0.024):
                    point = np.array([*(edge - inward * _direction(yaw)), rim - 0.012])
                    cost = 0.5 * abs(scene.turn(yaw)) + 10 * inward + np.linalg.norm(point - scene.site)
                    candidates.append((cost, Grasp(yaw, point - origin)))
        candidates.sort(key=lambda c: c[0])
        best, chosen = math.inf, candidates[0][1]
        for cost, grasp in candidates:
            if cost >= best:
                break  # collisions only add to the cost
            total = cost + 0.2 * obstacles.count(_hand(origin + grasp.offset, grasp.yaw))
            if total < best:
                best, chosen = total, grasp
        return chosen

    def _go(
        self,
        target: Callable[[], np.ndarray],
        yaw: float | None,
        *,
        tolerance: float,
        patience: int = 50,
        until: Callable[[], bool] = lambda: False,
    ) -> Iterator[np.ndarray]:
        """Moves the site to a (moving) target until it is within `tolerance` metres, or for `patience` steps."""
        for _ in range(patience):
            goal = target()
            if until() or (
                np.linalg.norm(goal - self.scene.site) < tolerance and (yaw is None or abs(self.scene.turn(yaw)) < 0.1)
            ):
                return
            yield self._towards(goal, yaw)

    def _hold(self, steps: int, at: np.ndarray | None = None, yaw: float | None = None) -> Iterator[np.ndarray]:
        for _ in range(steps):
            yield self._towards(self.scene.site if at is None else at, yaw)

    def _towards(self, position: np.ndarray, yaw: float | None) -> np.ndarray:
        move = np.clip(POSITION_GAIN * (position - self.scene.site), -1, 1)
        turn = np.clip(ORIENTATION_GAIN * self.scene.rotation_to(yaw), -ORIENTATION_LIMIT, ORIENTATION_LIMIT)
        return np.array([*move, *turn, self._gripper])


def _direction(yaw: float) -> np.ndarray:
    return np.array([math.cos(yaw), math.sin(yaw)])


def _hand(site: np.ndarray, yaw: float) -> np.ndarray:
    """Points [n, 3] that fill the open hand and its fingers when the site is there."""
    across, along = np.array([*_direction(yaw), 0]), np.array([*_direction(yaw + np.pi / 2), 0])
    grid = lambda a, b, c: np.stack(np.meshgrid(a, b, c, indexing="ij"), -1).reshape(-1, 3)
    palm = grid(np.linspace(-0.104, 0.104, 15), np.linspace(-0.034, 0.034, 5), np.linspace(0.028, 0.12, 5))
    finger = grid(np.linspace(-0.006, 0.006, 3), np.linspace(-0.010, 0.010, 3), np.linspace(-_PADS, 0.02, 4))
    gap = np.array([_FINGER_GAP, 0, 0])
    local = np.concatenate([palm, finger + gap, finger - gap])
    return site + local @ np.stack([across, along, np.array([0, 0, 1.0])])


def demonstrate(
    env: LiberoEnv,
    seed: int,
    *,
    noise: float = 0.0,
    pushes: float = 0.0,
    every: int = 1,
    before: Callable[[LiberoEnv, np.random.Generator], None] = lambda env, generator: None,
) -> tuple[Demo | None, int]:
    """Plays one episode from a random initial state and records it.

    The arm executes the expert's action plus Gaussian noise, the record holds the expert's action: what it would do
    in the state that the noise led to (DART, Laskey et al. 2017). The gripper command is never disturbed.

    Args:
      env: any episode may be running; `env.task` must be one that the expert plays.
      seed: decides the initial state and the noise; the same seed gives the same episode.
      noise: standard deviation of what is added to the six motion commands, which are in [-1, 1].
      pushes: how often, per 100 steps, the arm is pushed aside for 2 to 6 steps (`Pushes`). Noise keeps within
        millimetres of the expert's path; a push leads centimetres away from it, or out of the grasp.
      every: both cameras are rendered at every so many-th step, which is most of the cost.
      before: plays on its own first, unrecorded; the expert takes over where it has led (`led_by`).

    Returns:
      The demonstration, None if the episode did not succeed or was over before the expert's turn; the number of steps.
    """
    env.randomize(seed)
    generator, rows = np.random.default_rng([seed, env.task.index, 1]), []
    before(env, generator)
    if not env.running:
        return None, env.steps
    expert, push = Expert(env), Pushes(pushes / 100, generator)
    images: dict[str, list[np.ndarray]] = {key: [] for key in CAMERAS}
    success, done = False, False
    while not done:
        if len(rows) % every == 0:
            observation = env.observe()
            for key, frames in images.items():
                frames.append(observation[key])
        action = expert.act()
        rows.append((env.proprioception(), action, expert.scene.proprioception()))
        disturbed = action + noise * np.append(generator.standard_normal(6), 0.0)
        disturbed[:3] += push()
        success, done = env.step(np.clip(disturbed, -1, 1))
    return _recording(env.task, images, rows, seed, every) if success else None, env.steps


def _recording(task: Task, images: Mapping[str, list], rows: list[tuple], seed: int, every: int) -> Demo:
    """The demonstration of frames by camera and rows of (state, action, privileged state)."""
    state, actions, extra = zip(*rows, strict=True)
    return Demo(
        images={key: np.stack(frames) for key, frames in images.items()},
        state=np.stack(state).astype(np.float32),
        actions=np.stack(actions).astype(np.float32),
        prompt=task.language,
        suite=task.suite,
        task=task.index,
        name=task.name,
        seed=seed,
        every=every,
        extra={key: np.stack([more[key] for more in extra]) for key in EXTRA},
    )


class Pushes:
    """What is added to the translation command, call by call: mostly nothing, now and then a push of some steps.

    Args:
      rate: probability that one begins, per step.
      generator: draws when, how long (2 to 6 steps), how hard (0.5 to 1 of the command range) and where to.
    """

    def __init__(self, rate: float, generator: np.random.Generator):
        self._rate, self._generator, self._left, self._push = rate, generator, 0, np.zeros(3)

    def __call__(self) -> np.ndarray:
        """Of the next step, [3]."""
        if self._left == 0 and self._rate > 0 and self._generator.random() < self._rate:
            direction = self._generator.standard_normal(3)
            self._push = self._generator.uniform(0.5, 1.0) * direction / np.linalg.norm(direction)
            self._left = int(self._generator.integers(2, 7))
        if self._left == 0:
            return np.zeros(3)
        self._left -= 1
        return self._push


def led_by(
    policy: Callable[[dict], Mapping[str, Any]], *, steps: tuple[int, int] = (20, 200), replan: int = 5
) -> Callable[[LiberoEnv, np.random.Generator], None]:
    """`before` of `demonstrate`: a policy plays for a random number of steps, so that the expert shows the way out.

    States that a policy reaches by its own mistakes are not in a demonstration of somebody who makes none. The expert
    is recorded from the hand-over on (as in HG-DAgger, Kelly et al. 2019; the moment is random).

    Args:
      policy: request to reply with "actions" [≥ replan, 7]; it is told where episodes begin by "reset" and "seed".
      steps: fewest and most control steps; drawn per episode.
      replan: actions executed per call.
    """

    def play(env: LiberoEnv, generator: np.random.Generator) -> None:
        length = int(generator.integers(steps[0], steps[1] + 1))
        start = {"reset": True, "seed": int(generator.integers(2**31))}
        while env.running and env.steps < length:
            actions = np.asarray(policy(env.observe() | start)["actions"])
            start = {}
            for action in actions[: min(replan, length - env.steps)]:
                if env.step(np.clip(action, -1, 1)).done:
                    break

    return play
