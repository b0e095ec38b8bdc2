"""`RobotIO`: the border between one robot's client and the network.

get_config("pi05_libero") ──> PolicyConfig ── RobotIO(config, stats, tokenizer)
request ── RobotIO.prepare ──> Example, Context
actions [AH, AD], Context ── RobotIO.finish ──> {"actions": float64 [AH, robot's own width]}
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.robots.robots import RequestError, Robot, read_prompt
from safe_pruner_jax.robots.transforms import Example, NormStats, Tokenizer, normalise, resize_with_pad, unnormalise


@dataclass(frozen=True)
class PolicyConfig:
    """One policy: a model, its robot, and how numbers pass between the two.

    Args:
      name: openpi's name of the configuration.
      model: sizes of the network.
      robot: what the client sends and expects.
      asset_id: folder of the norm stats under `<checkpoint>/assets`.
      quantiles: scale by quantiles (openpi: π0.5) or by z-scores (π0).
      delta_mask: per leading action value, whether the network's is relative to the state; None if none is.
      default_prompt: used for requests without a prompt.
      default_checkpoint_uri: published weights; None where openpi names none.
      metadata: what openpi's server tells a client on connection.
      replan: actions that an evaluation executes per call unless told otherwise; openpi's LIBERO client: 5.
    """

    name: str
    model: Pi0Config
    robot: Robot
    asset_id: str
    quantiles: bool
    delta_mask: tuple[bool, ...] | None = None
    default_prompt: str | None = None
    default_checkpoint_uri: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    replan: int = 5


@dataclass(frozen=True, eq=False)
class Context:
    """What `RobotIO.finish` needs of the request: state, float32 [action_dim], as the network got it."""

    state: np.ndarray


@dataclass(frozen=True, eq=False)
class RobotIO:
    """Everything between one robot's client and the network; pure, and safe to share between threads.

    In: robot's input, default prompt, normalise, resize, tokenise, pad. Out: unnormalise, add the state to
    relative actions, robot's output. (Making actions relative is a step of training: a request has none.)

    Args:
      config: the policy.
      stats: "state" and "actions", from `load_norm_stats`.
      tokenizer: with the model's max_token_len.
      default_prompt: for requests without one, before the config's own.

    Raises:
      ValueError: statistics or a tokenizer that do not belong to this policy.
      RequestError: a default prompt that no request could carry.
    """

    config: PolicyConfig
    stats: Mapping[str, NormStats]
    tokenizer: Tokenizer
    default_prompt: str | None = None

    def __post_init__(self):
        model, robot = self.config.model, self.config.robot
        if self.default_prompt is None:
            object.__setattr__(self, "default_prompt", self.config.default_prompt)
        if self.default_prompt is not None:
            read_prompt(self.default_prompt)
        if self.tokenizer.max_token_len != model.max_token_len:
            raise ValueError(
                f"tokenizer: expected max_token_len {model.max_token_len} for {self.config.name}, got "
                f"{self.tokenizer.max_token_len}; build it with Tokenizer(path, config.model.max_token_len)"
            )
        if self.tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"tokenizer: expected at most {model.vocab_size} ids for {self.config.name}, got "
                f"{self.tokenizer.vocab_size}; use the tokenizer file the checkpoint was trained with"
            )
        for key, least in (("state", robot.state_dim), ("actions", robot.action_dim)):
            stats = self.stats.get(key)
            if stats is None or not least <= stats.dim <= model.action_dim:
                raise ValueError(
                    f"norm stats {key!r}: expected {least} to {model.action_dim} values for {robot.name}, "
                    f"got {stats and stats.dim}; load those of the asset id {self.config.asset_id!r}"
                )
            if self.config.quantiles and not stats.has_quantiles:
                raise ValueError(
                    f"norm stats {key!r}: expected q01 and q99, as {self.config.name} scales by quantiles, "
                    "got none; load the stats that came with the checkpoint"
                )

    def prepare(self, request: dict) -> tuple[Example, Context]:
        """The network's input for one request, and what `finish` needs later.

        Raises:
          RequestError: see `robots`.
        """
        model = self.config.model
        raw = self.config.robot.input(request)
        prompt = raw.get("prompt", self.default_prompt)
        if prompt is None:
            raise RequestError(
                "prompt", "an instruction", "none", 'add "prompt", or start the server with a default prompt'
            )
        state = normalise(raw["state"], self.stats["state"], quantiles=self.config.quantiles)
        with np.errstate(over="ignore"):
            padded = np.pad(state.astype(np.float32), (0, model.action_dim - len(state)))
        if not np.isfinite(padded).all():
            raise RequestError(
                "state",
                "values that scale to float32",
                f"up to {np.abs(raw['state']).max():.3g}",
                "check units",
            )
        size = model.image_size
        images = {k: np.array(resize_with_pad(im, size, size), order="C") for k, im in raw["image"].items()}
        tokens = self.tokenizer.encode(prompt, state if model.discrete_state_input else None)
        return Example(images, raw["image_mask"], padded, tokens), Context(padded)

    def finish(self, actions: np.ndarray, context: Context) -> dict:
        """The reply {"actions": float64 [AH, robot's own width]} for the network's actions.

        Args:
          actions: float32 [AH, action_dim], normalised.
          context: from the `prepare` of the same request.

        Raises:
          ValueError: actions of another shape.
        """
        actions, quantiles = np.asarray(actions), self.config.quantiles
        if actions.ndim != 2 or actions.shape[1] != self.config.model.action_dim:
            raise ValueError(
                f"actions: expected shape (horizon, {self.config.model.action_dim}), got {actions.shape}; "
                "finish one robot at a time"
            )
        actions = unnormalise(actions, self.stats["actions"], quantiles=quantiles)
        if self.config.delta_mask is not None:
            # The state as the network saw it (float32, scaled and back), so that replies equal openpi's.
            state = unnormalise(context.state, self.stats["state"], quantiles=quantiles)
            n = len(self.config.delta_mask)
            actions[:, :n] += np.where(self.config.delta_mask, state[:n], 0.0)
        return self.config.robot.output(actions)

    def example(self, rng: np.random.Generator) -> dict:
        """A request of this robot with invented values, to warm up with."""
        return self.config.robot.example(rng)
