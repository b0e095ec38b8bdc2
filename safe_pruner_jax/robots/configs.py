"""openpi's named policies and the embedded one, and `RobotIO`: the border between one robot's client and the network.

    get_config("pi05_libero") ──> PolicyConfig ── RobotIO(config, stats, tokenizer)
    request ── RobotIO.prepare ──> Example, Context
    actions [AH, AD], Context ── RobotIO.finish ──> {"actions": float64 [AH, robot's own width]}

Names, sizes and data settings are those of openpi's `training/config.py` and its `misc/` files, for every
configuration whose model is a π0 or π0.5 flow model; `UNSUPPORTED` says why the others are absent.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from safe_pruner_jax.model.config import Pi0Config, mini, pi0, pi05
from safe_pruner_jax.observation import Example, NormStats, Tokenizer, normalise, resize_with_pad, unnormalise
from safe_pruner_jax.robots import ALOHA, DROID, LIBERO, RequestError, Robot, read_prompt


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


_GS = "gs://openpi-assets/checkpoints"
_RESET = {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}
_ARM7 = (True,) * 7 + (False,)
_ARM6 = (True,) * 6 + (False,)


def _aloha(name: str, model: Pi0Config, checkpoint: str | None, prompt: str | None = None, **more) -> PolicyConfig:
    """A policy on ALOHA: joints relative to the state, grippers absolute."""
    return PolicyConfig(
        name,
        model,
        ALOHA,
        **{"asset_id": "trossen", "delta_mask": _ARM6 * 2} | more,
        quantiles=model.pi05,
        default_prompt=prompt,
        default_checkpoint_uri=checkpoint and f"{_GS}/{checkpoint}",
    )


def _droid(name: str, model: Pi0Config, checkpoint: str | None, *, delta: bool = False) -> PolicyConfig:
    """A policy on DROID: joint velocities, or with `delta` joint positions relative to the state."""
    return PolicyConfig(
        name,
        model,
        DROID,
        "droid",
        quantiles=model.pi05,
        delta_mask=_ARM7 if delta else None,
        default_checkpoint_uri=checkpoint and f"{_GS}/{checkpoint}",
    )


def _libero(name: str, model: Pi0Config, checkpoint: str | None, *, delta: bool) -> PolicyConfig:
    """A policy on LIBERO; π0's was trained with actions made relative once more."""
    return PolicyConfig(
        name,
        model,
        LIBERO,
        "physical-intelligence/libero",
        quantiles=model.pi05,
        delta_mask=_ARM6 if delta else None,
        default_checkpoint_uri=checkpoint and f"{_GS}/{checkpoint}",
    )


CONFIGS: dict[str, PolicyConfig] = {
    config.name: config
    for config in (
        # Served as released.
        _aloha("pi0_aloha", pi0(), "pi0_base", metadata=_RESET),
        _aloha("pi05_aloha", pi05(), "pi05_base", metadata=_RESET),
        _aloha("pi0_aloha_towel", pi0(), "pi0_aloha_towel", "fold the towel", metadata=_RESET),
        _aloha(
            "pi0_aloha_tupperware",
            pi0(),
            "pi0_aloha_tupperware",
            "open the tupperware and put the food on the plate",
            metadata=_RESET,
        ),
        _aloha(
            "pi0_aloha_sim",
            pi0(),
            "pi0_aloha_sim",
            "Transfer cube",
            asset_id="lerobot/aloha_sim_transfer_cube_human",
            delta_mask=None,
        ),
        _aloha("pi0_aloha_pen_uncap", pi0(), "pi0_aloha_pen_uncap", "uncap the pen"),
        _aloha("pi05_aloha_pen_uncap", pi05(), None, "uncap the pen"),
        _droid("pi0_droid", pi0(action_horizon=10), "pi0_droid"),
        _droid("pi05_droid", pi05(action_horizon=15), "pi05_droid"),
        _libero("pi0_libero", pi0(), None, delta=True),
        _libero("pi05_libero", pi05(action_horizon=10, discrete_state_input=False), "pi05_libero", delta=False),
        # Not openpi's: the small policy inside this package, and one of its size that reads the robot's state.
        _libero("mini_libero", mini(image_size=112, temperature=0.0), None, delta=False),
        _libero(
            "mini_libero_state",
            mini(image_size=112, vocab_size=768, discrete_state_input=True, temperature=0.0),
            None,
            delta=False,
        ),
        # Fine-tuned by the user.
        _droid("pi05_full_droid_finetune", pi05(action_horizon=16), None, delta=True),
        _droid("pi05_droid_finetune", pi05(action_horizon=16), None),
        # PolaRiS and RoboArena baselines.
        _droid(
            "pi05_droid_jointpos_polaris",
            pi05(action_horizon=15),
            "polaris/pi05_droid_jointpos_polaris",
            delta=True,
        ),
        *(
            _droid(name, pi0(action_horizon=10, max_token_len=100), f"polaris/{name}", delta=True)
            for name in ("pi0_droid_jointpos_polaris", "pi0_droid_jointpos_100k_polaris")
        ),
        _droid(
            "paligemma_diffusion_droid",
            pi0(action_horizon=10, action_dim=8),
            "roboarena/paligemma_diffusion_droid",
        ),
    )
}

_TOKENS = "it writes actions as text tokens, autoregressively, and has no flow expert"
_LORA = "its checkpoint has LoRA parameters; merge them into the base weights and use pi0_libero"
_DEBUG = "it is a dummy for openpi's own tests, without a robot; use mini() of model.config instead"

UNSUPPORTED: dict[str, str] = dict.fromkeys(
    (
        "pi0_fast_droid",
        "pi0_fast_libero",
        "pi0_fast_libero_low_mem_finetune",
        "pi0_fast_full_droid_finetune",
        "pi0_fast_droid_jointpos_polaris",
        "paligemma_binning_droid",
        "paligemma_binning_droid_jointpos",
        "paligemma_fast_droid",
        "paligemma_fast_specialist_droid",
        "paligemma_vq_droid",
    ),
    _TOKENS,
) | {"pi0_libero_low_mem_finetune": _LORA, "debug": _DEBUG, "debug_restore": _DEBUG, "debug_pi05": _DEBUG}
"""openpi's other configurations, and why they cannot be served here."""

DEFAULT_CHECKPOINTS: dict[str, tuple[str, str]] = {
    "ALOHA": ("pi05_aloha", f"{_GS}/pi05_base"),
    "ALOHA_SIM": ("pi0_aloha_sim", f"{_GS}/pi0_aloha_sim"),
    "DROID": ("pi05_droid", f"{_GS}/pi05_droid"),
    "LIBERO": ("pi05_libero", f"{_GS}/pi05_libero"),
}
"""Environment -> (config name, checkpoint) that openpi's `serve_policy.py` serves by default."""


def get_config(name: str) -> PolicyConfig:
    """The configuration of openpi's that has this name.

    Raises:
      ValueError: no such name, or one that is not a flow model; the message says what to use.
    """
    if name in CONFIGS:
        return CONFIGS[name]
    if name in UNSUPPORTED:
        raise ValueError(f"config {name!r} is not supported: {UNSUPPORTED[name]}; choose one of {sorted(CONFIGS)}")
    close = difflib.get_close_matches(name, CONFIGS, n=3, cutoff=0.3) or sorted(CONFIGS)
    raise ValueError(f"config: expected one of openpi's names, got {name!r}; did you mean {', '.join(close)}?")
