"""`openpi serve --on ray`: as many replicas of a policy as there are robots for, behind one port.

    with service(make, replicas=(1, 4), port=8000):
        …                            # openpi's clients connect to ws://HEAD:8000

Ray Serve places replicas, routes a connection to the one with the fewest, and scales. What a robot may rely on is that
of one server (docs/wire.md), but that a connection may be closed with 1001 because its replica has to leave: then the
robot connects again.
"""

import contextlib
import dataclasses
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions

from safe_pruner_jax.cluster.board import Board
from safe_pruner_jax.cluster.connect import connected
from safe_pruner_jax.cluster.replica import Service
from safe_pruner_jax.serving import Access, ServerError
from safe_pruner_jax.serving.backend import Backend, SessionMaker
from safe_pruner_jax.serving.scheduler import Terms

logger = logging.getLogger(__name__)

NAME = "openpi"
"""Of the application in Ray Serve."""

LEAVE_S = 10.0
"""Seconds beyond the drain after which Serve ends a replica whatever it is at."""


@contextlib.contextmanager
def service(
    make: Callable[[], Backend | SessionMaker],
    *,
    replicas: tuple[int, int] = (1, 1),
    robots: int = 8,
    host: str = "127.0.0.1",
    port: int = 8000,
    access: Access | None = None,
    tls_files: tuple[str, str] | None = None,
    terms: Terms | None = None,
    address: str | None = None,
    cores: int = 1,
    scale_s: tuple[float, float] = (10.0, 300.0),
    everywhere: bool = True,
    **options: Any,
) -> Iterator[None]:
    """A running service; when the block ends, what waits is answered and all replicas leave.

    Args:
      make: makes the backend, in each replica's process.
      replicas: least and most.
      robots: connections per replica that Serve aims at.
      host, port: of the proxies.
      access: key and limits, checked by the replica before a connection opens; limits are those of one replica.
      tls_files: certificate chain and its private key, on every node with a proxy.
      terms: what a request may expect.
      address: see `connect.connected`.
      cores: CPU cores of a replica; it has an accelerator as well where the cluster has any.
      scale_s: seconds of more, or fewer, connections before replicas are added, or leave.
      everywhere: a proxy on every node that has a replica, instead of the head node alone.
      **options: of `serving.Server`.

    Raises:
      ClusterError: see `connect.connected`.
      ServerError: no key for a host that others reach, or replicas that do not become ready; says why.
    """
    access, terms = access or Access(), terms or Terms()
    access.check(host)
    inner = dataclasses.replace(access, tls=None, insecure=True)
    with connected(address):
        if serve.status().applications:
            raise ServerError(f"expected no service on this cluster, got one: {', '.join(serve.status().applications)}")
        _start_proxies(host, port, tls_files, everywhere)
        board = ray.remote(Board).options(num_cpus=0, max_restarts=-1, max_task_retries=1).remote(NAME)
        bounds = {"min_replicas": replicas[0], "max_replicas": replicas[1], "target_ongoing_requests": robots}
        autoscaling = AutoscalingConfig(**bounds, upscale_delay_s=scale_s[0], downscale_delay_s=scale_s[1])
        options |= {"access": inner, "terms": terms}
        application = _deployment(autoscaling, access, terms, cores).bind(make, board, options)
        try:
            try:
                serve.run(application, name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise ServerError(f"the replicas do not start: {_reason(error)}") from error
            logger.info("ready for clients on %s://%s:%d", "wss" if tls_files else "ws", host, port)
            yield
        finally:
            serve.delete(NAME)
            serve.shutdown()


def _start_proxies(host: str, port: int, tls_files: tuple[str, str] | None, everywhere: bool) -> None:
    tls = dict(zip(("ssl_certfile", "ssl_keyfile"), tls_files, strict=True)) if tls_files else {}
    front = HTTPOptions(host=host, port=port, **tls)
    serve.start(proxy_location="EveryNode" if everywhere else "HeadOnly", http_options=front)


def _deployment(autoscaling: AutoscalingConfig, access: Access, terms: Terms, cores: int) -> Any:
    """The replicas as Serve keeps them."""
    accelerators = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) >= 1 else {}
    replicated: Any = Service
    return replicated.options(
        autoscaling_config=autoscaling,
        max_ongoing_requests=access.connections,
        graceful_shutdown_timeout_s=terms.drain_s + LEAVE_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_timeout_s=300.0,
        ray_actor_options={"num_cpus": cores, **accelerators},
    )


def _reason(error: RuntimeError) -> str:
    """The last lines of what Serve tells of a replica that failed."""
    state = serve.status().applications.get(NAME)
    deployments = state.deployments.values() if state else ()
    said = " ".join(d.message for d in deployments if d.message) or str(error)
    return " ".join(said.split())[-400:]


def run_until_signal(ready: Callable[[], None] = lambda: None) -> None:
    """Waits for SIGINT or SIGTERM; main thread only."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    ready()
    try:
        stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
