"""openpi's named policies and the embedded one: `get_config("pi05_libero")`.

Names, sizes and data settings are those of openpi's `training/config.py` and its `misc/` files, for every
configuration whose model is a π0 or π0.5 flow model; `UNSUPPORTED` says why the others are absent.
"""

import difflib
from typing import Any

from safe_pruner_jax.model.config import Pi0Config, mini, pi0, pi05
from safe_pruner_jax.robots.robots import ALOHA, DROID, LIBERO
from safe_pruner_jax.robots.transform import PolicyConfig

_GS = "gs://openpi-assets/checkpoints"
_RESET = {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}
_ARM7 = (True,) * 7 + (False,)
_ARM6 = (True,) * 6 + (False,)


def _aloha(name: str, model: Pi0Config, checkpoint: str | None, prompt: str | None = None, **more: Any) -> PolicyConfig:
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


def _libero(name: str, model: Pi0Config, checkpoint: str | None, *, delta: bool, **more: Any) -> PolicyConfig:
    """A policy on LIBERO; π0's was trained with actions made relative once more."""
    return PolicyConfig(
        name,
        model,
        LIBERO,
        "physical-intelligence/libero",
        quantiles=model.pi05,
        delta_mask=_ARM6 if delta else None,
        default_checkpoint_uri=checkpoint and f"{_GS}/{checkpoint}",
        **more,
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
        # Not openpi's: the small policies inside this package, which learned from episodes of whole chunks, and one
        # of their size that reads the robot's state.
        *(
            _libero(name, mini(image_size=112, temperature=0.0), None, delta=False, replan=10)
            for name in ("mini_libero", "mini_libero_spatial")
        ),
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


def replan_of(name: str) -> int:
    """Actions per call of the configuration of this name; openpi's 5 for one that is not known here."""
    return CONFIGS[name].replan if name in CONFIGS else PolicyConfig.replan
