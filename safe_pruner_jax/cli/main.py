"""`openpi serve`: openpi's own arguments, plus `--pruner=NAME` and the factory arguments of that pruner.

openpi serve --env LIBERO --pruner=safe --pruner.keep 0.2
openpi serve policy:checkpoint --policy.config=pi05_libero --policy.dir=/path/to/checkpoint --pruner=safe
openpi serve policy:embedded --pruner=fastv
openpi evaluate --suite libero_object --trials 50 --out safe.jsonl --pruner=safe --pruner.keep 0.2 policy:embedded
openpi report full.jsonl safe.jsonl --out report/
openpi inspect policy_records/20260101T000000_1_00001.episode
openpi train --data demos/butter_demo.hdf5 --out runs/mini --image-size 112
openpi analyze recall --data demos/butter_demo.hdf5 --out analysis policy:embedded
openpi bench --config pi05_libero --pruners safe fastv --keeps 0.3 0.2 0.1
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from tyro.conf import Positional, arg

from safe_pruner_jax import pruners
from safe_pruner_jax.analysis import command as analysis
from safe_pruner_jax.bench.command import Bench, run_bench
from safe_pruner_jax.coldstart import default_folder, keep_programs
from safe_pruner_jax.evaluation import evaluate, report, sources
from safe_pruner_jax.evaluation.display import Display
from safe_pruner_jax.evaluation.figures import report_figures
from safe_pruner_jax.evaluation.libero import load_task, num_tasks
from safe_pruner_jax.evaluation.records import MODEL, RecordFile, RecordsError, read_records
from safe_pruner_jax.evaluation.simulator import LiberoUnavailable, provenance
from safe_pruner_jax.robots import LIBERO, RequestError
from safe_pruner_jax.serving import Recorder, ServerError, serve
from safe_pruner_jax.serving.episodes import EpisodeRecorder
from safe_pruner_jax.serving.inspect import Inspect, header, run_inspect
from safe_pruner_jax.serving.options import Serving
from safe_pruner_jax.serving.wire import PROTOCOL
from safe_pruner_jax.training.command import Train, run_train
from safe_pruner_jax.which import EnvMode, Method, Model

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(Model):
    """Serve a policy to openpi clients.

    Args:
      env: environment whose default policy is served; ignored with another policy.
      default_prompt: used for requests without a prompt.
      host: address to listen on; 0.0.0.0 for every interface, which needs an API key.
      port: port to listen on.
      record: write every request and reply to policy_records/.
      record_as: one file per episode that `openpi inspect` replays, or openpi's own files, one pickle per step.
      programs: folder that keeps compiled programs for the next start; "none": nowhere. Default:
        $SAFE_PRUNER_PROGRAMS, else in ~/.cache.
      serving: who may connect, and what a request may expect.
    """

    env: EnvMode = EnvMode.ALOHA_SIM
    default_prompt: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    record: bool = False
    record_as: Literal["episodes", "openpi"] = "episodes"
    programs: str | None = None
    serving: Serving = dataclasses.field(default_factory=Serving)


def run_serve(args: Serve, method: Method) -> None:
    """Loads, warms up, listens until interrupted."""
    access, terms = args.serving.access(args.host), args.serving.terms()  # before gigabytes are read
    if args.programs != "none":
        keep_programs(args.programs or default_folder())
    method = args.fit(args.env.name, method)
    policy = args.load(args.env.name, method.make(), default_prompt=args.default_prompt, describe=method.describe)
    if method.describe and policy.transform.config.robot == LIBERO:
        config = args.describe(args.env.name, method)
        config = dataclasses.replace(config, noise=f"the server's, seed {args.seed}")
        policy.metadata[sources.SERVED] = {"configuration": config.as_json(), "device": sources.local_device()}
        policy.metadata[sources.SERVED]["protocol"] = PROTOCOL
    recorder = None
    if args.record:
        recorder = _recorder(args, method, policy.engine.config.kernels)
    serve(
        args.serving.fleet(policy),
        host=args.host,
        port=args.port,
        max_message_bytes=args.serving.max_message_mib * 2**20,
        client_errors=(RequestError,),
        recorder=recorder,
        access=access,
        terms=terms,
    )


def _recorder(args: Serve, method: Method, kernels: tuple[str, ...]) -> Recorder | EpisodeRecorder:
    if args.record_as == "openpi":
        return Recorder("policy_records")
    name, checkpoint = args.named(args.env.name)
    options = args.options() | {"default_prompt": args.default_prompt, "describe": method.describe, "kernels": kernels}
    about = header(name, checkpoint, method.name, method.choices, options=options)
    return EpisodeRecorder("policy_records", about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Model):
    """Play episodes in LIBERO and record each as it ends; the same command again continues.

    Args:
      suite: libero_spatial, libero_object, libero_goal, libero_10 or libero_90.
      tasks: tasks of the suite; all of them by default.
      trials: episodes per task, from the benchmark's fixed initial states 0, 1, …
      shard: i/n plays the i-th of n parts of these episodes.
      workers: simulator processes.
      batch: robots per device step; 1 makes results independent of the number of workers to the last bit.
      server: ws://host:port of a policy server that is asked instead of a policy in this process.
      out: records file; one per method, policy and simulator.
      replan: actions executed per policy call.
      max_steps: per episode, if fewer than the suite's limit.
      delay: control steps from an observation until its actions are used, in which the robot executes the old ones.
      rtc: real-time chunking: actions continue the old ones.
      retry_errors: play episodes again that ended in an error.
    """

    suite: str
    tasks: tuple[int, ...] = ()
    trials: int = 50
    shard: str = "1/1"
    workers: int = 2
    batch: int = 8
    server: str | None = None
    out: Path = Path("records.jsonl")
    replan: int = 5
    max_steps: int | None = None
    delay: int = 0
    rtc: bool = False
    retry_errors: bool = False


def run_evaluate(args: Evaluate, method: Method) -> int | None:
    """Plays what the records file does not have."""
    part, _, parts = args.shard.partition("/")
    if not (part.isdigit() and parts.isdigit()):
        raise ValueError(f"shard: expected i/n, for example 1/4, got {args.shard!r}")
    tasks = args.tasks or range(num_tasks(args.suite))
    for task in tasks:
        load_task(args.suite, task)
    protocol = {"replan": args.replan, "max_steps": args.max_steps, "delay": args.delay, "rtc": args.rtc}
    jobs = evaluate.episodes(args.suite, tasks, args.trials, shard=(int(part), int(parts)), **protocol)
    source: sources.Source | None = None
    if args.server:
        asked = (method.name, {k: method.choices[k] for k in method.given}) if method.describe else None
        config, source = sources.remote(args.server, asked, seed=args.seed)
    else:
        method = args.fit("LIBERO", method)
        config = args.describe("LIBERO", method)
        config = dataclasses.replace(config, noise=sources.noise_of(args.seed))
    config = dataclasses.replace(config, simulator=provenance(), **protocol)
    with RecordFile(args.out, config) as file:
        try:
            if source is None and evaluate.remaining(jobs, file, args.retry_errors):
                source = sources.local(args.load("LIBERO", method.make()), config, batch=args.batch, seed=args.seed)
            with Display(jobs, file) as display:
                options = {"workers": args.workers, "retry_errors": args.retry_errors, "on_record": display.update}
                evaluate.play(jobs, file, source, **options)
        except KeyboardInterrupt:
            print(
                f"openpi evaluate: stopped; every finished episode is in {args.out}, the same command continues",
                file=sys.stderr,
            )
            return 130
    return None


@dataclasses.dataclass(frozen=True)
class Report:
    """Turn records into a table, and with --out into files and figures.

    Args:
      files: from `openpi evaluate`, any number.
      format: of what is printed.
      baseline: method that the others are compared to, as the table names it, at the same ratio if it has several.
      out: folder for report.md, report.csv and the figures.
    """

    files: Positional[tuple[Path, ...]]
    format: Literal["markdown", "csv"] = "markdown"
    baseline: str = "full"
    out: Path | None = None


def run_report(args: Report) -> None:
    """Prints the table; writes the rest if asked."""
    rows = report.summarise((record for path in args.files for record in read_records(path)), args.baseline)
    texts = {"markdown": report.markdown(rows, args.baseline), "csv": report.table_csv(rows)}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.md").write_text(texts["markdown"], encoding="utf-8")
        (args.out / "report.csv").write_text(texts["csv"], encoding="utf-8")
        for name, figure in report_figures(rows).items():
            figure.savefig(args.out / f"{name}.png")
    print(texts[args.format], end="")


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


def parse(command: type, argv: Sequence[str], prog: str) -> tuple[Any, Method]:
    """A command's arguments and its method.

    `--pruner=none` is the full path with exactly openpi's replies; every other name adds `pruning` to them.

    Raises:
      ValueError: an unknown pruner or a choice out of range.
    """
    name, rest = split_pruner(argv)
    pruner = "full" if name == "none" else name

    # tyro would report the ValueError of a factory as a usage error of its own: check choices after parsing
    @functools.wraps(pruners.factory(pruner))
    def choices(**all_of_them) -> dict[str, Any]:
        return all_of_them

    field = ("pruner", Annotated[Any, arg(constructor=choices)])
    arguments = dataclasses.make_dataclass("Arguments", [field], bases=(command,), frozen=True, kw_only=True)
    arguments.__doc__ = command.__doc__
    args = tyro.cli(arguments, args=rest, prog=prog, config=(tyro.conf.CascadeSubcommandArgs,))
    options = {item.partition("=")[0] for item in rest if item.startswith("--pruner.")}
    given = {option.removeprefix("--pruner.").removeprefix("no-").replace("-", "_") for option in options}
    method = Method(pruner, args.pruner, frozenset(given & set(args.pruner)), describe=name != "none")
    method.make()
    return args, method


class Command(NamedTuple):
    """A command's arguments and what runs them: (args, method), or (args) without a pruner; → exit code."""

    arguments: type
    run: Callable[..., int | None]
    pruner: bool = True


