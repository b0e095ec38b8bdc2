"""A websocket server's view of an ASGI connection, so that `serving` converses over Ray Serve as it does over TCP."""

import asyncio
import contextlib
import http
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosedOK
from websockets.frames import Close, CloseCode
from websockets.http11 import Request, Response
from websockets.protocol import State

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def address_of(scope: Scope) -> tuple[str, int]:
    """The client's address as the proxy saw it."""
    host, port = scope.get("client") or ("unknown", 0)
    return str(host), int(port)


def request_of(scope: Scope) -> Request:
    """Path and headers."""
    headers = Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]])
    return Request(scope["path"], headers)


class Handshake:
    """What `Server` needs to answer a request with plain HTTP."""

    def __init__(self, scope: Scope):
        self.remote_address = address_of(scope)

    def respond(self, status: int, text: str) -> Response:
        """A response in plain text."""
        return response(status, text.encode(), "text/plain; charset=utf-8")


def response(status: int, body: bytes, content_type: str) -> Response:
    """A whole response."""
    headers = Headers([("Content-Type", content_type), ("Content-Length", str(len(body)))])
    return Response(int(status), http.HTTPStatus(status).phrase, headers, body)


async def answer(scope: Scope, send: Send, reply: Response) -> None:
    """Sends a response: to an HTTP request, or in place of opening a websocket."""
    kind = "http.response"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": CloseCode.POLICY_VIOLATION.value, "reason": "refused"})
            return
        kind = "websocket.http.response"
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers.raw_items()]
    await send({"type": f"{kind}.start", "status": reply.status_code, "headers": headers})
    await send({"type": f"{kind}.body", "body": bytes(reply.body)})


class Socket:
    """The part of `websockets.asyncio.server.ServerConnection` that a conversation uses.

    Attributes: `remote_address`, `request`, `state`, `transport` (which `abort`s).

    Args:
      scope, receive, send: of the ASGI connection, not yet accepted.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.remote_address, self.state, self.transport = address_of(scope), State.CONNECTING, self
        self.request = request_of(scope)
        self._receive, self._send = receive, send
        self._messages: asyncio.Queue[bytes | str | None] = asyncio.Queue(1)
        self._ended = asyncio.Event()
        self._left: Close | None = None

    async def open(self) -> None:
        """Accepts the connection and begins to read."""
        await self._receive()  # "websocket.connect"
        await self._send({"type": "websocket.accept"})
        self.state = State.OPEN
        self._reader = asyncio.ensure_future(self._read())

    async def recv(self) -> bytes | str:
        """The next message; raises ConnectionClosed when there will be none."""
        if self._ended.is_set() and self._messages.empty():
            raise ConnectionClosedOK(self._left, None)
        message = await self._messages.get()
        if message is None:
            raise ConnectionClosedOK(self._left, None)
        return message

    async def send(self, payload: bytes | str) -> None:
        """Sends a message; raises ConnectionClosed when nobody is there."""
        if self.state is not State.OPEN:
            raise ConnectionClosedOK(self._left, None)
        await self._send({"type": "websocket.send", "text" if isinstance(payload, str) else "bytes": payload})

    async def close(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """Closes; may be called again."""
        if self.state is State.OPEN:
            self._end()
            await self._send({"type": "websocket.close", "code": int(code), "reason": reason})

    def abort(self) -> None:
        """Cuts the connection off."""
        if self.state is State.OPEN:
            self._end()
            self._cut = asyncio.ensure_future(self._send({"type": "websocket.close", "code": 1011, "reason": ""}))

    async def wait_closed(self) -> None:
        """Returns when one side has closed."""
        await self._ended.wait()

    async def finish(self) -> None:
        """Ends the reading."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    def _end(self) -> None:
        self.state = State.CLOSED
        self._ended.set()

    async def _read(self) -> None:
        while (message := await self._receive())["type"] != "websocket.disconnect":
            data = message.get("bytes")
            await self._messages.put(message.get("text") if data is None else data)
        self._left = Close(message.get("code") or CloseCode.NO_STATUS_RCVD.value, message.get("reason") or "")
        self._end()
        await self._messages.put(None)
