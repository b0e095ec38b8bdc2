"""`prune`: openpi's `Policy` in, the same interface with this package's engine inside out."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi_patch.weights import PatchError, parameters, release, shared, sizes, weights_of
from safe_pruner_jax import pruners
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.robots.robots import ALOHA, DROID, LIBERO, Aloha, SingleArm
from safe_pruner_jax.robots.transforms import Example, resize_with_pad
from safe_pruner_jax.tokens import PROMPT_LENGTHS

logger = logging.getLogger(__name__)

MakeRequest = Callable[[np.random.Generator], dict]

ROBOTS: dict[str, SingleArm | Aloha] = {"LiberoInputs": LIBERO, "DroidInputs": DROID, "AlohaInputs": ALOHA}
"""Name of openpi's transform that reads a robot's request → the robot."""


def robot_of(transform: Any) -> SingleArm | Aloha | None:
    """The robot whose requests openpi's transforms take; None where they are of another robot."""
    names = [type(part).__name__ for part in getattr(transform, "transforms", (transform,))]
    return next((ROBOTS[name] for name in names if name in ROBOTS), None)


class OpenpiTransform:
    """openpi's transforms between a request and this package's network input; see `policy.Transform`.

    Args:
      policy: openpi's.
      config: sizes of its model.
      example: makes a request that the transforms take; None takes that of openpi's robot (`robot_of`).
    """

    def __init__(self, policy: Any, config: Pi0Config, example: MakeRequest | None = None):
        self._input, self._output, self._model = policy._input_transform, policy._output_transform, config
        robot = robot_of(self._input)
        self._example = robot.example if example is None and robot is not None else example

    def example(self, rng: np.random.Generator) -> dict:
        """A request to warm up with.

        Raises:
          PatchError: the transforms are none of openpi's robots, and no example was given.
        """
        if self._example is None:
            raise PatchError(
                f"expected transforms of openpi's {', '.join(ROBOTS)}, got others: there is no request to warm up "
                "with; give prune(..., example=...), or call infer once before robots connect"
            )
        return self._example(rng)

    def prepare(self, request: dict) -> tuple[Example, np.ndarray]:
        """The network's input, and the transformed state that openpi's output transforms read."""
        inputs = self._input(jax.tree.map(lambda x: x, request))  # a copy: transforms may work in place
        size = self._model.image_size
        images = {}
        for name in self._model.cameras:
            image = np.asarray(inputs["image"][name])
            if image.dtype != np.uint8:
                raise PatchError(f"image {name}: expected uint8 after openpi's transforms, got {image.dtype}")
            images[name] = np.array(resize_with_pad(image, size, size), order="C")
        masks = inputs["image_mask"]
        state = np.asarray(inputs["state"], np.float32)
        tokens = np.asarray(inputs["tokenized_prompt"])[np.asarray(inputs["tokenized_prompt_mask"], bool)]
        alive = {name: bool(masks.get(name, True)) for name in self._model.cameras}
        return Example(images, alive, state, tokens.astype(np.int32)), state

    def finish(self, actions: np.ndarray, context: np.ndarray) -> dict:
        """openpi's reply for actions [A, action_dim] float32."""
        return self._output({"state": context, "actions": actions})


class PrunedPolicy:
    """openpi's `Policy` interface over this package's engine. Made by `prune`.

    Args:
      policy: this package's policy around openpi's transforms.
      metadata: openpi's.
      rng: openpi's key: without `noise`, steps draw the same noise as the policy that was given.
    """

    def __init__(self, policy: Policy, metadata: dict[str, Any], rng: jax.Array):
        self.policy, self._metadata, self._rng = policy, metadata, rng
        self._session = policy.session()

    def infer(self, obs: dict, *, noise: np.ndarray | None = None) -> dict:
        """openpi's reply, and `pruning` if the policy was asked to describe itself.

        Args:
          obs: openpi's request of this robot. Another prompt, another set of cameras or `"reset": True` start a new
            episode.
          noise: [A, action_dim] or [1, A, action_dim] float32; None draws it as openpi does.

        Raises:
          NonFinite: the model's actions are not finite.
          Exception: whatever openpi's transforms raise.
        """
        config = self.policy.engine.config
        if noise is None:
            self._rng, key = jax.random.split(self._rng)
            noise = np.asarray(jax.random.normal(key, (1, config.action_horizon, config.action_dim)))
        noise = np.asarray(noise, np.float32)
        return self._session.infer(obs, noise=noise[0] if noise.ndim == 3 else noise)

    def reset(self) -> None:
        """Forgets the episode; the noise goes on, as openpi's does."""
        self._session.reset()

    @property
    def metadata(self) -> dict[str, Any]:
        """openpi's metadata."""
        return self._metadata


def prune(
    policy: Any,
    pruner: str = "safe",
    *,
    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS,
    describe: bool = True,
    free: bool = False,
    example: MakeRequest | None = None,
    **choices: Any,
) -> PrunedPolicy:
    """A pruned policy on the transforms, arguments and weights of openpi's.

    Embedding, projections and norms are the model's own buffers. Matrices of the layers are split and fused once
    (openpi stacks all layers in one array, which every step would have to slice), which takes their size again; with
    `free` openpi's are freed afterwards, so that one copy stays.

    Args:
      policy: openpi's `Policy` with a JAX π0 or π0.5 in it; it is not changed.
      pruner: name of a pruner, see `pruners.PRUNERS`.
      prompt_lengths: static prompt lengths; each compiles when it is first needed.
      describe: add `pruning` to replies.
      free: free what is not shared; `policy` itself cannot infer any more.
      example: makes a request that the transforms take, to warm up with; not needed for openpi's own robots.
      **choices: of the pruner, for example keep=0.2.

    Raises:
      PatchError: a PyTorch policy, another model, or sample arguments other than `num_steps`.
      ValueError: an unknown pruner or a choice out of range.
    """
    if getattr(policy, "_is_pytorch_model", False):
        raise PatchError("expected a policy with a JAX model, got a PyTorch one; load the JAX checkpoint (params/)")
    arguments = dict(policy._sample_kwargs)
    num_steps = arguments.pop("num_steps", 10)
    if arguments:
        raise PatchError(f"sample_kwargs: expected num_steps alone, got {', '.join(arguments)}; pass noise to infer")
    made = pruners.make(pruner, **choices)
    params = parameters(policy._model)
    config = sizes(policy._model, params)
    engine = Engine(weights_of(params, config, num_steps), config, made)
    logger.info("%d of %d parameters share openpi's buffers", len(shared(params, engine.weights)), _count(params))
    if free:
        logger.info("freed %.1f MB of openpi's stacked layers", release(params, engine.weights) / 1e6)
    inner = Policy(engine, OpenpiTransform(policy, config, example), prompt_lengths=prompt_lengths, describe=describe)
    inner.metadata = dict(policy.metadata)
    return PrunedPolicy(inner, policy.metadata, _key(policy))


def _key(policy: Any) -> jax.Array:
    rng = getattr(policy, "_rng", None)
    return jax.random.key(0) if rng is None else jnp.asarray(rng)


def _count(params: dict) -> int:
    return len(jax.tree.leaves(params))
