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
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray
from ray import serve
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, HTTPOptions

from safe_pruner_jax.cluster.board import Board
from safe_pruner_jax.cluster.connect import HEAD, connected, head, room
from safe_pruner_jax.cluster.replica import Service
from safe_pruner_jax.serving import Access, ServerError
from safe_pruner_jax.serving.backend import Backend, SessionMaker
from safe_pruner_jax.serving.scheduler import Terms

logger = logging.getLogger(__name__)

NAME = "openpi"
"""Of the application in Ray Serve."""

LOOK_S = 2.0
"""Seconds between two counts of the connections."""

ROOM_S = 60.0
"""Seconds that the cluster may have no room for the least number of replicas before the service gives up."""

PROXY_S = 120.0
"""Seconds in which a proxy must listen, once the replicas are ready."""

LEAVE_S = 10.0
"""Seconds beyond the drain after which Serve ends a replica whatever it is at."""

WORDS = 400
"""Letters of an explanation that are shown."""


@contextlib.contextmanager
def service(
    make: Callable[[], Backend | SessionMaker],
    *,
    identify: Callable[[], Mapping[str, Any]] = dict,
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
    room_s: float = ROOM_S,
    **options: Any,
) -> Iterator[None]:
    """A running service; when the block ends, what waits is answered and all replicas leave.

    Args:
      make: makes the backend, in each replica's process.
      identify: what identifies the policy on a replica's node; that of all replicas must be the same.
      replicas: least and most.
      robots: connections per replica that Serve aims at.
      host, port: of the proxies.
      access: key and limits, checked by the replica before a connection opens; limits are those of one replica.
      tls_files: certificate chain and its private key, on every node with a proxy.
      terms: what a request may expect.
      address: see `connect.connected`.
      cores: CPU cores of a replica; it has an accelerator as well where the cluster has any (`connect.room`).
      scale_s: seconds of more, or fewer, connections before replicas are added, or leave.
      everywhere: a proxy on every node that has a replica, instead of the head node alone.
      room_s: see `ROOM_S`; an autoscaler is asked for nodes meanwhile.
      **options: of `serving.Server`.

    Raises:
      ClusterError: see `connect.connected`.
      ServerError: no key for a host that others reach, no room, or replicas that do not become ready; says why.
    """
    access, terms = access or Access(), terms or Terms()
    access.check(host)
    with connected(address):
        _check_alone(host, port)
        need = _await_room(replicas[0], cores, room_s)
        tls = dict(zip(("ssl_certfile", "ssl_keyfile"), tls_files, strict=True)) if tls_files else {}
        with _front(HTTPOptions(host=host, port=port, **tls), everywhere), _board() as board:
            options |= {"access": dataclasses.replace(access, tls=None, insecure=True), "terms": terms}
            scaling = _scaling(replicas, robots, scale_s)
            try:
                _deploy(scaling, access.connections, terms.drain_s, need, (make, identify, board, options))
                logger.info("ready for clients on %s://%s:%d", "wss" if tls else "ws", host, port)
                with _watched(board):
                    yield
            finally:
                serve.delete(NAME)  # waits until the replicas have left


def _scaling(replicas: tuple[int, int], robots: int, scale_s: tuple[float, float]) -> AutoscalingConfig:
    """How many replicas there are for how many robots, and how soon."""
    return AutoscalingConfig(
        min_replicas=replicas[0],
        max_replicas=replicas[1],
        target_ongoing_requests=robots,
        upscale_delay_s=scale_s[0],
        downscale_delay_s=scale_s[1],
        look_back_period_s=max(scale_s[0], LOOK_S),
        metrics_interval_s=LOOK_S,
    )


def _check_alone(host: str, port: int) -> None:
    """Raises ServerError if the cluster has a service, or a Serve that listens elsewhere and would go on doing so."""
    try:
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:  # none is there
        return
    there: Any = ray.get(controller.get_serve_instance_details.remote())
    end = "end it with `serve shutdown --yes`"
    if there["applications"]:
        raise ServerError(f"expected no service on this cluster, got one: {', '.join(there['applications'])}; {end}")
    listens = there["http_options"]["host"], there["http_options"]["port"]
    if listens != (host, port):
        raise ServerError(f"expected Ray Serve to listen on {host}:{port}, got one on {listens[0]}:{listens[1]}; {end}")


@contextlib.contextmanager
def _front(options: HTTPOptions, everywhere: bool) -> Iterator[None]:
    """Serve with its proxies, until the block ends."""
    try:
        try:
            serve.start(proxy_location="EveryNode" if everywhere else "HeadOnly", http_options=options)
        except (RayError, TimeoutError) as error:  # a proxy that was slow to start is started again by Serve
            logger.warning("a proxy has not started yet: %s", type(error).__name__)
        yield
    finally:
        serve.shutdown()


