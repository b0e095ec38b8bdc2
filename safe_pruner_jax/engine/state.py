"""What the engine reads at a control step, and what it carries to the next."""

from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.pruners.base import State


@struct.dataclass
class Inputs:
    """What the network reads at one control step, padded to a static layout.

    Args:
      images: [B, C, S, S, 3] uint8.
      camera_mask: [B, C] bool.
      tokens: [B, T] int32, padding 0.
      token_mask: [B, T] bool.
      state: [B, action_dim] float32, normalised and padded; only π0 reads it.
    """

    images: Array
    camera_mask: Array
    tokens: Array
    token_mask: Array
    state: Array


def visual_slots(config: Pi0Config, inputs: Inputs) -> int:
    """n, the visual token slots of these inputs."""
    return inputs.images.shape[1] * config.tokens_per_camera


@struct.dataclass
class ControlState:
    """What travels from one control step to the next, every leaf with leading axis B.

    Args:
      pruner: the pruner's own state.
      since_full: [B] int32 steps since the last full pass (0: the last step was one), `NO_HISTORY` before any.
      alive: [B, n] bool visual tokens of the last step; another set makes the history void.
      running: [B, n] bool, those of them that the last step's last cut left; nobody decides on it.
      late: [B, |L_d|, n] float32 late saliency of the last full pass, or step if the plan says so.
      key: [B] PRNG keys.
      past: what `plan.remember` asks for, of the last step.
      actions: [B, A, action_dim] float32 of the last step.
      kv: (k, v) [B, n, K, H] of the visual slots per layer from the cut on, of the last step; () unless reused.
    """

    pruner: State
    since_full: Array
    alive: Array
    running: Array
    late: Array
    key: Array
    past: tuple[Array, ...]
    actions: Array
    kv: tuple[tuple[Array, Array], ...]
