"""The way to a Ray cluster, and what is there."""

import contextlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any

REACH_S = 5.0
"""Seconds in which a cluster's port must be reached; Ray itself would go on trying for minutes."""


HEAD = "node:__internal_head__"
"""Resource of the head node, which Ray itself gives it."""


class ClusterError(RuntimeError):
    """A cluster that cannot be used; the message says what to do."""


def require_ray() -> Any:
    """The package `ray`; raises ClusterError without it."""
    try:
        import ray
    except ImportError as error:
        raise ClusterError("Ray is not installed: pip install 'safe-pruner-jax[ray]', on every node") from error
    return ray


@contextlib.contextmanager
def connected(address: str | None, **options: Any) -> Iterator[None]:
    """Inside, this process is a driver of a cluster.

    A connection that was there before is used, and stays.

    Args:
      address: "auto" for the cluster that this machine belongs to, host:port, ray://host:10001; None starts one on this
        machine, which ends with the block.
      **options: of `ray.init`.

    Raises:
      ClusterError: no Ray, no cluster, or one of another version of Ray or Python.
    """
    ray = require_ray()
    if ray.is_initialized():
        yield
        return
    _reach(address or "")
    variables = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path))}
    environment = {}
    if not address:  # processes of this machine, as without Ray: no nicer than this one
        environment = {"runtime_env": {"env_vars": variables}, "_system_config": {"worker_niceness": 0}}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            # without "local" it would join any cluster that runs on this machine
            ray.init(address or "local", namespace="safe_pruner", logging_level="WARNING", **environment, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        text = " ".join(str(error).split())
        if "ersion mismatch" in text:
            raise ClusterError(f"address: {address}: {text}; install the same Ray and Python on every node") from error
        raise _none(address, text) from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises ClusterError if nobody listens at host:port or ray://host:port."""
    if found := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address):
        try:
            socket.create_connection((found[1], int(found[2])), REACH_S).close()
        except (OSError, OverflowError) as error:
            raise _none(address, str(error)) from error


def _none(address: str | None, why: str) -> ClusterError:
    return ClusterError(
        f"address: expected a running Ray cluster at {address}, got none ({why[:200]}); start one with ray start"
    )


def read_replicas(text: str) -> tuple[int, int]:
    """(least, most) of "2" or "1..4"; raises ValueError.

    >>> read_replicas("2"), read_replicas("1..4")
    ((2, 2), (1, 4))
    """
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"replicas: expected N, or LEAST..MOST with 1 ≤ LEAST ≤ MOST, got {text!r}")
    return least, most


def head() -> str | None:
    """Id of the head node, in hexadecimal."""
    nodes = require_ray().nodes()
    return next((n["NodeID"] for n in nodes if n["Alive"] and HEAD in n["Resources"]), None)


def alive(node: str) -> bool:
    """Whether a node, by its id in hexadecimal, belongs to the cluster still."""
    return any(n["NodeID"] == node and n["Alive"] for n in require_ray().nodes())


def names() -> dict[str, str]:
    """Node id → address; nodes on one machine are told apart by the beginning of their id."""
    nodes = require_ray().nodes()
    machines = [n["NodeManagerAddress"] for n in nodes if n["Alive"]]
    alone = {n["NodeID"]: machines.count(n["NodeManagerAddress"]) < 2 for n in nodes}
    return {n["NodeID"]: n["NodeManagerAddress"] + ("" if alone[n["NodeID"]] else f"/{n['NodeID'][:6]}") for n in nodes}


def here() -> str:
    """The node of this process, as `names` calls it."""
    return names().get(require_ray().get_runtime_context().get_node_id(), "unknown")


def room(kind: str, cores: int = 1, accelerators: bool = False) -> tuple[int, dict[str, Any]]:
    """How many actors of a kind the cluster holds, and what each of them asks for.

    Args:
      kind: "policy" or "simulator". Where a node offers such a resource (`ray start --resources '{"simulator": 8}'`),
        these actors run on nodes that do, as many as it says.
      cores: CPU cores of each.
      accelerators: give each an accelerator, where the cluster has any.

    Returns:
      Number, and options of `ray.remote`.
    """
    have = require_ray().cluster_resources()
    need: dict[str, Any] = {"num_cpus": cores}
    counts = [int(have.get("CPU", 0) // cores)] if cores else []
    if accelerators and have.get("GPU", 0) >= 1:
        need["num_gpus"] = 1
        counts.append(int(have["GPU"]))
    if kind in have:
        need["resources"] = {kind: 1}
        counts.append(int(have[kind]))
    return min(counts, default=1), need
