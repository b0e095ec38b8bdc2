"""`openpi`: openpi's own arguments, plus `--pruner=NAME` and the factory arguments of that pruner.

openpi serve --env LIBERO --pruner=safe --pruner.keep 0.2
openpi serve policy:checkpoint --policy.config=pi05_libero --policy.dir=/path/to/checkpoint --pruner=safe
openpi serve policy:embedded --pruner=fastv
openpi evaluate --suite libero_object --trials 50 --out safe.jsonl --pruner=safe --pruner.keep 0.2 policy:embedded
openpi report full.jsonl safe.jsonl --out report/
openpi sweep --suite libero_object --trials 50 --out out/sweep --evaluate policy:embedded
openpi view libero:libero_object/0/3 --save run.rrd --pruner=safe policy:embedded
openpi diagnose policy_records/20260101T000000_1_00001.episode
openpi inspect policy_records/20260101T000000_1_00001.episode
openpi train --data demos/butter_demo.hdf5 --out runs/mini --image-size 112
openpi analyze recall --data demos/butter_demo.hdf5 --out analysis policy:embedded
openpi convert --checkpoint CKPT --config pi05_libero --to lerobot --out pi05_lerobot
openpi export --data demos/butter_demo.hdf5 --out my_dataset
openpi bench --config pi05_libero --pruners safe fastv --keeps 0.3 0.2 0.1
openpi --version
"""

import dataclasses
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tyro

from safe_pruner_jax import __version__, pruners
from safe_pruner_jax.cli.arguments import parse, split_pruner
from safe_pruner_jax.cli.help import summary
from safe_pruner_jax.cluster.connect import ClusterError
from safe_pruner_jax.evaluation import evaluate
from safe_pruner_jax.evaluation.records import RecordsError
from safe_pruner_jax.libero.simulator import LiberoUnavailable
from safe_pruner_jax.policy.identity import MODEL
from safe_pruner_jax.policy.spec import Method, Model
from safe_pruner_jax.serving import ServerError

logger = logging.getLogger(__name__)


class Command(NamedTuple):
    """A command's arguments and what runs them: (args, method), or (args) without a pruner; → exit code."""

    arguments: type
    run: Callable[..., int | None]
    pruner: bool = True


ANALYSES = {
    **dict.fromkeys(("recall", "forecast", "kappa", "overlap", "actions", "cost", "calibrate"), "analyze"),
    "attention": "attention",
    "controls": "controls",
}
"""Analysis → the module of this room that has it in its `COMMANDS`."""

NAMES = ["serve", "evaluate", "sweep", "report", "inspect", "view", "diagnose", "train", "export", "convert", "bench"]
"""Of commands: `serve` is `Serve` and `run_serve` of `cli/serve.py`, and so on."""

WITH_PRUNER = ("serve", "evaluate", "view", "export")


class Commands(Mapping[str, Command]):
    """Every command by its name. It is imported when it is asked for: a server needs no matplotlib."""

    def __getitem__(self, name: str) -> Command:
        if name not in iter(self):
            raise KeyError(name)
        room, _, analysis = f"{__package__}.{name}".partition(" ")
        if analysis:
            return _analyze(analysis)
        module = importlib.import_module(room)
        return Command(getattr(module, name.title()), getattr(module, f"run_{name}"), name in WITH_PRUNER)

    def __iter__(self) -> Iterator[str]:
        yield from (*NAMES, *(f"analyze {name}" for name in ANALYSES))

    def __len__(self) -> int:
        return len(NAMES) + len(ANALYSES)


COMMANDS: Mapping[str, Command] = Commands()


@functools.cache
def _analyze(name: str) -> Command:
    """`openpi analyze NAME`: the analysis' own arguments and those of the model."""
    options, run = importlib.import_module(f"{__package__}.{ANALYSES[name]}").COMMANDS[name]
    arguments = dataclasses.make_dataclass(name.title(), [], bases=(options, Model), frozen=True, kw_only=True)
    arguments.__doc__ = options.__doc__

    def run_analysis(args: Any) -> None:
        keep_all = pruners.make("full")
        about = args.describe("LIBERO", Method("full", {}), anywhere=True).as_json()
        conditions = {key: about[key] for key in MODEL} | {"seed": args.seed}
        run(args, lambda: args.load("LIBERO", keep_all), conditions)

    return Command(arguments, run_analysis, pruner=False)


ERRORS = (ValueError, OSError, MemoryError, ServerError, LiberoUnavailable, RecordsError)
ERRORS += (evaluate.EvaluationError, ClusterError)
"""What is a person's to mend: told in one line."""


def _help(command: Command, argv: Sequence[str], prog: str) -> str:
    """One screen; of the named pruner, too. Raises ValueError for an unknown one."""
    name, _ = split_pruner(argv)
    factory = pruners.factory("full" if name == "none" else name)
    return summary(prog, command.arguments, (name, factory) if command.pruner else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `openpi`; the exit code: 0 done, 2 told in one line what is wrong, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        print(f"safe_pruner_jax {__version__}")
        return 0
    if argv[:1] == ["analyze"]:
        argv[:2] = [" ".join(argv[:2])]
    if not argv or argv[0] not in COMMANDS:
        help_wanted = not argv or argv[0] in ("-h", "--help", "--help-all")
        print(f"{__doc__}\nCommands: {', '.join(COMMANDS)}; pruners: none, {', '.join(pruners.names())}")
        if not help_wanted:
            print(f"openpi: expected a command, one of {', '.join(COMMANDS)}, got {argv[0]!r}", file=sys.stderr)
        return 0 if help_wanted and argv else 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    for library in ("absl", "jax", "orbax", "websockets"):
        logging.getLogger(library).setLevel(logging.WARNING)
    command, prog = COMMANDS[argv[0]], f"openpi {argv[0]}"
    try:
        if {"-h", "--help"} & set(argv):
            print(_help(command, argv[1:], prog))
            return 0
        argv = ["--help" if item == "--help-all" else item for item in argv]
        if command.pruner:
            return command.run(*parse(command.arguments, argv[1:], prog)) or 0
        args = tyro.cli(command.arguments, args=argv[1:], prog=prog, config=(tyro.conf.CascadeSubcommandArgs,))
        return command.run(args) or 0
    except ERRORS as e:
        print(f"{prog}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
