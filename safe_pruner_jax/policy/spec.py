"""Which policy and which method the commands run: the arguments that all of them share, and what becomes of them."""

import dataclasses
import enum
import inspect
import logging
import re
from collections.abc import Collection, Iterable
from typing import Any, Literal

from safe_pruner_jax import pruners
from safe_pruner_jax.model.fetch import fetch
from safe_pruner_jax.model.quantisation import EightBit
from safe_pruner_jax.policy.embedded import EMBEDDED, WEIGHTS, embedded_folder
from safe_pruner_jax.policy.identity import Configuration, describe
from safe_pruner_jax.policy.loading import calibrated, load_policy
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.robots.configs import DEFAULT_CHECKPOINTS, get_config
from safe_pruner_jax.tokens import PROMPT_LENGTHS

logger = logging.getLogger(__name__)

_SAFE = inspect.signature(pruners.factory("safe")).parameters
OF_A_THRESHOLD = {name: _SAFE[name].default for name in ("cut", "queries", "features", "match", "soft")}
"""Choices of `safe` that the values of κ depend on, and so γ: what a calibration has that does not name them."""


class EnvMode(enum.Enum):
    """Environments that have a default policy."""

    ALOHA = "aloha"
    ALOHA_SIM = "aloha_sim"
    DROID = "droid"
    LIBERO = "libero"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A trained checkpoint.

    Args:
      config: openpi's name of the training configuration, for example pi05_libero.
      dir: checkpoint folder, local or gs://.
    """

    config: str
    dir: str


@dataclasses.dataclass(frozen=True)
class Default:
    """The policy that openpi publishes for the environment."""


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A small policy inside this package; nothing is downloaded.

    Args:
      config: mini_libero plays LIBERO-Object, mini_libero_spatial LIBERO-Spatial.
    """

    config: str = EMBEDDED


@dataclasses.dataclass(frozen=True)
class Method:
    """What `--pruner` and its arguments ask for.

    Attributes:
      name: of the pruner.
      choices: of its factory, all of them.
      given: names of those that were written out; the others may follow the policy.
      describe: whether replies tell about pruning; not for `--pruner=none`, whose replies are exactly openpi's.
    """

    name: str
    choices: dict[str, Any]
    given: frozenset[str] = frozenset()
    describe: bool = True

    def make(self) -> pruners.Pruner:
        """The pruner; raises ValueError for a choice out of range."""
        return pruners.make(self.name, **self.choices)


def split_method(text: str) -> tuple[str, dict[str, str]]:
    """Name and choices of "name" or "name:choice=value,choice=value"; values are not read yet.

    >>> split_method("safe:late_layers=(0,-1),pool=1.5")
    ('safe', {'late_layers': '(0,-1)', 'pool': '1.5'})

    Raises:
      ValueError: a choice without a value.
    """
    name, _, rest = text.partition(":")
    parts = [part.partition("=") for part in re.split(r",(?=\w+=)", rest)] if rest else []
    if wrong := [key for key, sign, _ in parts if not sign]:
        raise ValueError(f"methods: expected NAME:choice=value,…, got {text} ({wrong[0]} has no value)")
    return name, {key: value for key, _, value in parts}


