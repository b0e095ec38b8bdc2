"""Suites whose scenes are drawn anew, and the environment of any task.

    open_env(load_task("libero_object_shuffled", 0))    initial state k is the k-th held-out scene
    open_env(load_task("libero_object", 0))             LIBERO's own initial states

Training has none of the held-out scenes.
"""

from typing import Any

from safe_pruner_jax.libero.env import LiberoEnv
from safe_pruner_jax.libero.labels import twins
from safe_pruner_jax.libero.placements import Placements
from safe_pruner_jax.libero.relations import Relations
from safe_pruner_jax.libero.suites import Task, is_shuffled

HELD_OUT = 10_000_000
"""Seed of the first scene of a shuffled suite; training's seeds are smaller."""
HELD_OUT_SCENES = 50
"""Initial states per task of a shuffled suite."""


def draw_for(env: LiberoEnv) -> Placements:
    """What draws scenes for an environment: by relations where a scene has two of a kind.

    Raises:
      ValueError: the task is not to put one object somewhere, or its scenes are none that can be drawn.
    """
    return (Relations if twins(env.task.suite) else Placements)(env)


class ShuffledEnv(LiberoEnv):
    """A task whose objects stand elsewhere every time: initial state k is the k-th held-out scene.

    Args:
      task: of a shuffled suite.
      options: of `LiberoEnv`.
    """

    def __init__(self, task: Task, **options: Any):
        super().__init__(task, **options)
        self.num_init_states = HELD_OUT_SCENES
        self._placements = draw_for(self)

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
