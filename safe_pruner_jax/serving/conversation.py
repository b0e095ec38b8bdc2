"""One connection: requests in, one reply each, in order.

A reader and a writer share the connection. The reader checks a request, queues it and reads on, so that a newer
observation can replace one that still waits; the writer sends replies in the order of the requests.
"""

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.protocol import State

from safe_pruner_jax.policy.reply import NonFinite
from safe_pruner_jax.serving.backend import Backend, Prepared, Served
from safe_pruner_jax.serving.metrics import Metrics
from safe_pruner_jax.serving.observers import Observers
from safe_pruner_jax.serving.recorder import Step
from safe_pruner_jax.serving.scheduler import Scheduler, Turned
from safe_pruner_jax.serving.wire import Limits, WireError, pack, unpack

logger = logging.getLogger(__name__)

SENT_AHEAD = 8
"""Replies of one connection that may be due at a time; a client that is further ahead waits in TCP."""

MAX_ID = 64
"""Longest robot id, characters."""


@dataclasses.dataclass(frozen=True, eq=False)
class Desk:
    """What all conversations of a server share; see `server.Server` for the meaning of each."""

    backend: Backend
    scheduler: Scheduler
    metrics: Metrics
    limits: Limits
    client_errors: tuple[type[Exception], ...]
    recorder: Callable[[Step], None] | None
    observers: Observers | None
    host_threads: Executor
    stop: asyncio.Event
    send_s: float


@dataclasses.dataclass(frozen=True, eq=False)
class Addressed:
    """A request, whose it is, what the backend made of it, how long it may wait (seconds, None: the server's)."""

    robot: Hashable
    request: dict
    prepared: Prepared
    deadline_s: float | None


@dataclasses.dataclass(eq=False)
class _Due:
    """A reply that is owed. Times are `time.monotonic()`, durations seconds."""

    addressed: tuple[Addressed, ...]  # several in a batch; none: it could not be read, and the answer says why
    since: float  # the server began to wait for the request
    received: float
    prepared_s: float
    answers: tuple[asyncio.Future, ...]
    batch: bool = False


