"""One replica of a service: `serving.Server` without a port of its own, behind Ray Serve's proxy.

A connection is one request to Serve, so it stays with its replica, and replicas scale with their connections.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import ray
from ray import serve
from websockets.http11 import Response

from safe_pruner_jax.cluster.asgi import Handshake, Receive, Scope, Send, Socket, answer, request_of, response
from safe_pruner_jax.cluster.board import EVERY_S, PATIENCE_S, ROBOTS, merge
from safe_pruner_jax.cluster.connect import here
from safe_pruner_jax.policy.reply import Result
from safe_pruner_jax.serving import Server, ServerError
from safe_pruner_jax.serving.backend import Backend, SessionMaker, as_backend
from safe_pruner_jax.serving.metrics import TYPE

logger = logging.getLogger(__name__)

EACH = "/metrics/replicas"
"""Path of the metrics with their replica as a label; `/metrics` are summed."""

MOVED = "moved_from"
"""Key of a reply: the replica at which this robot was before. Its memory has stayed there; this step is a keyframe."""


class _NoListener:
    """In place of a port."""

    def close(self, close_connections: bool = True) -> None:
        """Serve's proxy listens."""

    async def wait_closed(self) -> None:
        """There is nothing to wait for."""


class Replica(Server):
    """A server whose connections come from Serve."""

    async def _bind(self) -> Any:
        return _NoListener()

    def snapshot(self) -> str:
        """Its metrics at this moment, in Prometheus' text format."""
        self.metrics.connections.set(self._open.total())
        self.metrics.waiting.set(self._scheduler.waiting)
        return self.metrics.text().decode()

    def forget(self, robot: str) -> None:
        """Drops the memory of a robot, by its name, that is at another replica now."""
        self._device.forget(("robot", robot))

    async def attend(self, scope: Scope, receive: Receive, send: Send, metrics: Callable[[bool], Any]) -> None:
        """One HTTP request, or one conversation; `metrics` gives those of all replicas, each or summed."""
        each = scope["path"] == EACH
        asked = request_of({**scope, "path": "/metrics"} if each else scope)
        refused = await self._http(Handshake(scope), asked)  # pyright: ignore[reportArgumentType]
        if scope["type"] == "http":
            if refused is None:
                refused = response(426, b"expected a websocket\n", "text/plain; charset=utf-8")
            elif refused.status_code == 200 and asked.path == "/metrics":
                refused = await _summed(metrics, each)
            await answer(scope, send, refused)
        elif refused is not None:
            await answer(scope, send, refused)
        else:
            socket = Socket(scope, receive, send)
            await socket.open()
            try:
                await self._converse(socket)  # pyright: ignore[reportArgumentType]
            finally:
                await socket.close()
                await socket.finish()


async def _summed(metrics: Callable[[bool], Any], each: bool) -> Response:
    """The metrics of all replicas, if the board is there."""
    try:
        return response(200, await metrics(each), TYPE)
    except ray.exceptions.RayError as error:
        text = f"expected the board that sums metrics, got {type(error).__name__}; it is started again, ask again\n"
        return response(503, text.encode(), "text/plain; charset=utf-8")