COMMANDS = {
    "serve": Command(Serve, run_serve),
    "evaluate": Command(Evaluate, run_evaluate),
    "report": Command(Report, run_report, pruner=False),
    "inspect": Command(Inspect, run_inspect, pruner=False),
    "train": Command(Train, run_train, pruner=False),
    "bench": Command(Bench, run_bench, pruner=False),
}


def _analyze(name: str) -> Command:
    """`openpi analyze NAME`: the analysis' own arguments and those of the model."""
    options, run = analysis.COMMANDS[name]
    arguments = dataclasses.make_dataclass(name.title(), [], bases=(options, Model), frozen=True, kw_only=True)
    arguments.__doc__ = options.__doc__

    def run_analysis(args: Any) -> None:
        keep_all = pruners.make("full")
        about = args.describe("LIBERO", Method("full", {})).as_json()
        told = {key: about[key] for key in MODEL} | {"seed": args.seed}
        run(args, lambda: args.load("LIBERO", keep_all), told)

    return Command(arguments, run_analysis, pruner=False)


COMMANDS |= {f"analyze {name}": _analyze(name) for name in analysis.COMMANDS}
ERRORS = (ValueError, OSError, MemoryError, ServerError, LiberoUnavailable, RecordsError, evaluate.EvaluationError)
"""What is a person's to mend: told in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `openpi`; the exit code: 0 done, 2 told in one line what is wrong, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["analyze"]:
        argv[:2] = [" ".join(argv[:2])]
    if not argv or argv[0] not in COMMANDS:
        asked = not argv or argv[0] in ("-h", "--help")
        print(f"{__doc__}\nCommands: {', '.join(COMMANDS)}; pruners: none, {', '.join(pruners.names())}")
        if not asked:
            print(f"openpi: expected a command, one of {', '.join(COMMANDS)}, got {argv[0]!r}", file=sys.stderr)
        return 0 if asked and argv else 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    for library in ("absl", "jax", "orbax", "websockets"):
        logging.getLogger(library).setLevel(logging.WARNING)
    command, prog = COMMANDS[argv[0]], f"openpi {argv[0]}"
    try:
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