class Conversation:
    """One connection, from the first request to its end.

    Args:
      desk: shared.
      socket: the connection, open.
      robot: whose memory a request without a robot id means.

    Attributes:
      robots: memories of this connection alone, to be forgotten with it.
    """

    def __init__(self, desk: Desk, socket: ServerConnection, robot: Hashable):
        self._desk, self._socket, self._robot = desk, socket, robot
        self.robots: set[Hashable] = {robot}
        self._due: asyncio.Queue[_Due | None] = asyncio.Queue(SENT_AHEAD)
        self._unanswered: set[_Due] = set()
        self._previous_total_s: float | None = None

    async def run(self) -> None:
        """Returns after the client's end, a mistake of it, or when the server stops and everything is answered."""
        reader = asyncio.ensure_future(self._read())
        try:
            await self._write()
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._abandon()

    async def _read(self) -> None:
        stopping = asyncio.ensure_future(self._desk.stop.wait())
        try:
            while True:
                since = time.monotonic()
                receive = asyncio.ensure_future(self._socket.recv())
                try:
                    await asyncio.wait((receive, stopping), return_when=asyncio.FIRST_COMPLETED)
                    if not receive.done():
                        break
                finally:
                    receive.cancel()
                due = await self._submit(receive.result(), since)
                self._unanswered.add(due)
                await self._due.put(due)
                if not due.addressed:
                    return  # the writer tells the mistake and closes
        except ConnectionClosed as closed:
            logger.info("%s left: %s", self._socket.remote_address, closed)
            self._abandon()
        finally:
            stopping.cancel()
        await self._due.put(None)

    async def _submit(self, message: bytes | str, since: float) -> _Due:
        received = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            addressed, batch = await loop.run_in_executor(self._desk.host_threads, self._prepare, message)
        except Exception as error:
            failed = loop.create_future()
            failed.set_exception(error)
            return _Due((), since, received, 0.0, (failed,))
        prepared_s = time.monotonic() - received
        there = lambda: self._socket.state is State.OPEN
        submit = self._desk.scheduler.submit
        answers = tuple(submit(one.robot, one.prepared, one.deadline_s, there) for one in addressed)
        return _Due(addressed, since, received, prepared_s, answers, batch)

    def _prepare(self, message: bytes | str) -> tuple[tuple[Addressed, ...], bool]:
        """Reads and checks a message, in a host thread: its requests, and whether they came as a batch."""
        if isinstance(message, str):
            raise WireError("expected a binary frame with a msgpack map, got a text frame")
        request = unpack(message, self._desk.limits)
        if "batch" not in request:
            return (self._address(request, self._robot),), False
        return tuple(self._batch(request)), True

    def _batch(self, message: dict) -> Iterator[Addressed]:
        """The requests of `{"batch": [request, …]}`; the i-th of a connection is one robot, unless it has an id."""
        requests, most = message["batch"], self._desk.scheduler.capacity
        if not isinstance(requests, list) or not 1 <= len(requests) <= most or set(message) != {"batch"}:
            what = f"{len(requests)} requests" if isinstance(requests, list) else type(requests).__name__
            raise WireError(f"batch: expected 1 to {most} requests under this key and no other key, got {what}")
        seen = set()
        for place, request in enumerate(requests):
            if not isinstance(request, dict):
                raise WireError(f"batch[{place}]: expected a request, a map, got {type(request).__name__}")
            one = self._address(request, (*self._robot, place) if isinstance(self._robot, tuple) else place)
            if one.robot in seen:
                raise WireError(f"batch[{place}]: expected each robot once, got {request['robot_id']!r:.80} again")
            seen.add(one.robot)
            yield one

    def _address(self, request: dict, robot: Hashable) -> Addressed:
        """Whose a request is; `robot` unless it has an id."""
        deadline_s = request.get("deadline_ms")
        if (name := request.get("robot_id")) is not None:
            if not isinstance(name, str) or not 1 <= len(name) <= MAX_ID:
                raise WireError(f"robot_id: expected a str of 1 to {MAX_ID} characters, got {type(name).__name__}")
            robot = ("robot", name)
        else:
            self.robots.add(robot)
        if deadline_s is not None:
            if isinstance(deadline_s, bool) or not isinstance(deadline_s, int | float) or not 0 < deadline_s < 1e9:
                raise WireError(f"deadline_ms: expected milliseconds above 0, got {deadline_s!r:.50}")
            deadline_s = deadline_s / 1e3
        try:
            prepared = self._desk.backend.prepare(robot, request)
        except StopIteration as error:  # a future refuses it and never ends
            raise RuntimeError("the backend raised StopIteration") from error
        return Addressed(robot, request, prepared, deadline_s)

    def _abandon(self) -> None:
        """Takes requests out of the queue whose client has left."""
        for answer in (answer for due in self._unanswered for answer in due.answers):
            self._desk.scheduler.cancel(answer)
            answer.add_done_callback(lambda answer: answer.exception())  # nobody else will look
        self._unanswered.clear()

    async def _write(self) -> None:
        while (due := await self._due.get()) is not None:
            try:
                served = [await self._served(answer) for answer in due.answers]
                payload = self._pack(due, served)
            except Exception as error:
                self._abandon_one(due)
                await self._refuse(error)
                return
            self._unanswered.discard(due)
            try:
                await self._send(payload)
            except ConnectionClosed:
                logger.info("%s left before its reply, which is dropped", self._socket.remote_address)
                return
            if not isinstance(payload, bytes):  # turned away, with nothing to measure or record
                continue
            self._desk.metrics.latency.observe(time.monotonic() - due.received)
            # As openpi counts it: from waiting for the request to the reply being sent.
            self._previous_total_s = time.monotonic() - due.since
            for addressed, one in zip(due.addressed, served, strict=True):
                if isinstance(one, Served):
                    self._desk.metrics.requests.labels("ok").inc()
                    await self._record(addressed, one)

    async def _served(self, answer: asyncio.Future) -> Served | Turned:
        """What became of a request; raises what went wrong."""
        try:
            served: Served = await asyncio.shield(answer)
        except Turned as turned:
            self._desk.metrics.requests.labels(turned.kind).inc()
            return turned
        self._desk.metrics.served(served)
        if served.result.error is not None:
            raise served.result.error
        return served

    def _abandon_one(self, due: _Due) -> None:
        """Takes the rest of a batch out of the queue; nobody will read its answers."""
        self._unanswered.discard(due)
        for answer in due.answers:
            self._desk.scheduler.cancel(answer)
            answer.add_done_callback(lambda answer: answer.exception())

    def _pack(self, due: _Due, served: Sequence[Served | Turned]) -> bytes | str:
        """The frame that answers a message: a reply, its refusal in words, or a batch of both."""
        if not due.batch:
            return str(served[0]) if isinstance(served[0], Turned) else self._packed(self._reply(due, served[0]))
        replies = [{"error": str(one)} if isinstance(one, Turned) else self._reply(due, one) for one in served]
        return self._packed({"batch": replies})

    def _reply(self, due: _Due, served: Served) -> dict:
        timing = {"infer_ms": (due.prepared_s + served.device_s) * 1e3}
        if self._previous_total_s is not None:
            timing["prev_total_ms"] = self._previous_total_s * 1e3
        timing |= {"queue_ms": served.queue_s * 1e3, "batch": served.batch}
        try:
            return {**served.result.reply, "server_timing": timing}  # pyright: ignore[reportGeneralTypeIssues]
        except TypeError as error:  # no map: our fault, not the client's
            raise RuntimeError(f"the backend's reply cannot be sent: {error}") from error

    def _packed(self, message: dict) -> bytes:
        try:
            return pack(message)
        except WireError as error:  # our fault, not the client's
            raise RuntimeError(f"the backend's reply cannot be sent: {error}") from error

    async def _send(self, payload: bytes | str) -> None:
        try:
            async with asyncio.timeout(self._desk.send_s):
                await self._socket.send(payload)
        except TimeoutError:
            self._desk.metrics.error("slow_reader")
            logger.warning("%s cut off: it takes no replies", self._socket.remote_address)
            self._socket.transport.abort()

    async def _record(self, addressed: Addressed, served: Served) -> None:
        if self._desk.recorder is None and self._desk.observers is None:
            return
        result = served.result
        images = getattr(getattr(addressed.prepared, "example", None), "images", {})  # sessions prepare nothing
        about = {"fresh": result.fresh, "batch": served.batch, "images": images, "saliency": result.saliency}
        step = Step(addressed.robot, addressed.request, result.reply, **about)
        if self._desk.observers is not None:
            self._desk.observers.publish(step)
        if self._desk.recorder is None:
            return
        try:
            await asyncio.to_thread(self._desk.recorder, step)
        except Exception:  # a full disk must not stop a robot
            logger.exception("this step was not recorded")

    async def _refuse(self, error: Exception) -> None:
        """Tells the client what went wrong and closes, with openpi's close code."""
        self._desk.metrics.requests.labels("error").inc()
        where = self._socket.remote_address
        if isinstance(error, self._desk.client_errors):
            kinds = ((WireError, "bad_message"), (NonFinite, "non_finite"))
            self._desk.metrics.error(next((kind for type_, kind in kinds if isinstance(error, type_)), "bad_request"))
            text = str(error)
            logger.warning("%s refused: %s", where, text)
        else:
            self._desk.metrics.error("internal")
            identifier = uuid.uuid4().hex[:8]
            text = f"internal error, see the server's log (id {identifier})"
            logger.error("%s internal error (id %s)", where, identifier, exc_info=error)
        await self._send(text.encode("utf-8", "replace").decode())
        await self._socket.close(CloseCode.INTERNAL_ERROR, "see the error message in the previous frame")


async def first(wanted: Any, *others: Any) -> bool:
    """Waits until one of several awaitables is done and cancels the rest; whether `wanted` was."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in (wanted, *others)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].done()
    finally:
        rest = [task for task in tasks if not task.done()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
