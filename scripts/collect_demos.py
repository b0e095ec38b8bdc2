"""Collects demonstrations of the scripted expert in LIBERO, in LIBERO's own file format.

python scripts/collect_demos.py --suite libero_object --tasks 0 3 --episodes 50 --out demos [--workers 2]

Writes <out>/<suite>/<task name>_demo.hdf5 per task and one line per attempt to <out>/<suite>/attempts.jsonl.
Only successful episodes are kept. Start it again with the same arguments and it goes on where it was: what is on
disk is complete, whatever happened to the process. docs/demonstrations.md says what is in the files.
"""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from safe_pruner_jax.libero.demonstrations import merge_demos, seeds, write_demos

if TYPE_CHECKING:
    from safe_pruner_jax.libero.env import LiberoEnv

SEEDS_PER_RUN = 1_000_000  # episode k of a run has the seed `seed` · this + k
SETTINGS = ("suite", "noise", "pushes", "size", "every", "led_by")  # of one folder
DEATHS_IN_A_ROW = 3  # of one worker, before the run is given up
SPACE = 2**30  # bytes that must be free before an episode is started


@dataclasses.dataclass(frozen=True)
class Args:
    """What to collect.

    Args:
      suite: benchmark suite.
      tasks: indices; all that the expert supports if none are given.
      episodes: successful episodes wanted per task.
      noise: standard deviation of the Gaussian noise on the six executed motion commands.
      pushes: how often the arm is pushed aside for some steps, per 100 steps. Teaches to come back.
      size: pixels per side of the stored frames.
      every: frames of every so many-th step only; rendering is most of the cost, and more episodes teach more than more
        frames of one. LIBERO's own files, and what reads them, have 1.
      led_by: folder of a checkpoint that plays the first 20 to 200 steps, unrecorded, or "embedded"; the expert is
        recorded from there on. Teaches a policy the way out of its own mistakes.
      config: configuration of that checkpoint.
      workers: processes; as many as there are cores.
      seed: runs with different seeds have different episodes.
      out: folder.
    """

    suite: str = "libero_object"
    tasks: tuple[int, ...] = ()
    episodes: int = 50
    noise: float = 0.08
    pushes: float = 0.0
    size: int = 224
    every: int = 1
    led_by: str | None = None
    config: str = "mini_libero"
    workers: int = 2
    seed: int = 0
    out: Path = Path("demos")


class Ledger:
    """Which seeds of one task are done, under way, and needed; shared by the threads that feed the workers."""

    def __init__(self, folder: Path, log: Path, task: int, name: str, args: Args):
        self.task, self.name, self.wanted = task, name, args.episodes
        self.file, self.folder = folder / f"{name}_demo.hdf5", folder / name
        self._seeds = range(args.seed * SEEDS_PER_RUN, (args.seed + 1) * SEEDS_PER_RUN)
        kept = set(seeds(self.file)) if self.file.exists() else set()
        kept |= {int(path.stem) for path in self.folder.glob("*.hdf5")}
        attempts = [entry for entry in read_log(log) if entry["task"] == task]
        self.successes = len(kept)
        self.tried = kept | {entry["seed"] for entry in attempts if entry["outcome"] != "error"}
        ended = lambda outcome: len({entry["seed"] for entry in attempts if entry["outcome"] == outcome})
        self.failures, self.solved, self.errors, self.under_way = ended("failure"), ended("solved"), 0, 0

    @property
    def hopeless(self) -> bool:
        """So few successes that the wanted number is out of reach."""
        return self.failures + self.errors > 2 * self.wanted + 8 or self.solved > 20 * self.wanted

    def take(self) -> int | None:
        """The next seed to play; None while enough are done or under way."""
        if self.successes + self.under_way >= self.wanted or self.hopeless:
            return None
        seed = next((seed for seed in self._seeds if seed not in self.tried), None)
        if seed is not None:
            self.tried.add(seed)
            self.under_way += 1
        return seed

    def give(self, outcome: str) -> None:
        """Books the outcome of a seed that was taken."""
        self.under_way -= 1
        self.successes += outcome == "success"
        self.failures += outcome == "failure"
        self.solved += outcome == "solved"  # by the policy that led, before it was the expert's turn
        self.errors += outcome == "error"

    def merge(self) -> int:
        """Moves the single episodes into the task's file; returns how many that has."""
        single = sorted(self.folder.glob("*.hdf5"), key=lambda path: int(path.stem))
        if single:
            merge_demos([*([self.file] if self.file.exists() else []), *single], self.file)
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.successes


