"""`openpi evaluate`: episodes in LIBERO, one record each."""

import dataclasses
import sys
from pathlib import Path

from safe_pruner_jax.evaluation import evaluate, sources
from safe_pruner_jax.evaluation.display import Display
from safe_pruner_jax.evaluation.records import RecordFile
from safe_pruner_jax.libero.env import load_task, num_tasks
from safe_pruner_jax.libero.simulator import provenance
from safe_pruner_jax.libero.suites import package
from safe_pruner_jax.policy.spec import Method, Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Model):
    """Play episodes in LIBERO and record each as it ends; the same command again continues.

    Args:
      suite: libero_spatial, libero_object, libero_goal, libero_10, libero_90, or a variant of them, libero_object_swap.
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
        if (known := config.choices.get("executed", args.replan)) != args.replan:
            raise ValueError(
                f"replan: expected {known} actions per call, which {args.server} counts on, got {args.replan}; "
                f"start it with --pruner.executed {args.replan}"
            )
    else:
        method = args.fit("LIBERO", method, executed=args.replan)
        config = args.describe("LIBERO", method)
        config = dataclasses.replace(config, noise=sources.noise_of(args.seed))
    config = dataclasses.replace(config, simulator=provenance(package(args.suite)), **protocol)
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