@contextlib.contextmanager
def _board() -> Iterator[Any]:
    """A board, until the block ends."""
    board: Any = ray.remote(Board)
    board = board.options(**_beside_the_controller(), max_restarts=-1, max_task_retries=1).remote(NAME)
    try:
        yield board
    finally:
        ray.kill(board)


def _deploy(scaling: AutoscalingConfig, connections: int, drain_s: float, need: dict, arguments: tuple) -> None:
    """Starts replicas, see `_run`; `arguments` are those of a `Service`."""
    service: Any = Service
    deployment = service.options(
        autoscaling_config=scaling,
        max_ongoing_requests=connections,
        graceful_shutdown_timeout_s=drain_s + LEAVE_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_timeout_s=300.0,
        ray_actor_options=need,
    )
    _run(deployment.bind(*arguments), arguments[2])


def _run(application: serve.Application, board: Any) -> None:
    """Returns when the replicas and a proxy are ready; raises ServerError for the first one that does not start.

    Serve itself would try that one again for ever, as soon as any other has started.
    """
    deployer = ThreadPoolExecutor(1)
    started = deployer.submit(serve.run, application, name=NAME, route_prefix="/")
    deployer.shutdown(wait=False)  # it returns when the application is deleted, at the latest
    while not wait([started], timeout=0.5).done:
        if why := _failures(board):
            raise ServerError(f"the replicas do not start: {why[0]}")
    try:
        started.result()
    except RuntimeError as error:
        raise ServerError(f"the replicas do not start: {_reason(error)}") from error
    until = time.monotonic() + PROXY_S
    while "HEALTHY" not in [proxy.value for proxy in serve.status().proxies.values()]:
        if time.monotonic() > until:
            raise ServerError(f"expected a proxy of Ray Serve to listen within {PROXY_S:.0f} s, got none; see its logs")
        time.sleep(0.1)


def _failures(board: Any) -> list[str]:
    """Why replicas have not started, since this was last asked; one line each."""
    try:
        return [" ".join(why.split())[:WORDS] for why in ray.get(board.failures.remote(), timeout=LOOK_S)]
    except RayError:  # the board is being started again
        return []


@contextlib.contextmanager
def _watched(board: Any) -> Iterator[None]:
    """Inside, the log tells how many replicas there are whenever that changes, and why one does not start."""
    stop = threading.Event()
    watching = threading.Thread(target=_watch, args=(board, stop), daemon=True)
    watching.start()
    try:
        yield
    finally:
        stop.set()
        watching.join(2 * LOOK_S)


def _watch(board: Any, stop: threading.Event) -> None:
    before = None
    while not stop.wait(LOOK_S):
        with contextlib.suppress(RayError):
            for why in _failures(board):
                logger.error("a replica does not start: %s", why)
            if (now := _running()) != before:
                logger.log(logging.INFO if now else logging.ERROR, "replicas: %d", now)
            before = now


def _running() -> int:
    """Replicas at present."""
    state = serve.status().applications.get(NAME)
    deployments = state.deployments.values() if state else ()
    return sum(number for d in deployments for kind, number in d.replica_states.items() if kind == "RUNNING")


def _beside_the_controller() -> dict[str, Any]:
    """Where the board runs: on the head node, without which there is no service either.

    As a resource, which only that node has: Ray takes a soft affinity for a wish, and a node that dies with its replica
    and the board would take with it who was there.
    """
    return {"num_cpus": 0} | ({"resources": {HEAD: 0.001}} if head() else {})


def _await_room(least: int, cores: int, room_s: float) -> dict[str, Any]:
    """What each replica asks for; raises ServerError if the cluster does not get room for so many of them."""
    until = time.monotonic() + room_s
    most, need = room("policy", cores, accelerators=True)
    if most >= least:
        return need
    logger.warning("the cluster has room for %d replicas of %d; waiting %.0f s for nodes", most, least, room_s)
    bundle = {"CPU": need["num_cpus"], "GPU": need.get("num_gpus", 0), **need.get("resources", {})}
    request_resources(bundles=[{name: value for name, value in bundle.items() if value}] * least)
    try:
        while most < least and time.monotonic() < until:
            time.sleep(min(1.0, room_s))
            most, need = room("policy", cores, accelerators=True)
    finally:
        request_resources(bundles=[])
    if most < least:
        raise ServerError(
            f"replicas: expected room for {least}, the cluster has room for {most} ({cores} cores each, and one "
            "accelerator where there are any); add nodes or ask for fewer, see ray status"
        )
    return need


def _reason(error: RuntimeError) -> str:
    """The last lines of what Serve tells of a replica that failed."""
    state = serve.status().applications.get(NAME)
    deployments = state.deployments.values() if state else ()
    said = " ".join(d.message for d in deployments if d.message) or str(error)
    return " ".join(said.split())[-WORDS:]


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