class Collection:
    """One run over one suite.

    Args:
      args: what to collect.
      names: task index -> name.
      worker: command line of a worker: it reads jobs and writes outcomes, one line of JSON each.
    """

    def __init__(self, args: Args, names: dict[int, str], worker: Sequence[str]):
        self._args, self._worker = args, list(worker)
        self._folder = args.out / args.suite
        self._folder.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        self._log = self._folder / "attempts.jsonl"
        self._ledgers = [Ledger(self._folder, self._log, task, name, args) for task, name in names.items()]
        self._changed, self._trouble = threading.Condition(), []
        self._processes: list[subprocess.Popen] = []
        self._start = time.perf_counter()

    def run(self) -> bool:
        """Plays until every task has its episodes; returns whether that was reached without trouble."""
        threads = [threading.Thread(target=self._feed, daemon=True) for _ in range(self._args.workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            self._trouble = self._trouble or (["interrupted"] if any(t.is_alive() for t in threads) else [])
            for process in self._processes:
                process.kill()
                process.wait()
        for ledger in self._ledgers:
            count = ledger.merge()
            print(
                f"{ledger.name}: {count}/{ledger.wanted} episodes, {ledger.failures} failures, {ledger.errors} errors"
            )
        for line in self._trouble:
            print(f"gave up: {line}", file=sys.stderr)
        return not self._trouble and all(ledger.successes >= ledger.wanted for ledger in self._ledgers)

    def _check_settings(self) -> None:
        """Episodes of different settings do not belong in one folder."""
        settings = self._settings()
        file = self._folder / "settings.json"
        if not file.exists():
            file.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        elif (stored := {"pushes": 0.0} | json.loads(file.read_text(encoding="utf-8"))) != settings:
            raise SystemExit(f"{self._folder} was collected with {stored}, not {settings}: choose another --out")

    def _settings(self) -> dict[str, Any]:
        given = {key: getattr(self._args, key) for key in SETTINGS}
        return {key: value for key, value in given.items() if value is not None}

    def _job(self) -> tuple[Ledger, int] | None:
        """The next attempt, or None when there will be none; waits while the last ones may still fail."""
        with self._changed:
            while not self._trouble:
                for ledger in self._ledgers:
                    if (seed := ledger.take()) is not None:
                        return ledger, seed
                if not any(ledger.under_way for ledger in self._ledgers):
                    break
                self._changed.wait()
        return None

    def _feed(self) -> None:
        """One worker's life: gives it attempts, starts it again if it dies."""
        process, deaths = None, 0
        while (attempt := self._job()) is not None:
            ledger, seed = attempt
            reply: dict[str, Any] = {}
            try:
                if process is None or process.poll() is not None:
                    process = subprocess.Popen(
                        self._worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
                    )
                    self._processes.append(process)
                job = {"task": ledger.task, "seed": seed, "path": str(ledger.folder / f"{seed}.hdf5")}
                job |= {"config": self._args.config, **self._settings()}
                print(json.dumps(job), file=process.stdin, flush=True)
                line = process.stdout.readline()
                reply = json.loads(line) if line.endswith("\n") else {}
            except (OSError, ValueError) as error:
                reply = {"outcome": "error", "error": f"{type(error).__name__}: {error}"}
            if not reply:
                reply = {"outcome": "error", "error": f"the worker died, exit code {process.wait()}"}
                deaths += 1
            elif reply["outcome"] != "error":
                deaths = 0
            with self._changed:
                ledger.give(reply["outcome"])
                self._note(ledger, {"task": ledger.task, "seed": seed, **reply})
                if deaths >= DEATHS_IN_A_ROW:
                    self._trouble.append(f"{deaths} workers died in a row")
                elif (free := shutil.disk_usage(self._folder).free) < SPACE:
                    self._trouble.append(f"only {free // 2**20} MiB are free in {self._folder}")
                self._changed.notify_all()
        if process is not None:
            process.stdin.close()
            process.wait()

    def _note(self, ledger: Ledger, entry: dict[str, Any]) -> None:
        """Says what came of an attempt, on the screen and in the log."""
        steps, seconds = entry.get("steps", 0), entry.get("seconds", 0.0)
        elapsed = time.perf_counter() - self._start
        print(
            f"[{elapsed:6.0f} s] task {ledger.task} seed {entry['seed']}: {entry['outcome']} {entry.get('error', '')}"
            f" {steps} steps {seconds:.1f} s | {ledger.successes}/{ledger.wanted},"
            f" {ledger.failures} failures, {ledger.errors} errors",
            flush=True,
        )
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            self._trouble.append(f"{self._log}: {error}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The attempts in a log; a line that was cut off is not one."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def work() -> None:
    """A worker: jobs on stdin, outcomes on what was stdout, until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the simulator prints
    from safe_pruner_jax.libero.env import LIMITS, LiberoEnv, load_task

    env: LiberoEnv | None = None
    built: tuple | None = None
    for line in sys.stdin:
        job, start = json.loads(line), time.perf_counter()
        reply: dict[str, Any] = {"outcome": "error"}
        try:
            what = (job["suite"], job["task"], job["size"])
            if built != what:
                if env is not None:
                    env.close()
                env, built = None, None
                task = load_task(job["suite"], job["task"])
                most = LIMITS[job["suite"]] * (2 if "led_by" in job else 1)
                env = LiberoEnv(task, observed_size=job["size"], max_steps=most)
                built = what
            reply = _play(env, job)
        except Exception as error:  # the attempt is lost, the worker is not
            reply["error"] = f"{type(error).__name__}: {error}"[:300]
            built = None  # start from a fresh environment
        reply["seconds"] = round(time.perf_counter() - start, 2)
        print(json.dumps(reply), file=replies, flush=True)
    if env is not None:
        env.close()


def _play(env: "LiberoEnv", job: dict[str, Any]) -> dict[str, Any]:
    """One job in its environment; a success is written to the job's path."""
    from safe_pruner_jax.libero.expert import demonstrate
    from safe_pruner_jax.libero.simulator import provenance

    first = {"before": _leader(job["config"], job["led_by"])} if "led_by" in job else {}
    how = {key: job[key] for key in ("noise", "pushes", "every")}
    demo, steps = demonstrate(env, job["seed"], **how, **first)
    if demo is not None:
        env_args = {"env_name": type(env.simulator.env).__name__, "bddl_file": env.task.bddl.name}
        env_args |= {"problem_name": env.simulator.problem_name, **how, **provenance()}
        write_demos(job["path"], [demo], env_args)
    outcome = "failure" if steps == env.max_steps else "solved"
    return {"outcome": outcome if demo is None else "success", "steps": steps}


@functools.cache
def _leader(config: str, checkpoint: str) -> Callable[..., None]:
    """What plays before the expert does."""
    from safe_pruner_jax.libero.expert import led_by
    from safe_pruner_jax.policy.embedded import embedded_name
    from safe_pruner_jax.policy.loading import load_policy
    from safe_pruner_jax.pruners import make

    packaged = embedded_name(checkpoint)
    name, folder = (packaged, None) if packaged else (config, checkpoint)
    return led_by(load_policy(name, folder, pruner=make("full"), prompt_lengths=(32,)).session().infer)


def main(args: Args) -> bool:
    from safe_pruner_jax.libero.env import load_task
    from safe_pruner_jax.libero.expert import SUPPORTED

    supported = SUPPORTED.get(args.suite, ())
    if missing := sorted(set(args.tasks) - set(supported)):
        raise SystemExit(f"the expert does not play {args.suite} {missing}; it does: {SUPPORTED}")
    if not supported:
        raise SystemExit(f"the expert does not play {args.suite}; it does: {SUPPORTED}")
    if args.episodes < 1 or args.workers < 1 or min(args.noise, args.pushes, args.seed) < 0:
        raise SystemExit("expected --episodes ≥ 1, --workers ≥ 1, --noise ≥ 0, --pushes ≥ 0, --seed ≥ 0")
    names = {task: load_task(args.suite, task).name for task in args.tasks or supported}
    os.environ.setdefault("LP_NUM_THREADS", "1")  # software OpenGL: one core per process
    return Collection(args, names, [sys.executable, __file__, "--work"]).run()


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        sys.exit(0 if main(tyro.cli(Args, description=__doc__)) else 1)