def check_choices(text: str, name: str, given: Iterable[str], known: Collection[str]) -> None:
    """A method's choices, written as in `text`, are among the known ones; raises ValueError."""
    if not set(given) <= set(known):
        choices = ", ".join(known) or "none: it keeps everything"
        raise ValueError(f"methods: expected NAME:choice=value,… with choices of {name} ({choices}), got {text}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What computes.

    Args:
      dtype: activations and weights; the default is the configuration's (bfloat16).
      quantise: 8-bit weights for the language model and the expert, see docs/performance.md.
      kernels: "auto" takes the Pallas kernels that are faster on this GPU, measured at the start.
      num_steps: denoise steps.
      temperature: standard deviation of the noise that a chunk is made from; 0 is deterministic. The default is the
        configuration's: 1 as in openpi, 0 for the embedded policy.
      prompt_lengths: static prompt lengths, which a server compiles before it accepts clients. Fewer start faster; a
        prompt is padded to the next one, and one longer than all of them makes its robot wait for a compilation.
      tokenizer: SentencePiece model file; the default is PaliGemma's, from openpi's cache.
      seed: seed of the noise.
      policy: what is run.
    """

    dtype: Literal["bfloat16", "float32"] | None = None
    quantise: EightBit | None = None
    kernels: Literal["none", "auto"] = "none"
    num_steps: int = 10
    temperature: float | None = None
    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS
    tokenizer: str | None = None
    seed: int = 0
    policy: Checkpoint | Default | Embedded = dataclasses.field(default_factory=Default)

    def named(self, environment: str) -> tuple[str, str | None]:
        """Name of the configuration and folder or address of its checkpoint, None for the embedded one."""
        match self.policy:
            case Checkpoint(config, folder):
                return config, folder
            case Embedded(config):
                if config not in WEIGHTS:
                    raise ValueError(f"config: expected a policy of this package ({', '.join(WEIGHTS)}), got {config}")
                return config, None
        return DEFAULT_CHECKPOINTS[environment]

    def fit(self, environment: str, method: Method, executed: int | None = None) -> Method:
        """The method with what is known of its surroundings, unless given otherwise.

        Args:
          environment: of the robot.
          method: asked for.
          executed: actions the robot executes per call, for a method that reads its speed from them; None: unknown.

        Returns:
          `safe` as the checkpoint was calibrated to (`loading.calibrated`); others with their `executed`.
        """
        if executed is not None and "executed" in set(method.choices) - method.given:
            method = dataclasses.replace(method, choices=method.choices | {"executed": executed})
        if method.name != "safe":
            return method
        name, checkpoint = self.named(environment)
        measured = calibrated(fetch(checkpoint) if checkpoint else embedded_folder(name))
        calibration = {name: value for name, value in measured.items() if name not in method.given}
        if calibration:
            logger.info("safe: calibrated to this policy: %s", ", ".join(f"{k} {v}" for k, v in calibration.items()))
        elif "threshold" not in method.given and method.choices["every"] is None:
            logger.warning(
                "safe: γ = %g is the paper's, for another model; too high for this policy, it makes every step a "
                "keyframe. `openpi analyze calibrate` finds its own (docs/analysis.md)",
                method.choices["threshold"],
            )
        chosen = method.choices | calibration
        if "threshold" in calibration and chosen["every"] is None:
            measured_at = OF_A_THRESHOLD | measured
            for name in (name for name in OF_A_THRESHOLD if chosen[name] != measured_at[name]):
                logger.warning(
                    "safe: γ = %g was calibrated with %s = %s, not %s; give --pruner.threshold (-1: no keyframes by κ)",
                    chosen["threshold"],
                    name,
                    measured_at[name],
                    chosen[name],
                )
        return dataclasses.replace(method, choices=chosen)

    def load(self, environment: str, pruner: pruners.Pruner, **options: Any) -> Policy:
        """The policy, with its weights."""
        name, checkpoint = self.named(environment)
        if checkpoint is None:
            logger.warning("embedded policy: %s", WEIGHTS[name])
        logger.info("loading %s from %s, pruner %s %s", name, checkpoint or "the package", pruner.name, pruner.plan)
        return load_policy(name, checkpoint, pruner=pruner, **self.options(), **options)

    def options(self) -> dict[str, Any]:
        """The choices that `load_policy` takes by name."""
        chosen = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(Model) if field.name != "policy"
        }
        return chosen | {"kernels": () if self.kernels == "none" else self.kernels}

    def describe(self, environment: str, method: Method, *, anywhere: bool = False) -> Configuration:
        """What an evaluation needs to know of it, before weights are read; `anywhere`: what an analysis does."""
        name, checkpoint = self.named(environment)
        get_config(name)  # a name that does not exist, before its checkpoint is looked for
        folder, note = (fetch(checkpoint), "") if checkpoint else (embedded_folder(name), WEIGHTS[name])
        options = self.options()
        named = {key: options[key] for key in ("dtype", "quantise", "num_steps", "temperature", "prompt_lengths")}
        return describe(name, folder, method.make(), method.choices, note=note, anywhere=anywhere, **named)
