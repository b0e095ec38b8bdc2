"""How many accelerators a fleet of robots needs: queues simulated, with a seed, from times that were measured.

    python scripts/plan_fleet.py pi05-h100 --out benchmarks/results/plan_pi05_h100.json
    python scripts/plan_fleet.py pi05-h100-proxy --out benchmarks/results/plan_pi05_h100_proxy.json
    python scripts/plan_fleet.py mini-cpu --robots 1 3 10 --hz 5 10
    python scripts/plan_fleet.py pi05-h100 --costs.pruned-ms 12 --costs.source "openpi bench, my GPU" --robots 40

A robot asks `hz` times a second, on the clock, whether or not it has been answered. Its request passes

    its own link → the front's network → the front's proxy → the replica's network → checks → the queue → a step

each of them first come, first served; steps are joined as `serving/scheduler.py` joins them, keyframes and pruned rows
padded as the engine pads them. An allotment is enough if 99 % of the requests are answered within `within` periods. The
smallest one that is enough is found by halving, robots spread evenly. `front` head: all robots connect to one machine,
which passes everything on; each: a balancer spreads them over the nodes, and each node's proxy prefers its own replica.
Not in it: a network shared with others, robots that come and go, failures, several kinds of robots.
"""

import dataclasses
import json
import sys
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

WATCHED = 20
"""Replicas whose queues are simulated, the fullest; the others are no fuller."""
WARM = 0.1
"""Share of the time at the beginning that is not counted."""
PADDED = (1, 2, 4, 8, 16)
"""Rows that programs are compiled for."""

