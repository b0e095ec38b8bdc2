"""What Ray costs: evaluation and serving on clusters of 1, 2 and 3 nodes of this machine, in turns with no cluster.

    python benchmarks/cluster.py toys --out benchmarks/results/cluster_toy_cpu.json
    python benchmarks/cluster.py libero --tasks 0 1 --trials 2 --out benchmarks/results/cluster_libero_cpu.json

toys: a policy and a simulator that sleep. A control step is one question to the policy; its overhead is the time in
which neither sleeps. An episode's is what lies between two records, the handing out of the next one included. Then a
server that computes nothing, asked directly and through Ray Serve, and the processor time that its proxy takes.
libero: the embedded policy in LIBERO, here and on two nodes; every field of a record must be the same but the times.

All nodes are on this machine and share its cores: what is seen is overhead, never speed-up. Every cluster takes turns
with the same work without it, and ratios are medians over rounds. Ray's workers run at the niceness of everything else
here, not at their usual 15. Exit code 1 if records differ.
"""

import contextlib
import dataclasses
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cluster_toys as toys
import numpy as np
import tyro
import websockets.sync.client
from nothing import Nothing, server_of_nothing
from ray.cluster_utils import Cluster
from record import begin, write
from serving import WARM, asked

from safe_pruner_jax.cli.arguments import parse
from safe_pruner_jax.cli.evaluate import Evaluate
from safe_pruner_jax.cluster.connect import connected
from safe_pruner_jax.cluster.crew import Nodes
from safe_pruner_jax.cluster.evaluate import load
from safe_pruner_jax.cluster.serve import service
from safe_pruner_jax.evaluation.crew import Crew, Message, Processes
from safe_pruner_jax.evaluation.evaluate import episodes, play
from safe_pruner_jax.evaluation.records import Record, RecordFile
from safe_pruner_jax.evaluation.rollout import Episode
from safe_pruner_jax.evaluation.sources import Source, local, noise_of
from safe_pruner_jax.libero.simulator import provenance
from safe_pruner_jax.policy.identity import Configuration, identity
from safe_pruner_jax.policy.spec import Model
from safe_pruner_jax.robots.configs import replan_of
from safe_pruner_jax.serving import pack, unpack

SUITE = "libero_object"
TIMES = ("seconds", "infer_ms")
"""Fields of a record that tell the time; all others must be the same here and there."""
FRONTS = ("ray::ProxyActor", "haproxy")
"""Commands of what may stand before the replicas: Ray's proxy, or HAProxy with RAY_SERVE_ENABLE_HA_PROXY=1."""
TOY = Configuration(
    pruner="full",
    choices={},
    plan={"cut": None},
    policy="toy",
    checkpoint="none",
    precision="float32",
    num_steps=10,
    prompt_lengths=(16,),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toys:
    """A policy and a simulator that sleep.

    Args:
      nodes: sizes of the clusters.
      rounds: of each kind.
      episodes: per round and simulator.
      policy_ms: of a policy call.
      step_ms: of a simulator's step.
      steps: of an episode; a call every five.
      requests: to a server, per round and robot.
      note: about the machine, for the result file.
      out: result file, JSON.
    """

    nodes: tuple[int, ...] = (1, 2, 3)
    rounds: int = 5
    episodes: int = 6
    policy_ms: float = 50.0
    step_ms: float = 20.0
    steps: int = 60
    requests: int = 100
    note: str = ""
    out: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Libero:
    """The embedded policy in LIBERO.

    Args:
      tasks: of libero_object.
      trials: initial states of each.
      max_steps: of an episode.
      pruner: of the policy.
      rounds: of each kind.
      note: about the machine, for the result file.
      out: result file, JSON.
    """

    tasks: tuple[int, ...] = (0, 1)
    trials: int = 2
    max_steps: int | None = None
    pruner: str = "safe"
    rounds: int = 1
    note: str = ""
    out: Path | None = None


# --- clusters ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(nodes: int, cores: int = 2) -> Iterator[Cluster]:
    """A cluster of this machine, which this process then drives; every node says that it has `cores`."""
    path = os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path))
    os.environ["PYTHONPATH"] = path
    node = {"num_cpus": cores, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node | {"_system_config": {"worker_niceness": 0}})
    try:
        for _ in range(nodes - 1):
            made.add_node(**node)
        with connected(made.address):
            yield made
    finally:
        made.shutdown()


