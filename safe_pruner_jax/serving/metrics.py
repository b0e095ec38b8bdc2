"""What the server counts, for Prometheus: `GET /metrics`."""

from typing import Any

import prometheus_client as prometheus

from safe_pruner_jax.serving.backend import Served

TYPE = prometheus.CONTENT_TYPE_LATEST
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768)
ERRORS = ("bad_message", "bad_request", "non_finite", "internal", "unauthorised", "too_many_connections", "slow_reader")


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self):
        self.registry = prometheus.CollectorRegistry()

        def make(kind: type, name: str, text: str, **more: Any) -> Any:
            return kind(f"safe_pruner_{name}", text, registry=self.registry, **more)

        counter, gauge, histogram = prometheus.Counter, prometheus.Gauge, prometheus.Histogram
        outcomes = "Requests by outcome: ok, rejected, expired, superseded, error"
        self.requests = make(counter, "requests", outcomes, labelnames=["outcome"])
        self.errors = make(counter, "errors", "Errors by kind", labelnames=["kind"])
        self.queue = make(histogram, "queue_seconds", "From a request read to the start of its step", buckets=SECONDS)
        self.device = make(histogram, "device_seconds", "One step of the accelerator", buckets=SECONDS)
        self.latency = make(histogram, "request_seconds", "From a request received to its reply sent", buckets=SECONDS)
        self.batch = make(histogram, "batch_robots", "Robots in one step", buckets=(1, 2, 3, 4, 6, 8, 16))
        self.steps = make(counter, "steps", "Control steps of robots by path: full, pruned", labelnames=["path"])
        self.keyframes = make(gauge, "keyframe_share", "Share of control steps on the full path")
        self.kept = make(histogram, "kept_tokens", "Visual tokens that the deep layers saw", buckets=TOKENS)
        self.evictions = make(counter, "evictions", "Memories dropped because of their age or number")
        self.fallbacks = make(counter, "fallbacks", "Steps put on the full path because something was not finite")
        self.connections = make(gauge, "connections", "Open connections")
        self.waiting = make(gauge, "waiting_requests", "Requests in the queue")
        self.ready = make(gauge, "ready", "1 once every program is compiled, 0 before and while stopping")
        for outcome in ("ok", "rejected", "expired", "superseded", "error"):
            self.requests.labels(outcome)
        for kind in ERRORS:
            self.errors.labels(kind)
        self._paths = {"full": 0, "pruned": 0}
        for path in self._paths:
            self.steps.labels(path)
        self._evicted = 0

    def stepped(self, robots: int, seconds: float, evicted: int) -> None:
        """Counts one step of the accelerator; `evicted` is the backend's running total."""
        self.batch.observe(robots)
        self.device.observe(seconds)
        self.evictions.inc(evicted - self._evicted)
        self._evicted = evicted

    def served(self, served: Served) -> None:
        """Counts one robot's control step."""
        self.queue.observe(served.queue_s)
        pruning = served.result.pruning
        if not pruning:
            return
        path = "full" if pruning["keyframe"] else "pruned"
        self._paths[path] += 1
        self.steps.labels(path).inc()
        self.keyframes.set(self._paths["full"] / sum(self._paths.values()))
        self.kept.observe(pruning["kept"])
        if pruning.get("fallback"):
            self.fallbacks.inc()

    def error(self, kind: str) -> None:
        """Counts an error; `kind` is one of `ERRORS`."""
        self.errors.labels(kind).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)
