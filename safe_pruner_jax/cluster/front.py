"""The front of a service, in every proxy: who may connect is decided before a replica hears of it."""

import collections

from safe_pruner_jax.cluster.asgi import Receive, Scope, Send, address_of, answer, request_of, response
from safe_pruner_jax.serving.access import Access

OPEN = ("/healthz", "/readyz")
"""Paths that need no key; those below /-/ are Ray's own."""

KEY_WANTED = b"expected the header Authorization: Api-Key <key>; give the client its api_key\n"


class Front:
    """ASGI middleware: the API key, and how many connections one address and all of them may have.

    Args:
      app: what is behind it.
      access: key and limits; of this proxy's connections.
    """

    def __init__(self, app: object, access: Access):
        self._app, self._access = app, access
        self._open: collections.Counter[str] = collections.Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or passes on."""
        path = scope.get("path", "")
        if scope["type"] not in ("http", "websocket") or path in OPEN or path.startswith("/-/"):
            await self._app(scope, receive, send)
            return
        given = request_of(scope).headers.get_all("Authorization")
        if not self._access.admits(given[0] if len(given) == 1 else None):
            refused = response(401, KEY_WANTED, "text/plain; charset=utf-8")
            refused.headers["WWW-Authenticate"] = "Api-Key"
            await answer(scope, send, refused)
            return
        if scope["type"] == "http":
            await self._app(scope, receive, send)
            return
        await self._connect(scope, receive, send)

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        where = address_of(scope)[0]
        if self._open[where] >= self._access.per_address or self._open.total() >= self._access.connections:
            most = f"at most {self._access.per_address} connections from one address, {self._access.connections} in all"
            await answer(scope, send, response(429, f"{most}; close some\n".encode(), "text/plain; charset=utf-8"))
            return
        self._open[where] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= collections.Counter({where: 1})
