"""From raw requests to replies: `Policy` is shared and stateless, `Session` is one robot's episode.

    policy = load_policy("pi05_libero", "gs://…", pruner=safe(keep=0.2))
    session = policy.session()
    reply = session.infer(request)        # openpi's request and reply, plus reply["pruning"]

`Session` is the one mutable object of the project: it holds the control state between control steps, and starts
afresh on `"reset": True`, on a changed prompt and on a changed set of cameras.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from safe_pruner_jax.engine import ControlState, Engine, Inputs
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.observation import Example
from safe_pruner_jax.pruners.base import Selection
from safe_pruner_jax.tokens import PROMPT_LENGTHS, PrefixLayout, smallest_layout

logger = logging.getLogger(__name__)


class Transform(Protocol):
    """The border between one robot's client and the network, see `configs.RobotIO`."""

    config: Any  # has `robot.example(rng)`, a valid request

    def prepare(self, request: dict) -> tuple[Example, Any]:
        """Request → network input of one robot, and what `finish` needs later."""

    def finish(self, actions: np.ndarray, context: Any) -> dict:
        """Network actions [A, action_dim] → reply."""


def layout_of(example: Example, config: Pi0Config, prompt_lengths: Sequence[int] = PROMPT_LENGTHS) -> PrefixLayout:
    """The smallest static layout that holds an example without dead cameras."""
    return smallest_layout(
        example.image_mask,
        len(example.tokens),
        cameras=config.cameras,
        tokens_per_camera=config.tokens_per_camera,
        max_token_len=config.max_token_len,
        prompt_lengths=tuple(prompt_lengths),
    )


def all_slots(config: Pi0Config) -> PrefixLayout:
    """openpi's own layout: every camera and every prompt slot, dead or not."""
    return PrefixLayout(config.cameras, config.tokens_per_camera, config.max_token_len)


def pack(examples: Sequence[Example], layout: PrefixLayout) -> Inputs:
    """Examples of several robots, padded to one layout, as NumPy arrays with leading axis B."""
    B, T = len(examples), layout.text
    tokens, mask = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    for row, e in enumerate(examples):
        tokens[row, : len(e.tokens)] = e.tokens
        mask[row, : len(e.tokens)] = True
    return Inputs(
        images=np.stack([[e.images[c] for c in layout.cameras] for e in examples]),
        camera_mask=np.array([[e.image_mask.get(c, False) for c in layout.cameras] for e in examples]),
        tokens=tokens,
        token_mask=mask,
        state=np.stack([e.state for e in examples]),
    )


class Policy:
    """An engine behind one robot's transforms; safe to share between sessions.

    Args:
      engine: model and pruner.
      transform: the robot's border.
      prompt_lengths: static prompt lengths. A prompt that is longer than all of them runs at the model's
        `max_token_len`, which is then compiled when it is first needed.
      seed: seed of the noise; every session starts from it, as openpi's server does.
      describe: add the `pruning` dictionary to replies; False gives exactly openpi's reply.
      metadata: what the server tells a client on connection.
    """

    def __init__(
        self,
        engine: Engine,
        transform: Transform,
        *,
        prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
        seed: int = 0,
        describe: bool = True,
        metadata: dict | None = None,
    ):
        self.engine, self.transform = engine, transform
        self.prompt_lengths = tuple(prompt_lengths)
        self.seed, self.describe = seed, describe
        self.metadata = dict(metadata or {})

    def session(self) -> "Session":
        """A fresh episode of one robot."""
        return Session(self)

    def warmup(self) -> None:
        """Compiles and runs every program of `prompt_lengths` for one robot with its usual cameras."""
        config = self.engine.config
        request = self.transform.config.robot.example(np.random.default_rng(0))
        example, _ = self.transform.prepare(request | {"prompt": "warm up"})
        cameras = layout_of(example, config).cameras
        for text in sorted({min(t, config.max_token_len) for t in self.prompt_lengths}):
            start = time.perf_counter()
            layout = PrefixLayout(cameras, config.tokens_per_camera, text)
            short = dataclasses.replace(example, tokens=example.tokens[:text])
            self.engine.warmup(self.engine.init((self.seed,), len(cameras)), jax.device_put(pack([short], layout)))
            seconds = time.perf_counter() - start
            logger.info("compiled for %d cameras, prompt length %d in %.1f s", len(cameras), text, seconds)


class Session:
    """One robot, one episode after the other. Not for use by two threads at once.

    Args:
      policy: the shared policy.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self._control: ControlState | None = None
        self._cameras: tuple[str, ...] = ()
        self._prompt: Any = None

    def reset(self) -> None:
        """Forgets the episode: the next step is a keyframe and the noise starts from the policy's seed."""
        self._control = None

    def infer(self, request: dict, *, noise: np.ndarray | None = None) -> dict:
        """One control step.

        Args:
          request: openpi's request dictionary of this robot; `"reset": True` starts a new episode.
          noise: [A, action_dim] float32 to start the flow from; None draws it.

        Returns:
          "actions" float64 [A, robot's action width]; "policy_timing" in milliseconds, measured until the actions
          are on the host: `infer_ms` (device work and transfers), and where the pruner decides `shallow_ms` (until
          its decision is known) and `rest_ms`; "pruning" with `kept` and `alive` visual tokens, `keyframe`,
          `kappa` (None where undefined) and `index`, the kept visual slots in ascending order.

        Raises:
          RequestError: a bad request; the session is as it was before.
          FloatingPointError: the model returned non-finite actions; the session is reset.
        """
        policy, config = self.policy, self.policy.engine.config
        example, context = policy.transform.prepare(request)
        layout = layout_of(example, config, policy.prompt_lengths)
        prompt = request.get("prompt")
        started_afresh = (
            self._control is None
            or bool(request.get("reset", False))
            or prompt != self._prompt
            or layout.cameras != self._cameras
        )
        control = policy.engine.init((policy.seed,), len(layout.cameras)) if started_afresh else self._control
        inputs = pack([example], layout)
        alive = np.repeat(inputs.camera_mask[0], config.tokens_per_camera)

        start = time.perf_counter()
        noise = None if noise is None else jax.device_put(np.asarray(noise, np.float32)[None])
        actions, control, info = policy.engine.step(control, jax.device_put(inputs), noise)
        actions, selection = jax.device_get((actions, info.selection))
        end = time.perf_counter()

        if not np.isfinite(actions).all():
            self.reset()
            raise FloatingPointError("the model returned non-finite actions; the session was reset, check the weights")
        self._control, self._prompt, self._cameras = control, prompt, layout.cameras
        reply = policy.transform.finish(actions[0], context)
        reply["policy_timing"] = _timing(start, info.decided_at, end)
        if policy.describe:
            reply["pruning"] = _describe(bool(info.keyframe[0]), jax.tree.map(lambda a: a[0], selection), alive)
        return reply


def _timing(start: float, decided: float | None, end: float) -> dict[str, float]:
    timing = {"infer_ms": (end - start) * 1000}
    if decided is not None:
        timing |= {"shallow_ms": (decided - start) * 1000, "rest_ms": (end - decided) * 1000}
    return timing


def _describe(keyframe: bool, selection: Selection, alive: np.ndarray) -> dict:
    index = np.flatnonzero(alive).astype(np.int32) if keyframe else selection.index[selection.alive]
    kappa = float(selection.kappa)
    return {
        "kept": len(index),
        "alive": int(alive.sum()),
        "keyframe": keyframe,
        "kappa": None if math.isnan(kappa) else kappa,
        "index": index,
    }