class Heard:
    """A crew whose episodes are kept, each with the moment at which it was over."""

    def __init__(self, crew: Crew):
        self._crew = crew
        self.episodes: list[tuple[float, Episode]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._crew, name)

    def listen(self) -> Iterator[Message]:
        """The crew's."""
        for simulator, kind, content in self._crew.listen():
            if kind == "episode":
                self.episodes.append((time.perf_counter(), content))
            yield simulator, kind, content


def quartiles(values: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles and number."""
    low, middle, high = (round(float(q), 4) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": middle, "low": low, "high": high, "runs": len(values)}


# --- evaluation --------------------------------------------------------------------------------------------


def played(crew: Crew, workers: int, number: int) -> dict[str, Any]:
    """Plays toy episodes; milliseconds of the calls, seconds between two ends, and between the first and the last."""
    heard = Heard(crew)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, RecordFile(Path(folder, "records.jsonl"), TOY) as file:
        play(episodes(SUITE, (0,), number * workers), file, Source(device="toy"), workers=workers, crew=heard)
    ends = [when for when, _ in heard.episodes]
    return {
        "call_ms": [call.seconds * 1e3 for _, episode in heard.episodes for call in episode.calls[1:]],
        "episode_s": (ends[-1] - ends[0]) / (len(ends) - 1),
        "first_s": ends[0] - started,
        "all_s": ends[-1] - started,
    }


def evaluation(args: Toys, nodes: int) -> dict[str, Any]:
    """One policy, and as many simulators as nodes, with a cluster and without."""
    make_env = toys.MakeEnv(args.step_ms / 1e3, args.steps)
    here = lambda: Processes(Source(robots=toys.Robots(args.policy_ms / 1e3), device="toy"), make_env)
    load_toy, look = toys.Load(args.policy_ms / 1e3), toys.look
    there = lambda: Nodes(load_toy, toys.IDENTITY, toys.SIMULATOR, policies=1, make_env=make_env, look=look)
    rounds = [
        {"here": played(here(), nodes, args.episodes), "ray": played(there(), nodes, args.episodes)}
        for _ in range(args.rounds)
    ]
    calls = {kind: [statistics.median(r[kind]["call_ms"]) for r in rounds] for kind in ("here", "ray")}
    more_ms = [there - here for there, here in zip(calls["ray"], calls["here"], strict=True)]
    ratios = [r["ray"]["episode_s"] / r["here"]["episode_s"] - 1 for r in rounds]
    return {
        "call_ms": {kind: quartiles(values) for kind, values in calls.items()},
        "overhead_per_call_ms": quartiles(more_ms),
        "overhead_per_episode": quartiles(ratios),
        "episodes_per_minute": {k: quartiles([60 / r[k]["episode_s"] for r in rounds]) for k in ("here", "ray")},
        "until_the_first_episode_s": {k: quartiles([r[k]["first_s"] for r in rounds]) for k in ("here", "ray")},
    }


# --- serving -----------------------------------------------------------------------------------------------


def robot(port: int, requests: int, times: list[float]) -> None:
    """Asks as fast as it is answered; milliseconds."""
    message = pack(asked(np.random.default_rng(0), 0, step=1))
    with websockets.sync.client.connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
        connection.recv(60)
        for step in range(requests + WARM):
            start = time.perf_counter()
            connection.send(message)
            unpack(connection.recv(60))
            if step >= WARM:
                times.append((time.perf_counter() - start) * 1e3)


def drive(port: int, robots: int, requests: int) -> dict[str, float]:
    """Several robots at once: median round trip, and replies per second of all."""
    times: list[float] = []
    threads = [threading.Thread(target=robot, args=(port, requests, times)) for _ in range(robots)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    return {"ms": statistics.median(times), "per_s": robots * (requests + WARM) / seconds}


def front_s() -> float:
    """Processor seconds so far of all fronts of Ray Serve; Linux."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            command = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
            if int(entry.name) and any(name in command for name in FRONTS):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def serving(args: Toys, nodes: int) -> dict[str, Any]:
    """One replica per node behind one proxy, and one server without; one robot, then one per replica and one more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result: dict[str, Any] = {}
    with server_of_nothing() as direct, service(Nothing, replicas=(nodes, nodes), port=port, everywhere=False):
        for robots in (1, nodes + 1):
            rounds, proxy_ms = [], []
            for _ in range(args.rounds):
                here, before = drive(direct, robots, args.requests), front_s()
                through = drive(port, robots, args.requests)
                used = front_s() - before
                proxy_ms.append(used / (robots * (args.requests + WARM)) * 1e3)
                rounds.append({"here": here, "ray": through})
            result[f"{robots} robot{'s' * (robots > 1)}"] = {
                "round_trip_ms": {k: quartiles([r[k]["ms"] for r in rounds]) for k in ("here", "ray")},
                "overhead_per_reply_ms": quartiles([r["ray"]["ms"] - r["here"]["ms"] for r in rounds]),
                "replies_per_s": {k: quartiles([r[k]["per_s"] for r in rounds]) for k in ("here", "ray")},
                "proxy_processor_ms": quartiles(proxy_ms),
            }
    return result


# --- the commands ------------------------------------------------------------------------------------------


def measure_toys(args: Toys) -> tuple[dict[str, Any], int]:
    """Overheads for every size of the cluster."""
    result = {}
    for nodes in args.nodes:
        with cluster(nodes):
            result[f"{nodes} node{'s' * (nodes > 1)}"] = {
                "evaluation": evaluation(args, nodes),
                "serving": serving(args, nodes),
            }
    return result, 0


def alike(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What must be the same on every machine."""
    return [{k: v for k, v in dataclasses.asdict(record).items() if k not in TIMES} for record in records]


def measure_libero(args: Libero) -> tuple[dict[str, Any], int]:
    """Seconds of an episode and of a call, here and on two nodes, and whether records are the same but for times."""
    command = ["--suite", SUITE, f"--pruner={args.pruner}", "policy:embedded"]
    evaluate, method = parse(Evaluate, command, "openpi evaluate")
    model = Model(**{field.name: getattr(evaluate, field.name) for field in dataclasses.fields(Model)})
    protocol = {"replan": replan_of(model.named("LIBERO")[0]), "max_steps": args.max_steps}
    method = model.fit("LIBERO", method, executed=protocol["replan"])
    config = model.describe("LIBERO", method)
    config = dataclasses.replace(config, noise=noise_of(0), simulator=provenance(), **protocol)
    jobs = episodes(SUITE, args.tasks, args.trials, **protocol)
    source = local(model.load("LIBERO", method.make()), config, batch=1, seed=0)
    kinds: dict[str, Callable[[], Any]] = {
        "here": lambda: Processes(source),
        "ray": lambda: Nodes(partial(load, model, method, 1, 0), identity(config.as_json()), provenance(), policies=1),
    }
    seen: dict[str, list] = {kind: [] for kind in kinds}
    records: dict[str, list] = {kind: [] for kind in kinds}
    with cluster(2):
        for _ in range(args.rounds):
            for kind, crew in kinds.items():
                heard = Heard(crew())
                with tempfile.TemporaryDirectory() as folder, RecordFile(Path(folder, "r.jsonl"), config) as file:
                    play(jobs, file, source, workers=1, crew=heard)
                    records[kind].append([r for _, r in sorted(file.records.items())])
                seen[kind].append([episode for _, episode in heard.episodes])
    same = all(alike(some) == alike(records["here"][0]) for rounds in records.values() for some in rounds)
    calls = lambda some: [call.seconds * 1e3 for one in some for episode in one for call in episode.calls[WARM:]]
    beside = lambda some: [
        c.seconds * 1e3 - c.timing["policy_timing"]["infer_ms"] for one in some for e in one for c in e.calls[WARM:]
    ]
    return {
        "outcomes": [f"{r.suite} {r.task} {r.trial}: {r.outcome}, {r.steps} steps" for r in records["here"][0]],
        "same_records": same,
        "call_ms": {kind: quartiles(calls(some)) for kind, some in seen.items()},
        "beside_the_policy_ms": {kind: quartiles(beside(some)) for kind, some in seen.items()},
        "episode_s": {kind: quartiles([e.seconds for one in some for e in one]) for kind, some in seen.items()},
    }, int(not same)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    args = tyro.extras.subcommand_cli_from_dict({"toys": Toys, "libero": Libero}, args=arguments, description=__doc__)
    record = begin("cluster.py", args.note, ("ray", "jax", "numpy", "websockets"))
    measured, code = measure_toys(args) if isinstance(args, Toys) else measure_libero(args)
    settings = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("out", "note")}
    write(record | {"settings": settings, "measured": measured}, args.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
