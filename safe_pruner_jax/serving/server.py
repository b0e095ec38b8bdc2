"""A websocket server that unmodified openpi clients talk to.

The event loop reads and writes messages and answers HTTP; host threads check and prepare requests; the device
thread, exactly one, runs all that touches the accelerator. Requests of all connections wait in one queue
(`scheduler`), where they are joined into steps. So health checks are answered during compilation and inference.

Life of a server: bind (a port in use is reported at once) → accept, warm up → serve → drain → stop. A client that
comes before the server is warm is connected, and gets its first message when it is.
Life of a connection: metadata out, then one reply for each request, in order. A request that was turned away gets a
text frame; an error is a text frame too, and the end of that connection and of no other. The messages: docs/wire.md.
"""

import asyncio
import collections
import contextlib
import dataclasses
import gc
import http
import itertools
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from websockets.asyncio import server as websockets
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

import safe_pruner_jax
from safe_pruner_jax.policy.reply import NonFinite
from safe_pruner_jax.serving.access import Access, ServerError
from safe_pruner_jax.serving.backend import Backend, SessionMaker, as_backend
from safe_pruner_jax.serving.conversation import Conversation, Desk, first
from safe_pruner_jax.serving.device import Device
from safe_pruner_jax.serving.metrics import TYPE as METRICS_TYPE
from safe_pruner_jax.serving.metrics import Metrics
from safe_pruner_jax.serving.observers import MOST, Observers, page
from safe_pruner_jax.serving.recorder import Step
from safe_pruner_jax.serving.scheduler import Scheduler, Terms
from safe_pruner_jax.serving.wire import LIMITS, PROTOCOL, WireError, pack

logger = logging.getLogger(__name__)

PAGE, STATE, OBSERVE = "/watch", "/watch/state", "/observe"
"""Paths for people who look on: the page, what it shows, and a websocket of steps."""


