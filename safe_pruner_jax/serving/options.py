"""`--serving.…`: what a person can choose about a server, and the objects made of it."""

import dataclasses

import jax

from safe_pruner_jax.policy.fleet import Fleet
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.serving.access import Access, read_key, tls_context
from safe_pruner_jax.serving.scheduler import Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """Who may connect, and what a request may expect.

    Args:
      max_batch: robots per device step. None: 8 on an accelerator, 1 on a CPU, where joining gains nothing. Every size
        is compiled before the server is ready.
      max_delay_ms: how long a request waits for others to join its step; nobody waits while one robot is connected.
      max_queue: requests waiting at most; the next is rejected.
      deadline_ms: a request that waits longer than this is not run.
      drain_s: how long a stopping server goes on answering what waits.
      max_robots: memories kept; the one unused for longest is dropped first.
      max_age_s: a memory unused for longer is dropped.
      real_time: take requests with `rtc`, whose actions continue the last ones; compiles their programs too.
      attention: take requests with `attention`, which are answered with grids; compiles their programs too.
      watch: let people with the key look on: the page /watch, and `openpi view ws://HOST:PORT`.
      max_message_mib: largest request.
      per_address: connections from one address.
      connections: connections altogether.
      api_key_file: file with the key that clients must send; default: $OPENPI_API_KEY, and no key without it.
      insecure: listen beyond this machine without a key.
      tls_cert: certificate chain, PEM; with tls_key the port speaks TLS (wss://).
      tls_key: private key of the certificate, PEM.
    """

    max_batch: int | None = None
    max_delay_ms: float = 5.0
    max_queue: int = 64
    deadline_ms: float = 10_000.0
    drain_s: float = 20.0
    max_robots: int = 256
    max_age_s: float = 3600.0
    real_time: bool = False
    attention: bool = False
    watch: bool = False
    max_message_mib: int = 64
    per_address: int = 64
    connections: int = 256
    api_key_file: str | None = None
    insecure: bool = False
    tls_cert: str | None = None
    tls_key: str | None = None

    def access(self, host: str) -> Access:
        """Who may connect; raises ServerError, also for a host that is open to others without a key."""
        access = Access(
            key=read_key(self.api_key_file),
            tls=tls_context(self.tls_cert, self.tls_key),
            insecure=self.insecure,
            per_address=self.per_address,
            connections=self.connections,
        )
        access.check(host)
        return access

    def terms(self) -> Terms:
        """What a request may expect; raises ValueError."""
        return Terms(self.max_queue, self.max_delay_ms / 1e3, self.deadline_ms / 1e3, self.drain_s)

    def fleet(self, policy: Policy) -> Fleet:
        """The policy for many robots."""
        limit = self.max_batch
        if limit is None:
            limit = 1 if jax.default_backend() == "cpu" else 8
        memories = {"max_robots": self.max_robots, "max_age_s": self.max_age_s}
        return Fleet(policy, limit, real_time=self.real_time, attention=self.attention, **memories)
