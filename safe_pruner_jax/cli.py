"""`openpi serve`: openpi's own arguments, plus `--pruner=NAME` and the factory arguments of that pruner.

openpi serve --env LIBERO --pruner=safe --pruner.keep 0.2
openpi serve policy:checkpoint --policy.config=pi05_libero --policy.dir=/path/to/checkpoint --pruner=safe
openpi serve policy:embedded --pruner=fastv
"""

import dataclasses
import enum
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

from safe_pruner_jax import pruners
from safe_pruner_jax.configs import DEFAULT_CHECKPOINTS
from safe_pruner_jax.loading import EMBEDDED, EMBEDDED_WEIGHTS, load_policy
from safe_pruner_jax.robots import RequestError
from safe_pruner_jax.serving import Recorder, ServerError, serve
from safe_pruner_jax.tokens import PROMPT_LENGTHS

logger = logging.getLogger(__name__)


class EnvMode(enum.Enum):
    """Environments that have a default policy."""

    ALOHA = "aloha"
    ALOHA_SIM = "aloha_sim"
    DROID = "droid"
    LIBERO = "libero"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Serve a trained checkpoint.

    Args:
      config: openpi's name of the training configuration, for example pi05_libero.
      dir: checkpoint folder, local or gs://.
    """

    config: str
    dir: str


@dataclasses.dataclass(frozen=True)
class Default:
    """Serve the policy that openpi publishes for the environment."""


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Serve the small policy inside this package; nothing is downloaded."""


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a policy to openpi clients.

    Args:
      env: environment whose default policy is served; ignored with another policy.
      default_prompt: used for requests without a prompt.
      host: address to listen on; 0.0.0.0 for every interface.
      port: port to listen on.
      record: write every request and reply to policy_records/.
      dtype: activations and weights; the default is the configuration's (bfloat16).
      num_steps: denoise steps.
      prompt_lengths: static prompt lengths, compiled before the server accepts clients. Fewer start faster; a prompt
        is padded to the next one, and one longer than all of them makes its robot wait for a compilation.
      tokenizer: SentencePiece model file; the default is PaliGemma's, from openpi's cache.
      seed: seed of the noise.
      policy: what is served.
    """

    env: EnvMode = EnvMode.ALOHA_SIM
    default_prompt: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    record: bool = False
    dtype: Literal["bfloat16", "float32"] | None = None
    num_steps: int = 10
    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS
    tokenizer: str | None = None
    seed: int = 0
    policy: Checkpoint | Default | Embedded = dataclasses.field(default_factory=Default)


def run_serve(args: Serve, pruner: pruners.Pruner, describe: bool) -> None:
    """Loads, warms up, listens until interrupted."""
    match args.policy:
        case Checkpoint(config, folder):
            name, checkpoint = config, folder
        case Default():
            name, checkpoint = DEFAULT_CHECKPOINTS[args.env.name]
        case Embedded():
            name, checkpoint = EMBEDDED, None
            logger.warning("embedded policy: %s", EMBEDDED_WEIGHTS)
    logger.info("loading %s from %s, pruner %s %s", name, checkpoint or "the package", pruner.name, pruner.plan)
    policy = load_policy(
        name,
        checkpoint,
        pruner=pruner,
        default_prompt=args.default_prompt,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        num_steps=args.num_steps,
        prompt_lengths=args.prompt_lengths,
        seed=args.seed,
        describe=describe,
    )
    recorder = Recorder("policy_records") if args.record else None
    serve(policy, host=args.host, port=args.port, client_errors=(RequestError,), recorder=recorder)


def split_pruner(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--pruner NAME` or `--pruner=NAME` out of the arguments; "none" without one.

    >>> split_pruner(["--port", "1", "--pruner=safe", "--pruner.keep", "0.3"])
    ('safe', ['--port', '1', '--pruner.keep', '0.3'])
    """
    rest, name, items = [], "none", iter(argv)
    for item in items:
        if item == "--pruner":
            name = next(items, "")
        elif item.startswith("--pruner="):
            name = item.removeprefix("--pruner=")
        else:
            rest.append(item)
    return name, rest


def parse(command: type, argv: Sequence[str], prog: str) -> tuple[Any, pruners.Pruner, bool]:
    """A command's arguments and its pruner.

    `--pruner=none` is the full path with exactly openpi's replies; every other name adds `pruning` to them.

    Raises:
      ValueError: an unknown pruner or a choice out of range.
    """
    name, rest = split_pruner(argv)
    factory = pruners.factory("full" if name == "none" else name)

    # tyro would report the ValueError of a factory as a usage error of its own: check choices after parsing
    @functools.wraps(factory)
    def choices(**given) -> Callable[[], pruners.Pruner]:
        return functools.partial(factory, **given)

    field = ("pruner", Annotated[Any, arg(constructor=choices)])
    arguments = dataclasses.make_dataclass("Arguments", [field], bases=(command,), frozen=True, kw_only=True)
    arguments.__doc__ = command.__doc__
    args = tyro.cli(arguments, args=rest, prog=prog, config=(tyro.conf.CascadeSubcommandArgs,))
    return args, args.pruner(), name != "none"


COMMANDS = {"serve": (Serve, run_serve)}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `openpi`; returns the exit code: 0 done, 2 wrong arguments or a server that cannot start."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        asked = not argv or argv[0] in ("-h", "--help")
        print(f"{__doc__}\nCommands: {', '.join(COMMANDS)}; pruners: none, {', '.join(pruners.PRUNERS)}")
        if not asked:
            print(f"openpi: expected a command, one of {', '.join(COMMANDS)}, got {argv[0]!r}", file=sys.stderr)
        return 0 if asked and argv else 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    for library in ("jax", "websockets"):
        logging.getLogger(library).setLevel(logging.WARNING)
    command, run = COMMANDS[argv[0]]
    try:
        run(*parse(command, argv[1:], f"openpi {argv[0]}"))
    except (ValueError, ServerError, OSError) as e:
        print(f"openpi {argv[0]}: {e}", file=sys.stderr)
        return 2
    return 0