Front = Literal["each", "head"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a request takes, in milliseconds.

    Args:
      source: where these numbers are from.
      pruned_ms: a pruned step of one robot.
      pruned_row_ms: each further robot in it.
      keyframe_ms: a keyframe of one robot.
      keyframe_row_ms: each further robot in it.
      keyframes: share of requests that are keyframes.
      limit: robots per step.
      host_ms: reading and checking a request, beside the device.
      front_ms: processor time of a proxy per request; a proxy is one thread.
      ray_ms: what a reply through Ray Serve takes beyond that of one server, its proxy's time included.
    """

    source: str
    pruned_ms: float
    pruned_row_ms: float
    keyframe_ms: float
    keyframe_row_ms: float
    keyframes: float
    limit: int
    host_ms: float
    front_ms: float
    ray_ms: float

    def step_s(self, pruned: int, keyframes: int) -> float:
        """Seconds of a step with so many rows of each kind."""
        ms = 0.0
        for rows, one, more in (
            (pruned, self.pruned_ms, self.pruned_row_ms),
            (keyframes, self.keyframe_ms, self.keyframe_row_ms),
        ):
            if rows:
                ms += one + more * (next(p for p in PADDED if p >= rows) - 1)
        return ms / 1e3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is simulated.

    Args:
      costs: of a request.
      robots: sizes of the fleet.
      hz: requests of a robot per second.
      gbit: network of every node, Gbit/s.
      front: where robots connect.
      request_kb: size of a request, kB; two pictures of 224 × 224 are 301.
      robot_gbit: the link of a robot, Gbit/s.
      wire_ms: there and back without any load.
      per_node: accelerators on a node; they share its network and its proxy.
      within: periods within which 99 % are answered.
      delay_ms: how long a request waits for others to join its step (--serving.max-delay-ms).
      jitter: of a robot's clock, standard deviation in periods.
      seconds: simulated.
      seed: of phases, jitter and keyframes.
      out: result file, JSON.
    """

    costs: Costs
    robots: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    hz: tuple[float, ...] = (5, 10, 20)
    gbit: tuple[float, ...] = (1, 10)
    front: tuple[Front, ...] = ("each", "head")
    request_kb: float = 301.0
    robot_gbit: float = 1.0
    wire_ms: float = 0.5
    per_node: int = 1
    within: float = 1.0
    delay_ms: float = 5.0
    jitter: float = 0.02
    seconds: float = 20.0
    seed: int = 0
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One fleet on one allotment."""

    robots: int
    accelerators: int
    hz: float
    gbit: float
    front: Front


def queue(arrivals: np.ndarray, service_s: float) -> np.ndarray:
    """When each leaves a queue of one server; arrivals [n] ascending, seconds."""
    place = np.arange(len(arrivals))
    return (place + 1) * service_s + np.maximum.accumulate(arrivals - place * service_s)


def queues(arrivals: np.ndarray, group: np.ndarray, service_s: float) -> np.ndarray:
    """The same for a queue per group, [n], each."""
    left = np.empty_like(arrivals)
    for one in np.unique(group):
        mine = np.flatnonzero(group == one)
        mine = mine[np.argsort(arrivals[mine], kind="stable")]
        left[mine] = queue(arrivals[mine], service_s)
    return left


def steps(
    arrivals: Sequence[float], keyframes: Sequence[bool], costs: Costs, robots: int, delay_s: float
) -> tuple[np.ndarray, float]:
    """When each is answered by one accelerator, and for how long that was busy; arrivals ascending, seconds."""
    answered, free, busy, i = np.empty(len(arrivals)), 0.0, 0.0, 0
    together = min(costs.limit, robots)
    while i < len(arrivals):
        start = max(arrivals[i], free)
        if robots > 1:
            last = arrivals[i + together - 1] if i + together <= len(arrivals) else np.inf
            start = max(start, min(last, arrivals[i] + delay_s))
        j = min(bisect_right(arrivals, start), i + costs.limit)
        full = sum(keyframes[i:j])
        seconds = costs.step_s(j - i - full, full)
        free, busy = start + seconds, busy + seconds
        answered[i:j] = free
        i = j
    return answered, busy


def simulate(plan: Plan, case: Case) -> tuple[np.ndarray, dict[str, float]]:
    """Seconds from a request to its reply, of the robots at the fullest replicas; and how busy everything was."""
    rng, costs = np.random.default_rng((plan.seed, case.robots)), plan.costs
    count = int(plan.seconds * case.hz)
    watched = min(WATCHED, case.accelerators)
    everybody = case.front == "head"  # all of them are in one queue
    robot = np.arange(case.robots)
    if not everybody:
        nodes = -(-watched // plan.per_node)
        robot = robot[robot % case.accelerators < nodes * plan.per_node]
    phase = rng.random((case.robots, 1))[robot]
    ticks = phase + np.arange(count) + plan.jitter * rng.standard_normal((len(robot), count))
    asked = ticks.clip(0).ravel() / case.hz
    replica = np.repeat(robot % case.accelerators, count)
    keyframe = rng.random(len(asked)) < costs.keyframes
    size = plan.request_kb * 8e3
    per_request, proxy_s = size / (case.gbit * 1e9), costs.front_ms / 1e3
    at = asked + size / (plan.robot_gbit * 1e9)
    if everybody:
        for service in (per_request, proxy_s, per_request):  # in, through the proxy, out again
            at = queues(at, np.zeros(len(at)), service)
        mine = replica < watched
        asked, replica, keyframe, at = asked[mine], replica[mine], keyframe[mine], at[mine]
    at = queues(at, replica // plan.per_node, per_request)
    if not everybody:
        at = queues(at, replica // plan.per_node, proxy_s)
    at = at + (costs.host_ms + plan.wire_ms + max(0.0, costs.ray_ms - costs.front_ms)) / 1e3
    answered, busy = np.full(len(at), np.nan), 0.0
    for one in range(watched):
        mine = np.flatnonzero(replica == one)
        mine = mine[np.argsort(at[mine], kind="stable")]
        fleet = -(-(case.robots - one) // case.accelerators)
        answered[mine], seconds = steps(at[mine].tolist(), keyframe[mine].tolist(), costs, fleet, plan.delay_ms / 1e3)
        busy = max(busy, seconds / plan.seconds)
    counted = (asked > WARM * plan.seconds) & ~np.isnan(answered)
    through = case.robots if everybody else plan.per_node * -(-case.robots // case.accelerators)
    load = {"accelerator": busy, "network": through * case.hz * per_request, "proxy": through * case.hz * proxy_s}
    return (answered - asked)[counted], load


def enough(plan: Plan, case: Case) -> tuple[bool, dict]:
    """Whether 99 % are answered in time, and what was seen."""
    waited, load = simulate(plan, case)
    middle, late = np.quantile(waited, (0.5, 0.99))
    seen = {"p50_ms": round(middle * 1e3, 2), "p99_ms": round(late * 1e3, 2)}
    return bool(late <= plan.within / case.hz), seen | {f"{name}_load": round(v, 3) for name, v in load.items()}


def smallest(plan: Plan, robots: int, hz: float, gbit: float, front: Front) -> dict:
    """The fewest accelerators that are enough; without any number that is, what stands in the way."""
    case = lambda accelerators: Case(robots, accelerators, hz, gbit, front)
    row = {"robots": robots, "hz": hz, "gbit": gbit, "front": front}
    fits, seen = enough(plan, case(robots))
    if not fits:
        shared = {name: seen[f"{name}_load"] for name in ("network", "proxy")}
        name = max(shared, key=lambda name: shared[name])
        return row | {"accelerators": None, "breaks": name if shared[name] > 0.8 else "a step alone is too long"} | seen
    low, high = 0, robots  # `low` is not enough, `high` is
    while high - low > 1:
        middle = (low + high) // 2
        fits, found = enough(plan, case(middle))
        low, high, seen = (low, middle, found) if fits else (middle, high, seen)
    return row | {"accelerators": high} | seen


def table(rows: Sequence[dict], front: Front) -> str:
    """Markdown: accelerators and p99 for every fleet, rate and network."""
    of = {(r["robots"], r["gbit"], r["hz"]): r for r in rows if r["front"] == front}
    columns = list(dict.fromkeys((gbit, hz) for _, gbit, hz in of))
    lines = ["| robots | " + " | ".join(f"{gbit:g} GbE, {hz:g} Hz" for gbit, hz in columns) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for robots in dict.fromkeys(robots for robots, *_ in of):
        cells = []
        for column in columns:
            row = of[robots, *column]
            n = row["accelerators"]
            cells.append(f"– ({row['breaks']})" if n is None else f"{n} ({row['p99_ms']:.0f} ms)")
        lines.append(f"| {robots} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def most(plan: Plan, gbit: float) -> dict[str, float]:
    """Requests per second at which one front is full."""
    return {"network": gbit * 1e9 / (plan.request_kb * 8e3), "proxy": 1e3 / plan.costs.front_ms}


H100 = Costs(
    source=(
        "steps: MODELLED for an H100 from compiled launches, pi0.5 at full size, bfloat16, safe at 0.2, all kernels "
        "at 1.5 us per kernel (docs/performance.md, launches_pi05_kernels.json); each further row: its products at "
        "half of the data sheet's 989 TFLOP/s (645 and 1295 G multiply-adds); keyframes: docs/results.md, 30 %; "
        "host_ms: MEASURED on two CPU cores (serving_mini_cpu.json); front_ms, ray_ms: MEASURED on two cores of an AMD "
        "EPYC, Ray 2.60.0 behind HAProxy (cluster_haproxy_cpu.json)"
    ),
    pruned_ms=6.4,
    pruned_row_ms=2.6,
    keyframe_ms=7.9,
    keyframe_row_ms=5.2,
    keyframes=0.3,
    limit=8,
    host_ms=4.5,
    front_ms=0.3,
    ray_ms=0.3,
)
MINI = dataclasses.replace(
    H100,
    source=(
        "steps: MEASURED on two CPU cores, the embedded policy of 8.5 M parameters, safe at 0.2 (step_mini_cpu.json: "
        "51.2 and 64.8 ms alone, 135.3 and, without a pruner, 169.6 ms for four); host_ms: MEASURED "
        "(serving_mini_cpu.json); keyframes: docs/results.md, 30 %; front_ms, ray_ms: MEASURED there with Ray 2.60.0 "
        "behind HAProxy (cluster_haproxy_cpu.json)"
    ),
    pruned_ms=51.2,
    pruned_row_ms=28.0,
    keyframe_ms=64.8,
    keyframe_row_ms=36.2,
)
PROXY = dataclasses.replace(
    H100,
    source=H100.source.replace(
        "behind HAProxy (cluster_haproxy_cpu.json)", "with its own proxy (cluster_toy_cpu.json)"
    ),
    front_ms=4.2,
    ray_ms=7.6,
)

PRESETS = {
    "pi05-h100": ("π0.5 on H100s that nobody has measured: modelled steps", Plan(H100)),
    "pi05-h100-proxy": ("the same behind Ray's own proxy instead of HAProxy", Plan(PROXY)),
    "mini-cpu": ("the embedded policy on nodes of two CPU cores: measured steps", Plan(MINI)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    plan = tyro.extras.overridable_config_cli(PRESETS, args=arguments, description=__doc__)
    rows = [
        smallest(plan, robots, hz, gbit, front)
        for front in plan.front
        for gbit in plan.gbit
        for hz in plan.hz
        for robots in plan.robots
    ]
    for front in plan.front:
        print(f"\n{'A proxy on each node' if front == 'each' else 'All robots at one machine'}\n\n{table(rows, front)}")
    full = {f"{gbit:g} GbE": {name: round(rate, 1) for name, rate in most(plan, gbit).items()} for gbit in plan.gbit}
    print(f"\nOne front is full at so many requests per second: {full}\nCosts: {plan.costs.source}")
    if plan.out is not None:
        settings = dataclasses.asdict(dataclasses.replace(plan, out=None))
        command = " ".join(["python", "scripts/plan_fleet.py", *(sys.argv[1:] if arguments is None else arguments)])
        result = {"command": command, "kind": "simulated", "settings": settings, "full_at": full, "rows": rows}
        plan.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
