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
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tyro

from safe_pruner_jax import pruners
from safe_pruner_jax.cli import analyze as analysis
from safe_pruner_jax.cli import attention, controls
from safe_pruner_jax.cli.arguments import parse, split_pruner
from safe_pruner_jax.cli.bench import Bench, run_bench
from safe_pruner_jax.cli.convert import Convert, run_convert
from safe_pruner_jax.cli.diagnose import Diagnose, run_diagnose
from safe_pruner_jax.cli.evaluate import Evaluate, run_evaluate
from safe_pruner_jax.cli.export import Export, run_export
from safe_pruner_jax.cli.help import summary
from safe_pruner_jax.cli.inspect import Inspect, run_inspect
from safe_pruner_jax.cli.report import Report, run_report
from safe_pruner_jax.cli.serve import Serve, run_serve
from safe_pruner_jax.cli.sweep import Sweep, run_sweep
from safe_pruner_jax.cli.train import Train, run_train
from safe_pruner_jax.cli.view import View, run_view
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


COMMANDS = {
    "serve": Command(Serve, run_serve),
    "evaluate": Command(Evaluate, run_evaluate),
    "sweep": Command(Sweep, run_sweep, pruner=False),
    "report": Command(Report, run_report, pruner=False),
    "inspect": Command(Inspect, run_inspect, pruner=False),
    "view": Command(View, run_view),
    "diagnose": Command(Diagnose, run_diagnose, pruner=False),
    "train": Command(Train, run_train, pruner=False),
    "export": Command(Export, run_export),
    "convert": Command(Convert, run_convert, pruner=False),
    "bench": Command(Bench, run_bench, pruner=False),
}


ANALYSES = analysis.COMMANDS | attention.COMMANDS | controls.COMMANDS


def _analyze(name: str) -> Command:
    """`openpi analyze NAME`: the analysis' own arguments and those of the model."""
    options, run = ANALYSES[name]
    arguments = dataclasses.make_dataclass(name.title(), [], bases=(options, Model), frozen=True, kw_only=True)
    arguments.__doc__ = options.__doc__

    def run_analysis(args: Any) -> None:
        keep_all = pruners.make("full")
        about = args.describe("LIBERO", Method("full", {}), anywhere=True).as_json()
        conditions = {key: about[key] for key in MODEL} | {"seed": args.seed}
        run(args, lambda: args.load("LIBERO", keep_all), conditions)

    return Command(arguments, run_analysis, pruner=False)


COMMANDS |= {f"analyze {name}": _analyze(name) for name in ANALYSES}
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