class Known:
    """A backend that tells the board of robots that are new here, and them where they were before.

    Attributes: `robots`, the names of those that have come here, the last `board.ROBOTS` of them.

    Args:
      backend: whose steps these are.
      name: of this replica.
      board: actor handle of a `board.Board`.
    """

    def __init__(self, backend: Backend, name: str, board: Any):
        self._backend, self._name, self._board = backend, name, board
        self.robots: OrderedDict[str, None] = OrderedDict()
        self._asked: dict[str, Any] = {}  # robot → reference to the board's answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def step(self, prepared: Sequence[tuple[Hashable, Any]]) -> Sequence[Result]:
        """The backend's; a robot's first reply here says where it was, or a later one if the board is slow."""
        results = self._backend.step(prepared)
        for (robot, _), result in zip(prepared, results, strict=True):
            if result.reply is None or not isinstance(robot, tuple) or robot[0] != "robot":
                continue
            if result.fresh:
                self.robots[robot[1]] = None
                if len(self.robots) > ROBOTS:
                    self.robots.popitem(last=False)
                self._asked[robot[1]] = self._board.arrive.remote(robot[1], self._name)
            if robot[1] in self._asked and (before := self._before(robot[1], PATIENCE_S * result.fresh)) is not None:
                result.reply[MOVED] = before
        return results

    def _before(self, robot: str, patience_s: float) -> str | None:
        """Where a robot was, if the board has said so by now; None: nowhere else, or not known yet."""
        if not ray.wait([self._asked[robot]], timeout=patience_s)[0]:
            return None
        try:
            return ray.get(self._asked.pop(robot))
        except ray.exceptions.RayError as error:  # it died before it could answer
            logger.warning("nobody knows where robot %s was before: %s", robot, type(error).__name__)
            return None


class _App:
    """ASGI entry of this process' replica."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands over to the deployment."""
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        service: Any = serve.get_replica_context().servable_object
        await service.attend(scope, receive, send)


@serve.deployment
@serve.ingress(_App())
class Service:
    """What Serve replicates: a policy behind openpi's wire.

    Args:
      make: makes the backend, in the replica's process.
      identify: what identifies it on this node, before it is made; that of all replicas must be the same.
      board: actor handle of a `board.Board`.
      options: of `serving.Server`.
    """

    async def __init__(
        self,
        make: Callable[[], Backend | SessionMaker],
        identify: Callable[[], Mapping[str, Any]],
        board: Any,
        options: dict[str, Any],
    ):
        self._name = serve.get_replica_context().replica_id.unique_id
        self._board, self._life = board, ""
        try:
            await self._start(make, identify, options)
        except Exception as error:
            why = str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"
            await board.fail.remote(f"node {here()}: {why}")
            raise
        self._telling = asyncio.ensure_future(self._tell())

    async def _start(self, make: Callable, identify: Callable, options: dict[str, Any]) -> None:
        """Returns when the server is ready; raises ServerError if this is another policy than the first replica's."""
        self._identity = await asyncio.to_thread(identify)
        first = await self._board.agree.remote(self._identity)
        if first != self._identity:
            from safe_pruner_jax.policy.identity import differences  # a replica as such needs no jax

            change = "; ".join(differences(first, self._identity))
            raise ServerError(f"another policy than the first replica's ({change}); put the same one on every node")
        self._known = Known(as_backend(await asyncio.to_thread(make)), self._name, self._board)
        self._server = Replica(self._known, **options)
        self._run = asyncio.ensure_future(self._server.run())
        ready = asyncio.ensure_future(asyncio.to_thread(self._server.ready.wait))
        await asyncio.wait((self._run, ready), return_when=asyncio.FIRST_COMPLETED)
        if self._run.done():
            self._server.ready.set()
            self._run.result()

    async def attend(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request or conversation."""
        await self._server.attend(scope, receive, send, self._metrics)

    async def _metrics(self, each: bool) -> bytes:
        await self._say()
        return merge(await self._board.metrics.remote(), each=each)

    async def _say(self) -> None:
        leaving, elsewhere, life = await self._board.tell.remote(self._name, self._server.snapshot())
        if life != self._life:  # it was started again, and knows nothing
            await self._board.agree.remote(self._identity)
            await self._board.recall.remote(self._name, list(self._known.robots))
            self._life = life
        for robot in elsewhere:
            self._known.robots.pop(robot, None)
            self._server.forget(robot)
        if leaving:
            self._server.stop()  # answers what waits, and closes every connection with 1001

    async def _tell(self) -> None:
        while not self._run.done():
            with contextlib.suppress(ray.exceptions.RayError):  # the board is being started again
                await self._say()
            await asyncio.sleep(EVERY_S)
