"""A policy that computes nothing, and servers of it in processes of their own: what is left is the wire.

python benchmarks/nothing.py server|websockets      prints its port, and serves until it is killed
"""

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import websockets.asyncio.server

from safe_pruner_jax.serving import pack, running


class Nothing:
    """A policy that answers at once."""

    metadata: ClassVar[dict] = {}

    def session(self) -> "Nothing":
        """The same for every robot."""
        return self

    def warmup(self) -> None:
        """Nothing to compile."""

    def infer(self, request: dict) -> dict:
        """Ten actions of zeros."""
        return {"actions": np.zeros((10, 7))}


@contextlib.contextmanager
def server_of_nothing(kind: str = "server") -> Iterator[int]:
    """A server of `Nothing` in a process of its own; its port.

    Args:
      kind: "server" is this package's; "websockets" sends the same bytes with that library alone.
    """
    with subprocess.Popen([sys.executable, __file__, kind], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


async def _answer_alone() -> None:
    reply = pack({"actions": np.zeros((10, 7))})

    async def converse(socket: websockets.asyncio.server.ServerConnection) -> None:
        await socket.send(pack({}))
        async for _ in socket:
            await socket.send(reply)

    listener = await websockets.asyncio.server.serve(converse, "127.0.0.1", 0, compression=None, max_size=None)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


def main(kind: str) -> None:
    """The command."""
    if kind == "websockets":
        asyncio.run(_answer_alone())
    with running(Nothing()) as server:
        print(server.port, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
