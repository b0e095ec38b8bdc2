"""Where things stand in a training scene: LIBERO's own draw, then objects change places and the arm moves.

    placements = Placements(env)
    placements.shuffle(seed)          a new episode: objects permuted and jittered, basket and arm moved
    placements.shuffle(seed, permute=False)    the same with every object near its usual place
    placements.teleport(generator)    a new picture without physics: hand anywhere, objects under it or in it
    open_env(load_task("libero_object_shuffled", 0))    such scenes as initial states, none of which training has

For suites whose objects stand apart on a table, as LIBERO-Object's do. LIBERO's fixed initial states are not among
them: everything is drawn from a continuous distribution with centimetres of spread.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from safe_pruner_jax.libero.env import LiberoEnv
from safe_pruner_jax.libero.suites import Task, is_shuffled

JITTER = 0.03
"""Standard deviation, metres, of a permuted object's place."""
USUAL_JITTER = 0.01
"""The same of an object near its usual place: what LIBERO's own draw leaves, and as much again."""
RECEPTACLE_JITTER = 0.015
"""The same of the basket, which keeps its place."""
APART = 0.085
"""Metres between the origins of two objects, at least."""
RECEPTACLE = "basket"
"""The kind that things are put into."""
HELD_OUT = 10_000_000
"""Seed of the first scene of a shuffled suite; training's seeds are smaller."""
HELD_OUT_SCENES = 50
"""Initial states per task of a shuffled suite."""
_MARGIN = 0.05  # metres by which the region of the fixed states is grown
_TRIES = 300

Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""Where objects stand now, float64 [objects, 2] in metres → where they stand in a new scene."""


class Placements:
    """Draws scenes for one environment.

    Attributes: `names` of the objects that may be fetched, in the simulator's order.

    Args:
      env: any episode may be running.
      receptacle: prefix of objects that are put into, not fetched.
    """

    def __init__(self, env: LiberoEnv, receptacle: str = RECEPTACLE):
        self._env, self._receptacle = env, receptacle
        model, objects = env.simulator.sim.model, env.simulator.env.objects_dict
        address = lambda name: model.get_joint_qpos_addr(objects[name].joints[0])[0]
        self._places = {name: 1 + address(name) for name in objects if objects[name].joints}
        self.names = [name for name in self._places if not name.startswith(receptacle)]
        self._fixed = [name for name in self._places if name.startswith(receptacle)]
        robot = env.simulator.robots[0]
        self._arm = 1 + np.asarray(robot._ref_joint_pos_indexes)
        self._fingers = 1 + np.asarray(robot._ref_gripper_joint_pos_indexes)
        states = env.init_states[:, [[self._places[n], self._places[n] + 1] for n in self.names]]
        self._low, self._high = states.min((0, 1)) - _MARGIN, states.max((0, 1)) + _MARGIN
        self._positions = 1 + model.nq

    def shuffle(self, seed: int, *, permute: bool = True, arm: float = 0.02) -> None:
        """Starts an episode in which every object stands at another's place, more or less.

        Args:
          seed: of the whole scene, together with the task.
          permute: False leaves every object within a few centimetres of where LIBERO puts it.
          arm: standard deviation, rad, that the arm's joints get.
        """
        env = self._env
        rng = np.random.default_rng([seed, env.task.index])
        env.randomize(seed)
        state = env.simulator.get_sim_state().copy()
        self._mix(state, rng, _exchanged if permute else _near)
        state[self._arm] += rng.normal(0.0, arm, len(self._arm))
        state[self._positions :] = 0
        env.begin(state)

    def teleport(self, rng: np.random.Generator, base: np.ndarray, arms: np.ndarray) -> str | None:
        """Puts everything somewhere else without stepping; returns the object in the hand, if one is there.

        A fifth of the scenes have an object between the fingers, and of the others half have one within 5 cm of the
        hand (in the table's plane).

        Args:
          rng: draws everything.
          base: a settled state of this environment, flattened.
          arms: [n, 7] joint angles that the arm may have, more or less.
        """
        env, sim = self._env, self._env.simulator.sim
        state = base.copy()
        state[self._positions :] = 0
        self._mix(state, rng, _exchanged if rng.random() < 0.6 else self._anywhere)
        state[self._arm] = arms[rng.integers(len(arms))] + rng.normal(0.0, 0.06, len(self._arm))
        half = rng.uniform(0.0, 0.04) if rng.random() < 0.4 else 0.0395
        state[self._fingers] = half, -half
        sim.set_state_from_flattened(state)
        sim.forward()
        site = np.array(sim.data.site_xpos[env.simulator.robots[0].eef_site_id])
        name = self.names[rng.integers(len(self.names))]
        place, held = self._places[name], None
        draw = rng.random()
        if draw < 0.2:
            held = name
            state[place : place + 3] = site + rng.normal(0.0, 0.006, 3) + np.array([0, 0, rng.uniform(-0.03, 0.0)])
            state[self._fingers] = 0.022, -0.022
        elif draw < 0.6:
            state[place : place + 2] = site[:2] + rng.normal(0.0, 0.025, 2)
        sim.set_state_from_flattened(state)
        sim.forward()
        env.look()
        return held

    def arm(self) -> np.ndarray:
        """The arm's joint angles now, float64 [7] in rad."""
        return self._env.simulator.get_sim_state()[self._arm].copy()

    def _mix(self, state: np.ndarray, rng: np.random.Generator, draw: Draw) -> None:
        """Moves objects and receptacle in a flattened state; objects stay `APART` where that can be had."""
        columns = np.array([[self._places[n], self._places[n] + 1] for n in self.names])
        now = new = state[columns]
        for _ in range(_TRIES):
            new = np.clip(draw(rng, now), self._low, self._high)
            gaps = np.linalg.norm(new[:, None] - new[None], axis=-1) + 9 * np.eye(len(new))
            if gaps.min() > APART:
                break
        state[columns] = new
        for name in self._fixed:
            state[self._places[name] : self._places[name] + 2] += rng.normal(0.0, RECEPTACLE_JITTER, 2)

    def _anywhere(self, rng: np.random.Generator, now: np.ndarray) -> np.ndarray:
        return rng.uniform(self._low, self._high, now.shape)


def _near(rng: np.random.Generator, now: np.ndarray) -> np.ndarray:
    return now + rng.normal(0.0, USUAL_JITTER, now.shape)


def _exchanged(rng: np.random.Generator, now: np.ndarray) -> np.ndarray:
    return now[rng.permutation(len(now))] + rng.normal(0.0, JITTER, now.shape)


class ShuffledEnv(LiberoEnv):
    """A task whose objects stand elsewhere every time: initial state k is the k-th held-out scene.

    Args:
      task: of a shuffled suite.
      options: of `LiberoEnv`.
    """

    def __init__(self, task: Task, **options: Any):
        super().__init__(task, **options)
        self.num_init_states = HELD_OUT_SCENES
        self._placements = Placements(self)

    def reset(self, init_state: int) -> dict[str, Any]:
        """Starts an episode in a held-out scene and returns `observe()`.

        Raises:
          ValueError: for an initial state that the task does not have.
        """
        if not 0 <= init_state < self.num_init_states:
            raise ValueError(f"{self.task.name} has initial states 0 to {self.num_init_states - 1}, got {init_state}")
        self._placements.shuffle(HELD_OUT + init_state)
        return self.observe()


def open_env(task: Task, **options: Any) -> LiberoEnv:
    """The environment of a task: LIBERO's own initial states, or held-out scenes for a shuffled suite."""
    return (ShuffledEnv if is_shuffled(task.suite) else LiberoEnv)(task, **options)
