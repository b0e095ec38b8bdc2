"""A model server for vla-eval, allenai's evaluation harness: `openpi serve --protocol vla-eval`.

    openpi serve --protocol vla-eval --pruner=safe policy:embedded
    vla-eval run --config configs/benchmarks/libero/object.yaml --server-url ws://localhost:8000

The harness' own server speaks its protocol and batches (`max_batch_size`, `max_wait_time`); here is what it calls. One
session is one robot, and each of its episodes begins with an empty memory. The package `vla-eval` is an extra.
Reference: vla-eval 0.8, model_servers/predict.py (interface), model_servers/pi0.py (how openpi's π0 reads LIBERO).
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import serve
from vla_eval.specs import GRIPPER_CLOSE_POS, IMAGE_RGB, LANGUAGE, POSITION_DELTA, RAW, ROTATION_AA

from safe_pruner_jax.serving.backend import Backend

__all__ = ["PolicyServer", "serve"]

IMAGES = ("observation/image", "observation/wrist_image")
"""Image entries of a LIBERO request, in the order in which the harness sends its cameras."""


class PolicyServer(PredictModelServer):
    """A backend behind the harness' interface; it is warm when this returns.

    Args:
      backend: of a LIBERO policy.
      chunk_size: actions executed per policy call.
      max_wait_time: how long a request waits for others to join its step, seconds.
    """

    def __init__(self, backend: Backend, *, chunk_size: int = 5, max_wait_time: float = 0.01):
        super().__init__(chunk_size=chunk_size, max_batch_size=backend.limit, max_wait_time=max_wait_time)
        self._backend = backend
        backend.warmup()

    def predict_batch(self, obs_batch: Sequence[dict[str, Any]], ctx_batch: Sequence[Any]) -> list[dict[str, Any]]:
        """One device step for each group of observations that can share one.

        Args:
          obs_batch: the harness' observations: `images` camera → uint8 [H, W, 3], `states` [8], `task_description`.
          ctx_batch: their sessions.

        Returns:
          `actions` [A, 7] and, of a pruner, `pruning`, for each.

        Raises:
          ValueError: an observation without the cameras or the state that LIBERO policies read.
        """
        prepared = [
            (ctx.session_id, self._backend.prepare(ctx.session_id, request(obs, reset=ctx.is_first)))
            for obs, ctx in zip(obs_batch, ctx_batch, strict=True)
        ]
        groups: dict[Hashable, list[int]] = {}
        for place, (_, one) in enumerate(prepared):
            groups.setdefault(one.group, []).append(place)
        replies: dict[int, dict[str, Any]] = {}
        for places in groups.values():
            for place, result in zip(places, self._backend.step([prepared[p] for p in places]), strict=True):
                if result.error is not None:
                    raise result.error
                assert result.reply is not None, "a result is a reply or an error"
                replies[place] = {"actions": np.asarray(result.reply["actions"], np.float32)}
        return [replies[place] for place in range(len(prepared))]

    def get_observation_params(self) -> dict[str, Any]:
        """What the harness' LIBERO shall send: both cameras and the state."""
        return {"send_wrist_image": True, "send_state": True}

    def get_action_spec(self) -> dict[str, Any]:
        """Motion of the hand, as LIBERO's controller takes it; the gripper closes at 1."""
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, Any]:
        """Pictures, state and instruction."""
        return {"image": IMAGE_RGB, "state": RAW, "language": LANGUAGE}


def request(obs: dict[str, Any], *, reset: bool) -> dict[str, Any]:
    """openpi's request of an observation of the harness. Raises ValueError."""
    images = list((obs.get("images") or {}).values())
    state = obs.get("states", obs.get("state"))
    if len(images) < len(IMAGES) or state is None:
        got = f"{len(images)} cameras and {'no state' if state is None else 'a state'}"
        raise ValueError(
            f"observation: expected {len(IMAGES)} cameras and a state, got {got}; "
            "set send_wrist_image and send_state of the benchmark"
        )
    pictures = {key: np.ascontiguousarray(image, np.uint8) for key, image in zip(IMAGES, images, strict=False)}
    state = np.asarray(state, np.float64)
    return {**pictures, "observation/state": state, "prompt": str(obs.get("task_description", "")), "reset": reset}
