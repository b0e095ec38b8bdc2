"""What `soak.py` sends: scripted episodes, and real messages broken in their structure or their bytes."""

import random

import msgpack
import numpy as np

from safe_pruner_jax.serving import pack


def episode(robot: int, seed: int) -> list[dict]:
    """A robot's scripted requests; its first starts afresh, and every fourth robot continues its chunks (`rtc`)."""
    rng = np.random.default_rng([seed, robot])

    def scene() -> np.ndarray:
        return np.kron(rng.integers(0, 240, (16, 16, 3), np.uint8), np.ones((14, 14, 1), np.uint8))

    first, second = scene(), scene()
    moved = np.roll(first, 14, axis=1)
    black = np.zeros_like(first)
    frames = [first, moved, moved, black, black, first, second, second]
    overlap = {"rtc": {"executed": 4, "delay": 3}} if robot % 4 == 3 else {}
    return [
        {
            "observation/image": frame,
            "observation/wrist_image": np.ascontiguousarray(frame[::-1]),
            "observation/state": rng.random(8),
            "prompt": "open the drawer" if step == len(frames) - 1 else "pick up the bowl",
            "reset": step == 0,
        }
        | overlap
        for step, frame in enumerate(frames)
    ]


def mutate(request: dict, rng: random.Random) -> bytes:
    """A real message, broken in one of its structures or in its bytes."""
    tree = msgpack.unpackb(pack(request), strict_map_key=False)
    key = rng.choice(list(tree))
    arrays = [k for k, v in tree.items() if isinstance(v, dict)]
    choice = rng.randrange(8)
    if choice == 0:
        tree[key] = rng.choice([None, -1, 2**63, "x" * 5000, b"\0" * 9, [], {}, [[[[[]]]]], float("nan"), True])
    elif choice == 1:
        field = rng.choice([b"data", b"dtype", b"shape", b"__ndarray__"])
        values = ["|O", "<f4", ">U9", "V8", [], [2**62, 4], [-1], b"", None, 7, [1.5], "f4,f4", [224, 224, 3]]
        tree[rng.choice(arrays)][field] = rng.choice(values)
    elif choice == 2:
        del tree[rng.choice(arrays)][rng.choice([b"data", b"dtype", b"shape"])]
    elif choice == 3:
        for _ in range(rng.choice([15, 17, 40])):
            tree = {"a": tree}
    elif choice == 4:
        tree = {rng.choice([1, None, 1.5, b"x"]): tree} if rng.random() < 0.5 else [tree]
    data = bytearray(msgpack.packb(tree))
    if choice == 5:
        del data[rng.randrange(len(data)) :]
    elif choice == 6:
        for _ in range(rng.randint(1, 8)):  # the head holds lengths and types, the rest mostly pixels
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
    elif choice == 7:
        data += rng.randbytes(rng.randint(1, 64))
    return bytes(data)