class Server:
    """One backend on one port. `serve` and `running` are the usual ways to use it.

    Args:
      backend: what is served: a `Backend`, or anything with `session()`; its `metadata` is read once, here.
      host: address to bind; "127.0.0.1" admits this machine alone.
      port: TCP port, 0 for a free one, then found in `self.port` once `ready` is set.
      max_message_bytes: largest request accepted, bytes; a larger one ends its connection with code 1009.
      client_errors: exceptions of the backend that are the client's mistake: their text goes to the client.
        Any other exception is logged with an id and its traceback, and the client is told the id alone.
      recorder: called with a `Step` after each reply is sent, in any thread.
      access: who may connect.
      terms: what a request may expect.
      send_s: a client that takes longer to take a reply is cut off, seconds.
      watch: people with the key may look on: the page `/watch`, and observer connections.
      dedicated: the process is this server's own. What is there when it is warm, a million objects of jax, is then left
        out of garbage collections: those become short, and frequent enough for messages caught in cycles.

    Raises:
      WireError: the backend's metadata cannot be sent.
      ServerError: `host` is open to others and nobody is asked for a key.
    """

    def __init__(
        self,
        backend: Backend | SessionMaker,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        max_message_bytes: int = LIMITS.message_bytes,
        client_errors: tuple[type[Exception], ...] = (),
        recorder: Callable[[Step], None] | None = None,
        access: Access | None = None,
        terms: Terms | None = None,
        send_s: float = 10.0,
        watch: bool = False,
        dedicated: bool = False,
    ):
        self.host, self.port = host, port
        self.ready = threading.Event()  # set when warm
        self.metrics = Metrics()
        self._dedicated = dedicated
        self._access, self._terms = access or Access(), terms or Terms()
        self._access.check(host)
        self._backend = as_backend(backend)
        self._limits = dataclasses.replace(LIMITS, message_bytes=max_message_bytes)
        self._metadata = pack(self._backend.metadata)
        self._device = Device(self._backend, self.metrics)
        self._host_threads = ThreadPoolExecutor(2, thread_name_prefix="host")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop, self._warm = asyncio.Event(), asyncio.Event()
        self._numbers = itertools.count(1)
        self._open: collections.Counter[str] = collections.Counter()  # websocket connections by address
        self._scheduler = Scheduler(self._device, self._terms)
        self._observers = Observers() if watch else None
        self._desk = self._make_desk((WireError, NonFinite, *client_errors), recorder, send_s)

    def _make_desk(self, client_errors: tuple, recorder: Callable[[Step], None] | None, send_s: float) -> Desk:
        """What every conversation shares."""
        return Desk(
            backend=self._backend,
            scheduler=self._scheduler,
            metrics=self.metrics,
            limits=self._limits,
            client_errors=client_errors,
            recorder=recorder,
            observers=self._observers,
            host_threads=self._host_threads,
            stop=self._stop,
            send_s=send_s,
        )

    async def run(self) -> None:
        """Serves until `stop`, then finishes what runs and answers what waits. Raises as `serve` does."""
        self._loop = asyncio.get_running_loop()
        listener = await self._bind()
        queue = asyncio.ensure_future(self._scheduler.run())
        try:
            await self._warm_up()
            if not self._stop.is_set():
                self._warm.set()
                self.metrics.ready.set(1)
                logger.info(
                    "ready for clients on %s://%s:%d", "wss" if self._access.tls else "ws", self.host, self.port
                )
                self.ready.set()
                await self._stop.wait()
        finally:
            self._stop.set()
            self.metrics.ready.set(0)
            listener.close(close_connections=False)
            self._scheduler.close()
            await queue
            await listener.wait_closed()
            self._device.shutdown()
            self._host_threads.shutdown()
            if self._observers is not None:
                self._observers.threads.shutdown()

    def stop(self) -> None:
        """Ends `run` from any thread; returns at once."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._stop.set) if self._loop else self._stop.set()

    # --- start ---------------------------------------------------------------------------------------------

    async def _bind(self) -> websockets.Server:
        try:
            listener = await websockets.serve(
                self._converse,
                self.host,
                self.port,
                ssl=self._access.tls,
                compression=None,
                max_size=self._limits.message_bytes,
                max_queue=1,  # a client that sends ahead waits in TCP, not in our memory
                process_request=self._http,
                server_header=None,
            )
        except (OSError, OverflowError) as error:  # in use, not allowed, no such host; port beyond 65535
            raise ServerError(f"cannot bind {self.host}:{self.port}: {error}; try another port") from error
        self.port = listener.sockets[0].getsockname()[1]
        logger.info("listening on %s:%d", self.host, self.port)
        return listener

    async def _warm_up(self) -> None:
        logger.info("warming up: compiling every program; clients are answered afterwards")
        started = time.monotonic()
        warm_up = asyncio.ensure_future(self._device.warmup())
        while not (await asyncio.wait({warm_up}, timeout=30))[0]:
            logger.info("still warming up after %.0f s", time.monotonic() - started)
        warm_up.result()
        if self._dedicated:
            gc.collect()
            gc.freeze()
            gc.collect()  # the next comes when a quarter of what this one left is new, and that is little now
        logger.info("warm after %.1f s", time.monotonic() - started)

    # --- HTTP ----------------------------------------------------------------------------------------------

    async def _http(self, connection: websockets.ServerConnection, request: Request) -> Response | None:
        """Answers plain HTTP, and decides who may open a websocket (None lets it open)."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/readyz":
            if self._warm.is_set() and not self._stop.is_set():
                return connection.respond(http.HTTPStatus.OK, "ready\n")
            text = "stopping\n" if self._stop.is_set() else "warming up\n"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, text)
        if path in (OBSERVE, PAGE, STATE) and self._observers is None:
            return connection.respond(http.HTTPStatus.NOT_FOUND, "start the server with --serving.watch to look on\n")
        if path == PAGE:  # holds no secret, and asks for the key
            return _respond(page(), "text/html; charset=utf-8")
        authorization = request.headers.get_all("Authorization")
        if not self._access.admits(authorization[0] if len(authorization) == 1 else None):
            self.metrics.error("unauthorised")
            logger.warning("%s refused: no valid API key", connection.remote_address)
            text = "expected the header Authorization: Api-Key <key>; give the client its api_key\n"
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, text)
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if path == "/info":
            return _respond(json.dumps(self._info(), default=_plain).encode(), "application/json")
        if path == STATE and self._observers is not None:
            state, robots = self._observers.state, self._observers.robots()
            body = await asyncio.get_running_loop().run_in_executor(self._observers.threads, state, robots)
            return _respond(body, "application/json")
        if path == "/metrics":
            self.metrics.connections.set(self._open.total())
            self.metrics.waiting.set(self._scheduler.waiting)
            return _respond(self.metrics.text(), METRICS_TYPE)
        if self._stop.is_set():
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping\n")
        if path == OBSERVE and self._observers is not None and self._observers.full:
            return connection.respond(http.HTTPStatus.TOO_MANY_REQUESTS, f"at most {MOST} observers; close some\n")
        if path != OBSERVE and self._full(connection):
            return connection.respond(http.HTTPStatus.TOO_MANY_REQUESTS, self._full(connection))
        return None

    def _full(self, connection: websockets.ServerConnection) -> str | None:
        if self._open[_address(connection)] >= self._access.per_address:
            return f"at most {self._access.per_address} connections from one address; close some\n"
        if self._open.total() >= self._access.connections:
            return f"at most {self._access.connections} connections; try again later\n"
        return None

    def _info(self) -> dict:
        return {
            "package": "safe_pruner_jax",
            "version": safe_pruner_jax.__version__,
            "protocol": PROTOCOL,
            "ready": self._warm.is_set() and not self._stop.is_set(),
            "metadata": self._backend.metadata,
            "limits": dataclasses.asdict(self._limits),
            "terms": dataclasses.asdict(self._terms),
            "max_batch": self._backend.limit,
            "real_time": self._backend.real_time,
            "attention": self._backend.attention,
            "watch": self._observers is not None,
            "authentication": self._access.key is not None,
            "tls": self._access.tls is not None,
        }

    # --- conversations -------------------------------------------------------------------------------------

    async def _converse(self, socket: websockets.ServerConnection) -> None:
        if socket.request is not None and socket.request.path.partition("?")[0] == OBSERVE:
            await self._show(socket)
            return
        if self._full(socket):  # handshakes that overlapped
            self.metrics.error("too_many_connections")
            await socket.close(CloseCode.TRY_AGAIN_LATER, "too many connections")
            return
        where, robot = _address(socket), ("connection", next(self._numbers))
        conversation = Conversation(self._desk, socket, robot)
        self._open[where] += 1
        self._device.robots = self._open.total()
        logger.info("%s connected", socket.remote_address)
        try:
            if await first(self._warm.wait(), socket.wait_closed(), self._stop.wait()):
                await socket.send(self._metadata)
                await conversation.run()
            if self._stop.is_set():
                await socket.close(CloseCode.GOING_AWAY, "server stopping")
        except ConnectionClosed as closed:
            logger.info("%s left: %s", socket.remote_address, closed)
        finally:
            self._open -= collections.Counter({where: 1})
            self._device.robots = self._open.total()
            for robot in conversation.robots:
                self._device.forget(robot)

    async def _show(self, socket: websockets.ServerConnection) -> None:
        """An observer: metadata, then a message for each step; it is no robot, and nobody waits for it."""
        observers = self._observers
        assert observers is not None, "the handshake was refused"
        logger.info("%s looks on", socket.remote_address)
        try:
            if not await first(self._warm.wait(), socket.wait_closed(), self._stop.wait()):
                return
            with observers.subscribed() as steps:
                await socket.send(self._metadata)
                while await first(step := asyncio.ensure_future(steps.get()), socket.wait_closed(), self._stop.wait()):
                    run = asyncio.get_running_loop().run_in_executor
                    message = await run(observers.threads, observers.message, step.result())
                    await asyncio.wait_for(socket.send(message), self._desk.send_s)
            await socket.close(CloseCode.GOING_AWAY, "server stopping")
        except (ConnectionClosed, TimeoutError) as end:
            logger.info("%s looks on no longer: %s", socket.remote_address, end or "it takes no messages")


