"""One replica of a service: `serving.Server` without a port of its own, behind Ray Serve's proxy.

A connection is one request to Serve, so it stays with its replica, and replicas scale with their connections.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import ray
from ray import serve

from safe_pruner_jax.cluster.asgi import Handshake, Receive, Scope, Send, Socket, answer, request_of, response
from safe_pruner_jax.cluster.board import EVERY_S, PATIENCE_S, merge
from safe_pruner_jax.policy.reply import Result
from safe_pruner_jax.serving import Server
from safe_pruner_jax.serving.backend import Backend, SessionMaker, as_backend
from safe_pruner_jax.serving.metrics import TYPE

logger = logging.getLogger(__name__)

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
        refused = await self._http(Handshake(scope), request_of(scope))  # pyright: ignore[reportArgumentType]
        if scope["type"] == "http":
            if refused is None:
                refused = response(426, b"expected a websocket\n", "text/plain; charset=utf-8")
            elif refused.status_code == 200 and scope["path"] in ("/metrics", "/metrics/replicas"):
                refused = response(200, await metrics(scope["path"] != "/metrics"), TYPE)
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


class Known:
    """A backend that tells the board of robots that are new here, and them where they were before.

    Args:
      backend: whose steps these are.
      name: of this replica.
      board: actor handle of a `board.Board`.
    """

    def __init__(self, backend: Backend, name: str, board: Any):
        self._backend, self._name, self._board = backend, name, board

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def step(self, prepared: Sequence[tuple[Hashable, Any]]) -> Sequence[Result]:
        """The backend's; a robot's first reply here says where it was."""
        results = self._backend.step(prepared)
        for (robot, _), result in zip(prepared, results, strict=True):
            if result.fresh and result.reply is not None and isinstance(robot, tuple) and robot[0] == "robot":
                try:
                    before = ray.get(self._board.arrive.remote(robot[1], self._name), timeout=PATIENCE_S)
                except ray.exceptions.RayError as error:  # the board is away: the reply is what counts
                    logger.warning("nobody knows where robot %s was before: %s", robot[1], type(error).__name__)
                    continue
                if before is not None:
                    result.reply[MOVED] = before
        return results


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
      board: actor handle of a `board.Board`.
      options: of `serving.Server`.
    """

    async def __init__(self, make: Callable[[], Backend | SessionMaker], board: Any, options: dict[str, Any]):
        self._name = serve.get_replica_context().replica_id.unique_id
        self._board = board
        backend = as_backend(await asyncio.to_thread(make))
        self._server = Replica(Known(backend, self._name, board), **options)
        self._run = asyncio.ensure_future(self._server.run())
        ready = asyncio.ensure_future(asyncio.to_thread(self._server.ready.wait))
        await asyncio.wait((self._run, ready), return_when=asyncio.FIRST_COMPLETED)
        if self._run.done():
            self._server.ready.set()
            self._run.result()
        self._telling = asyncio.ensure_future(self._tell())

    async def attend(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request or conversation."""
        await self._server.attend(scope, receive, send, self._metrics)

    async def _metrics(self, each: bool) -> bytes:
        await self._say()
        return merge(await self._board.metrics.remote(), each=each)

    async def _say(self) -> None:
        leaving, elsewhere = await self._board.tell.remote(self._name, self._server.snapshot())
        for robot in elsewhere:
            self._server.forget(robot)
        if leaving:
            self._server.stop()  # answers what waits, and closes every connection with 1001

    async def _tell(self) -> None:
        while not self._run.done():
            with contextlib.suppress(ray.exceptions.RayError):  # the board is being started again
                await self._say()
            await asyncio.sleep(EVERY_S)
