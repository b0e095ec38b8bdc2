"""A websocket server that unmodified openpi clients talk to.

Two threads share the work. The event loop reads, checks and writes messages and answers health checks. The
device thread, exactly one, runs all that touches the accelerator: warm-up, the making of sessions, inference;
requests of all connections queue for it in order of arrival. So a health check is answered in mid-inference.

Life of a server: bind (a port in use is reported at once) → warm up → listen → serve → stop. Whoever comes
before it listens is refused by the operating system, as if nothing ran there.
Life of a connection: metadata out, then one reply for each request, in order. The first request makes its
Session, whatever ends the connection discards it. An error is one text frame and the end of that connection,
and of no other. The messages: docs/wire.md.
"""

import asyncio
import contextlib
import dataclasses
import http
import logging
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from websockets.asyncio import server as websockets
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.protocol import State

from safe_pruner_jax.serving.wire import LIMITS, WireError, pack, unpack

logger = logging.getLogger(__name__)


class ServerError(RuntimeError):
    """The server cannot start; the text says why and what to do."""


class Session(Protocol):
    """What the server keeps for one connection; the only mutable object behind it."""

    def infer(self, request: dict) -> dict:
        """The reply to one request, complete on the host; blocks, and is called in the device thread."""


class Backend(Protocol):
    """What the server serves. `metadata` greets each client; it must be packable (see `wire.pack`)."""

    metadata: dict

    def session(self) -> Session:
        """A fresh session, called in the device thread."""

    def warmup(self) -> None:
        """Compiles every program; blocks, and is called once in the device thread before listening."""


@dataclasses.dataclass
class _Connection:
    socket: websockets.ServerConnection
    session: Session | None = None
    waiting_since: float = 0.0
    previous_total_s: float | None = None