def _address(connection: websockets.ServerConnection) -> str:
    return str((connection.remote_address or ("unknown",))[0])


def _respond(body: bytes, content_type: str) -> Response:
    headers = Headers([("Content-Type", content_type), ("Content-Length", str(len(body))), ("Connection", "close")])
    return Response(http.HTTPStatus.OK.value, http.HTTPStatus.OK.phrase, headers, body)


def _plain(value: Any) -> Any:
    """Arrays and scalars of metadata as JSON has them."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def serve(backend: Backend | SessionMaker, **options: Any) -> None:
    """Serves until SIGINT or SIGTERM, then finishes what runs, answers what waits, and returns.

    A second signal ends the process at once, also in a long warm-up. Main thread only.

    Args:
      backend: the policy.
      **options: see `Server`.

    Raises:
      ServerError: host and port cannot be bound, or must not be without a key.
      Exception: whatever `backend.warmup` raises.
    """
    asyncio.run(_serve_until_signal(Server(backend, dedicated=True, **options)))


async def _serve_until_signal(server: Server) -> None:
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop() -> None:
        for number in before:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        logger.info("stopping after the requests received; a second signal stops at once")
        server.stop()

    for number in before:
        loop.add_signal_handler(number, stop)
    try:
        await server.run()
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


@contextlib.contextmanager
def running(backend: Backend | SessionMaker, *, port: int = 0, **options: Any) -> Iterator[Server]:
    """A server in a background thread, warm and listening, for tests and notebooks.

    Args:
      backend: the policy.
      port: TCP port; 0 takes a free one, to be read from the yielded server.
      **options: as in `serve`, which it also raises as.
    """
    server = Server(backend, port=port, **options)
    with ThreadPoolExecutor(1, thread_name_prefix="server") as pool:
        run = pool.submit(lambda: asyncio.run(server.run()))
        run.add_done_callback(lambda _: server.ready.set())
        try:
            server.ready.wait()
            if not run.done():
                yield server
        finally:
            server.stop()
        run.result()
