"""People who look on: the last step of every robot, pushed to observers and shown on `/watch`.

Robots do not wait for them. `publish` keeps a reference and returns; pictures are compressed and messages packed in a
thread of their own when somebody asks, and an observer that is slow misses steps.
"""

import asyncio
import base64
import contextlib
import io
import json
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from safe_pruner_jax.serving.recorder import Step
from safe_pruner_jax.serving.wire import pack

ROBOTS = 32
"""Robots remembered for those who look on; the one silent for longest is dropped."""
HISTORY = 120
"""Steps of each that the page draws."""
QUEUE = 4
"""Steps that wait for an observer; the oldest is dropped."""
MOST = 8
"""Observers at a time."""


@dataclass(eq=False)
class _Robot:
    """What is known of a robot: its last step, when, how many there were, and a few numbers of the last ones."""

    step: Step
    number: int = 0
    at: float = 0.0
    history: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=HISTORY))


class Observers:
    """The last steps of all robots. Everything but `state` and `message` is for the event loop.

    Attributes:
      threads: where to run `state` and `message`.
    """

    def __init__(self):
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="observers")
        self._robots: OrderedDict[Hashable, _Robot] = OrderedDict()
        self._queues: list[asyncio.Queue[_Robot]] = []

    def publish(self, step: Step) -> None:
        """A robot's new step; returns at once."""
        robot = self._robots.pop(step.robot, None) or _Robot(step)
        entry = _Robot(step, 1 if step.fresh else robot.number + 1, time.time(), robot.history)
        if step.fresh:
            entry.history.clear()
        entry.history.append(_numbers(step.reply))
        self._robots[step.robot] = entry
        if len(self._robots) > ROBOTS:
            self._robots.popitem(last=False)
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(entry)

    @property
    def full(self) -> bool:
        """Whether there are as many observers as may be."""
        return len(self._queues) >= MOST

    @contextlib.contextmanager
    def subscribed(self) -> Iterator[asyncio.Queue[_Robot]]:
        """A queue of steps for `message`, from now on."""
        queue: asyncio.Queue[_Robot] = asyncio.Queue(QUEUE)
        self._queues.append(queue)
        try:
            yield queue
        finally:
            self._queues.remove(queue)

    def robots(self) -> list[_Robot]:
        """Those that are known now, for `state`."""
        return list(self._robots.values())

    @staticmethod
    def message(robot: _Robot) -> bytes:
        """One step for an observer, as on the wire (docs/wire.md, *Looking on*)."""
        step, saliency = robot.step, {}
        for name, value in step.saliency.items():
            array = np.asarray(value, np.float16)  # `late` comes from the device here, for who looks on only
            if array.size and np.isfinite(array).all():
                saliency[name] = array.reshape(-1, array.shape[-1])
        rest = {key: value for key, value in step.request.items() if getattr(value, "ndim", 0) < 3}
        about = {"robot": name_of(step.robot), "number": robot.number, "time": robot.at, "fresh": step.fresh}
        images = {camera: np.ascontiguousarray(image) for camera, image in step.images.items()}
        return pack(about | {"request": rest, "images": images, "reply": step.reply, "saliency": saliency})

    @staticmethod
    def state(robots: list[_Robot]) -> bytes:
        """What the page shows, JSON."""
        now = time.time()
        return json.dumps({"robots": [_shown(robot, now) for robot in robots]}).encode()


def name_of(robot: Hashable) -> str:
    """A robot's id, or which connection it is, and its place in a batch."""
    if not isinstance(robot, tuple):
        return str(robot)
    kind, *rest = robot
    return "/".join(map(str, rest)) if kind == "robot" else " ".join(map(str, robot))


def page() -> bytes:
    """The HTML of `/watch`."""
    return (resources.files("safe_pruner_jax.serving") / "watch.html").read_bytes()


def _numbers(reply: dict) -> dict[str, Any]:
    """What the page draws over time."""
    pruning, timing = reply.get("pruning") or {}, reply.get("policy_timing") or {}
    number = lambda value: None if value is None else round(float(value), 4)
    return {
        "kappa": number(pruning.get("kappa")),
        "keyframe": bool(pruning.get("keyframe", False)),
        "ms": number(timing.get("infer_ms")),
    }


def _shown(robot: _Robot, now: float) -> dict[str, Any]:
    step, pruning = robot.step, robot.step.reply.get("pruning") or {}
    views = pruning.get("views") or []
    cell = pruning["alive"] // len(views) if views else 0
    kept = np.zeros(cell * len(views), bool)
    kept[np.asarray(pruning.get("index", ()), int)] = True
    cameras = [
        {
            "name": camera,
            "picture": _jpeg(step.images[camera]),
            "grid": round(cell**0.5),
            "kept": np.flatnonzero(kept[i * cell : (i + 1) * cell]).tolist(),
        }
        for i, camera in enumerate(views)
        if camera in step.images
    ]
    return {
        "robot": name_of(step.robot),
        "step": robot.number,
        "age_s": round(now - robot.at, 1),
        "prompt": str(step.request.get("prompt", "")),
        "kept": pruning.get("kept"),
        "alive": pruning.get("alive"),
        "fallback": bool(pruning.get("fallback", False)),
        "batch": step.batch,
        "cameras": cameras,
        "history": list(robot.history),
    }


def _jpeg(image: np.ndarray) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
