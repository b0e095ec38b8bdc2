"""`openpi evaluate`: episodes in LIBERO, one record each."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safe_pruner_jax.cluster.connect import require_ray
from safe_pruner_jax.evaluation import evaluate, sources
from safe_pruner_jax.evaluation.display import Display
from safe_pruner_jax.evaluation.records import RecordFile
from safe_pruner_jax.evaluation.shards import read_shard
from safe_pruner_jax.evaluation.workers import Job
from safe_pruner_jax.libero.env import load_task, num_tasks
from safe_pruner_jax.libero.simulator import provenance
from safe_pruner_jax.libero.suites import LIMITS, package, parent
from safe_pruner_jax.policy.identity import Configuration
from safe_pruner_jax.policy.spec import Method, Model
from safe_pruner_jax.pruners.checks import require
from safe_pruner_jax.robots.configs import CONFIGS, replan_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Model):
    """Play episodes in LIBERO and record each as it ends; the same command again continues.

    Args:
      suite: libero_spatial, libero_object, libero_goal, libero_10, libero_90, or a variant of them, libero_object_swap.
      tasks: tasks of the suite; all of them by default.
      trials: episodes per task, from the benchmark's fixed initial states 0, 1, …
      shard: i/n plays the i-th of n parts of these episodes; "slurm" the part of this task of a job array.
      workers: simulator processes.
      batch: robots per device step; 1 makes results independent of the number of workers to the last bit.
      server: ws://host:port of a policy server that is asked instead of a policy in this process.
      out: records file; one per method, policy and simulator.
      replan: actions executed per policy call; by default 10 for the embedded policy, 5 for others, as openpi's client.
      max_steps: per episode, if fewer than the suite's limit.
      delay: control steps from an observation until its actions are used, in which the robot executes the old ones.
      rtc: real-time chunking: actions continue the old ones.
      retry_errors: play episodes again that ended in an error.
      on: this machine, or the nodes of a Ray cluster.
      address: of the cluster: auto, host:port or ray://host:10001; without it one is started on this machine.
      policies: on the cluster; by default one per accelerator, without any one per node.
      simulators: on the cluster; by default one for every core that is left.
    """

    suite: str
    tasks: tuple[int, ...] = ()
    trials: int = 50
    shard: str = "1/1"
    workers: int = 2
    batch: int = 8
    server: str | None = None
    out: Path = Path("records.jsonl")
    replan: int | None = None
    max_steps: int | None = None
    delay: int = 0
    rtc: bool = False
    retry_errors: bool = False
    on: Literal["here", "ray"] = "here"
    address: str | None = None
    policies: int | None = None
    simulators: int | None = None


def run_evaluate(args: Evaluate, method: Method) -> int | None:
    """Plays what the records file does not have."""
    shard, tasks = read_shard(args.shard, os.environ), _tasks(args)
    args, config, source, method = _configuration(args, method)
    _check(args, config.policy)
    jobs = evaluate.episodes(args.suite, tasks, args.trials, shard=shard, **_protocol(args))
    with RecordFile(args.out, config) as file:
        try:
            if args.on == "ray":
                _on_ray(args, method, config, jobs, file)
            else:
                _here(args, method, config, jobs, file, source)
        except KeyboardInterrupt:
            print(
                f"openpi evaluate: stopped; every finished episode is in {args.out}, the same command continues",
                file=sys.stderr,
            )
            return 130
    return None


def _tasks(args: Evaluate) -> Sequence[int]:
    """The tasks, all of which can be loaded."""
    tasks = args.tasks or range(num_tasks(args.suite))
    for task in tasks:
        load_task(args.suite, task)
    return tasks


def _check(args: Evaluate, policy: str) -> None:
    """Numbers with which no episode could be played; `args.replan` is known by now."""
    for name in ("workers", "batch", "replan"):
        require(getattr(args, name) >= 1, name, "at least 1", getattr(args, name))
    require(args.delay >= 0, "delay", "at least 0", args.delay)
    limit = LIMITS[parent(args.suite)]
    require(args.max_steps is None or 1 <= args.max_steps <= limit, "max_steps", f"1 to {limit}", args.max_steps)
    if policy in CONFIGS:
        chunk, least = CONFIGS[policy].model.action_horizon, max(args.replan, args.delay) + args.delay
        got = args.replan if not args.delay else (args.replan, args.delay)
        hint = f"a chunk of {policy} has {chunk} actions"
        require(least <= chunk, "replan, delay", f"max(replan, delay) + delay of at most {chunk}", got, hint)


def _protocol(args: Evaluate) -> dict[str, Any]:
    return {"replan": args.replan, "max_steps": args.max_steps, "delay": args.delay, "rtc": args.rtc}


def _configuration(args: Evaluate, method: Method) -> tuple[Evaluate, Configuration, sources.Source | None, Method]:
    """The arguments with their `replan`; what is evaluated; a source if it is a server; the method of this policy."""
    source: sources.Source | None = None
    if args.on == "here":
        for name in ("address", "policies", "simulators"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}: expected with --on ray, got it without")
    elif args.server:
        raise ValueError("server: expected policies on the cluster with --on ray, got a server; leave one of them out")
    if args.server:
        expected = (method.name, {k: method.choices[k] for k in method.given}) if method.describe else None
        config, source = sources.remote(args.server, expected, seed=args.seed)
        replan = config.choices.get("executed", replan_of(config.policy)) if args.replan is None else args.replan
        if (executed := config.choices.get("executed", replan)) != replan:
            raise ValueError(
                f"replan: expected {executed} actions per call, which {args.server} counts on, got {replan}; "
                f"start it with --pruner.executed {replan}"
            )
    else:
        replan = replan_of(args.named("LIBERO")[0]) if args.replan is None else args.replan
        method = args.fit("LIBERO", method, executed=replan)
        config = args.describe("LIBERO", method)
        config = dataclasses.replace(config, noise=sources.noise_of(args.seed))
    args = dataclasses.replace(args, replan=replan)
    config = dataclasses.replace(config, simulator=provenance(package(args.suite)), **_protocol(args))
    return args, config, source, method


def _here(
    args: Evaluate,
    method: Method,
    config: Configuration,
    jobs: list[Job],
    file: RecordFile,
    source: sources.Source | None,
) -> None:
    if source is None and evaluate.remaining(jobs, file, args.retry_errors):
        source = sources.local(args.load("LIBERO", method.make()), config, batch=args.batch, seed=args.seed)
    with Display(jobs, file) as display:
        options = {"workers": args.workers, "retry_errors": args.retry_errors, "on_record": display.update}
        evaluate.play(jobs, file, source, **options)


def _on_ray(args: Evaluate, method: Method, config: Configuration, jobs: list[Job], file: RecordFile) -> None:
    require_ray()
    from safe_pruner_jax.cluster.evaluate import play_on_ray

    if not evaluate.remaining(jobs, file, args.retry_errors):
        return
    model = Model(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Model)})
    with Display(jobs, file) as display:
        play_on_ray(
            jobs,
            file,
            config,
            (model, method, args.batch, args.seed),
            address=args.address,
            package=package(args.suite),
            policies=args.policies,
            simulators=args.simulators,
            retry_errors=args.retry_errors,
            on_start=lambda crew: display.note(crew.rates),
            on_record=display.update,
        )
