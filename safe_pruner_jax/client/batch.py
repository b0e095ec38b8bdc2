"""Several robots over one connection: `infer_batch`, for any client with openpi's `infer`.

    client = openpi_client.websocket_client_policy.WebsocketClientPolicy("localhost", 8000)
    replies = infer_batch(client, observations)          # one reply each, in order

The server joins them into as few device steps as it can. An observation with a `robot_id` means the memory of that
robot; without one, the i-th observation of every batch on this connection is one robot. The message is that of
openpi's pull request 941: `{"batch": [...]}`. docs/wire.md has the rules.
"""

from collections.abc import Sequence
from typing import Any, Protocol


class Client(Protocol):
    """openpi's client, or anything that sends a map and returns the map that answers it."""

    def infer(self, obs: dict) -> dict:
        """Sends a message and waits for its answer."""
        ...


class NoBatches(RuntimeError):
    """The server answers single observations only."""


class TurnedAway(RuntimeError):
    """Some observations were not run.

    Attributes:
      replies: one per observation; `{"error": why}` for those.
    """

    def __init__(self, replies: list[dict[str, Any]]):
        reasons = {place: reply["error"] for place, reply in enumerate(replies) if "error" in reply}
        super().__init__(f"expected a reply to each observation, got {reasons}; send fresh ones")
        self.replies = replies


def infer_batch(client: Client, observations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One control step of several robots.

    Args:
      client: connected.
      observations: requests as for `infer`, one per robot.

    Returns:
      The replies in order, each as `infer` returns it.

    Raises:
      NoBatches: another server than this package's; nothing was computed.
      TurnedAway: some were not run (expired, superseded, rejected); the exception has the other replies.
    """
    if not observations:
        return []
    answer = client.infer({"batch": list(observations)})
    replies = answer.get("batch")
    if not isinstance(replies, list) or len(replies) != len(observations):
        raise NoBatches(f"expected {len(observations)} replies under 'batch', got the keys {sorted(answer)}")
    if any("error" in reply for reply in replies):
        raise TurnedAway(replies)
    return replies