class Server:
    """One backend on one port. `serve` and `running` are the usual ways to use it.

    Args:
      backend: the policy; its `metadata` is read once, here.
      host: address to bind; "127.0.0.1" admits this machine alone, "0.0.0.0" everybody, unauthenticated.
      port: TCP port, 0 for a free one, then found in `self.port` once `ready` is set.
      max_message_bytes: largest request accepted, bytes; a larger one ends its connection with code 1009.
      client_errors: exceptions of the backend that are the client's mistake: their text goes to the client.
        Any other exception is logged with an id and its traceback, and the client is told the id alone.
      recorder: called with (request, reply without server_timing) after each reply is sent, in any thread.

    Raises:
      WireError: the backend's metadata cannot be sent.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        max_message_bytes: int = LIMITS.message_bytes,
        client_errors: tuple[type[Exception], ...] = (),
        recorder: Callable[[dict, dict], None] | None = None,
    ):
        self.host, self.port = host, port
        self.ready = threading.Event()  # set when clients can connect
        self._backend, self._recorder = backend, recorder
        self._client_errors = (WireError, *client_errors)
        self._limits = dataclasses.replace(LIMITS, message_bytes=max_message_bytes)
        self._metadata = pack(backend.metadata)
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._busy: set[websockets.ServerConnection] = set()  # a request received, its reply not yet sent

    async def run(self) -> None:
        """Serves until `stop`, then finishes the calls received. Raises as `serve` does."""
        self._loop = asyncio.get_running_loop()
        listener = await self._bind()
        try:
            await self._warm_up()
            if not self._stop.is_set():
                await listener.start_serving()
                logger.info("ready for clients on ws://%s:%d", self.host, self.port)
                self.ready.set()
                await self._stop.wait()
        finally:
            listener.close(close_connections=False)
            idle = listener.connections - self._busy
            await asyncio.gather(*(socket.close(CloseCode.GOING_AWAY, "server stopping") for socket in idle))
            await listener.wait_closed()
            self._device.shutdown()

    def stop(self) -> None:
        """Ends `run` from any thread; returns at once."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._stop.set) if self._loop else self._stop.set()

    async def _bind(self) -> websockets.Server:
        try:
            listener = await websockets.serve(
                self._converse,
                self.host,
                self.port,
                start_serving=False,
                compression=None,
                max_size=self._limits.message_bytes,
                max_queue=1,  # a client that sends ahead waits in TCP, not in our memory
                process_request=_health_check,
            )
        except (OSError, OverflowError) as error:  # in use, not allowed, no such host; port beyond 65535
            raise ServerError(f"cannot bind {self.host}:{self.port}: {error}; try another port") from error
        self.port = listener.sockets[0].getsockname()[1]
        return listener

    async def _warm_up(self) -> None:
        logger.info("warming up: compiling every program, clients can connect afterwards")
        started = time.monotonic()
        warm_up = asyncio.ensure_future(self._on_device(self._backend.warmup))
        while not (await asyncio.wait({warm_up}, timeout=30))[0]:
            logger.info("still warming up after %.0f s", time.monotonic() - started)
        warm_up.result()
        logger.info("warm after %.1f s", time.monotonic() - started)

    async def _on_device(self, function: Callable, *args: Any) -> Any:
        """`function(*args)`, run in the device thread when its turn comes."""

        def call() -> tuple[Any, Exception | None]:
            try:
                return function(*args), None
            except Exception as error:  # carried over by hand: a future refuses StopIteration and never ends
                return None, error

        result, error = await asyncio.get_running_loop().run_in_executor(self._device, call)
        if error is not None:
            raise error
        return result

    async def _converse(self, socket: websockets.ServerConnection) -> None:
        logger.info("%s connected", socket.remote_address)
        connection = _Connection(socket)
        try:
            await socket.send(self._metadata)
            while not self._stop.is_set():
                connection.waiting_since = time.monotonic()
                message = await socket.recv()
                self._busy.add(socket)
                if not await self._answer(connection, message):
                    return
                self._busy.discard(socket)
            await socket.close(CloseCode.GOING_AWAY, "server stopping")
        except ConnectionClosed as closed:
            logger.info("%s left: %s", socket.remote_address, closed)
        finally:
            self._busy.discard(socket)

    async def _answer(self, connection: _Connection, message: bytes | str) -> bool:
        """Answers one message; False after an error, which ends the connection."""
        try:
            if isinstance(message, str):
                raise WireError("expected a binary frame with a msgpack map, got a text frame")
            request = unpack(message, self._limits)
            reply, payload = await self._on_device(self._step, connection, request)
        except Exception as error:
            await self._refuse(connection.socket, error)
            return False
        try:
            await connection.socket.send(payload)
        except ConnectionClosed:
            logger.info("%s left before its reply, which is dropped", connection.socket.remote_address)
            return False
        # As openpi counts it: from waiting for the request to the reply being sent.
        connection.previous_total_s = time.monotonic() - connection.waiting_since
        if self._recorder is not None:
            try:
                await asyncio.to_thread(self._recorder, request, reply)
            except Exception:  # a full disk must not stop a robot
                logger.exception("this step was not recorded")
        return True

    def _step(self, connection: _Connection, request: dict) -> tuple[dict, bytes]:
        """One inference, in the device thread: the reply, and the bytes to send."""
        if connection.socket.state is not State.OPEN:
            return {}, b""  # the client left while it queued: the send will find out
        if connection.session is None:
            connection.session = self._backend.session()
        started = time.monotonic()
        reply = connection.session.infer(request)
        timing = {"infer_ms": (time.monotonic() - started) * 1e3}
        if connection.previous_total_s is not None:
            timing["prev_total_ms"] = connection.previous_total_s * 1e3
        try:
            return reply, pack({**reply, "server_timing": timing})
        except WireError as error:  # our fault, not the client's
            raise RuntimeError(f"the backend's reply cannot be sent: {error}") from error

    async def _refuse(self, socket: websockets.ServerConnection, error: Exception) -> None:
        """Tells the client what went wrong and closes, with openpi's close code."""
        if isinstance(error, self._client_errors):
            text = str(error)
            logger.warning("%s refused: %s", socket.remote_address, text)
        else:
            identifier = uuid.uuid4().hex[:8]
            text = f"internal error, see the server's log (id {identifier})"
            logger.error("%s internal error (id %s)", socket.remote_address, identifier, exc_info=error)
        await socket.send(text.encode("utf-8", "replace").decode())
        await socket.close(CloseCode.INTERNAL_ERROR, "see the error message in the previous frame")


def _health_check(connection: websockets.ServerConnection, request: Any) -> Any:
    return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None


def serve(backend: Backend, **options: Any) -> None:
    """Serves until SIGINT or SIGTERM, then finishes the calls it has received and returns.

    A second signal ends the process at once, also in a long warm-up. Main thread only.

    Args:
      backend: the policy.
      **options: host, port, max_message_bytes, client_errors, recorder; see `Server`.

    Raises:
      ServerError: host and port cannot be bound.
      Exception: whatever `backend.warmup` raises.
    """
    asyncio.run(_serve_until_signal(Server(backend, **options)))


async def _serve_until_signal(server: Server) -> None:
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop() -> None:
        for number in before:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        logger.info("stopping after the running call; a second signal stops at once")
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
def running(backend: Backend, *, port: int = 0, **options: Any) -> Iterator[Server]:
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
