"""A Ray cluster on loopback: a head without cores and two nodes of two, which a test may kill; this process drives."""

import contextlib
import os
import secrets
import socket
import time
from pathlib import Path

NODES, CORES = 2, 2
WAIT_S = 300.0
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""The death of a node is known after 1.5 s instead of half a minute."""
NICENESS = {"worker_niceness": 0}
"""Ray's 15 leaves its workers next to nothing of a busy machine."""
SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "include_log_monitor": False}
AGENTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
"""Ports for which a node waits 15 s, until its helpers have started: too short on a busy machine, so they are given."""


class Machines:
    """The cluster; `nodes` are those with cores."""

    def __init__(self, cluster):
        self._cluster, self.address, self._folder = cluster, cluster.address, cluster.head_node.get_session_dir_path()
        self.nodes = []

    def mend(self):
        """Starts what a test has killed."""
        while len(self.nodes) < NODES:
            self.nodes.append(self._cluster.add_node(num_cpus=CORES, **quick(self._folder)))

    def kill(self, node_id=None):
        """Kills a node with all that runs on it, or all of them."""
        for node in [node for node in self.nodes if node_id in (None, node.node_id)]:
            self.nodes.remove(node)
            self._cluster.remove_node(node, allow_graceful=False)


def quick(folder):
    """Options of a node that starts without waiting; `folder` is that of its session."""
    name, ports = secrets.token_hex(28), {agent: free_port() for agent in AGENTS}
    for agent, port in ports.items():
        Path(folder, f"{agent}_{name}").write_text(str(port), encoding="utf-8")
    return {**SMALL, **ports, "env_vars": {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": name}}


@contextlib.contextmanager
def running():
    """The cluster, and this process connected to it."""
    from ray._common.utils import get_default_ray_temp_dir
    from ray.cluster_utils import Cluster

    from safe_pruner_jax.cluster.connect import connected

    root = Path(__file__).parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "tests", root / "benchmarks")))
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "120"  # instead of 5, at the end of which it starts again
    session = f"session_tests_{secrets.token_hex(4)}"
    folder = Path(get_default_ray_temp_dir(), session)
    folder.mkdir(parents=True)
    options = {
        "num_cpus": 0,
        "no_monitor": True,
        "session_name": session,
        "_system_config": HEALTH | NICENESS,
        **quick(folder),
    }
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        machines = Machines(cluster)
        machines.mend()
        with connected(cluster.address):
            yield machines
    finally:
        cluster.shutdown()


def until(condition):
    """Waits for a state that comes sooner or later, on a busy machine much later."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "the expected state did not come"
        time.sleep(0.05)


def free_port():
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
