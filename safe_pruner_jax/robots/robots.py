"""What a robot's client sends and expects; a robot is a value: `LIBERO`, `DROID`, `ALOHA`, `SingleArm(...)`.

    request ── Robot.input ──> cameras, masks, state, prompt        (then `transform.RobotIO.prepare`)
    actions, in the robot's units ── Robot.output ──> {"actions": [AH, robot's own width]}

Keys, axes, units and dtypes are those of openpi's `policies/*_policy.py`, so its clients work unchanged. A
request that cannot be served raises `RequestError`; entries nobody asked for are ignored.
"""

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Protocol

import numpy as np

MAX_PROMPT_CHARS = 2_000
"""Longest accepted prompt; ten times what 200 tokens hold, so only a mistake or an attack is longer."""

MAX_IMAGE_SIDE = 4_096
"""Largest accepted image side in pixels; a request is refused before anything of its size is computed."""

MAX_IMAGE_ASPECT = 32
"""Largest accepted ratio of the sides; thinner images keep no usable row of pixels after the resize."""


class RequestError(ValueError):
    """A request that cannot be served; the message is meant for whoever wrote the client.

    Args:
      key: the entry of the request at fault, as the client spells it.
      expected: what that entry must be.
      got: what arrived.
      advice: what to change.
    """

    def __init__(self, key: str, expected: str, got: str, advice: str):
        super().__init__(key, expected, got, advice)
        self.key, self.expected, self.got, self.advice = key, expected, got, advice

    def __str__(self) -> str:
        return f"request[{self.key!r}]: expected {self.expected}, got {self.got}; {self.advice}"


def brief(value: object) -> str:
    """A value in a few words, for an error message: arrays by dtype and shape, the rest by type."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    return type(value).__name__


def require(mapping: object, keys: tuple[str, ...], name: str = "request") -> None:
    """Raise unless `mapping` is a dict holding all `keys`; other keys are nobody's business."""
    if not isinstance(mapping, dict):
        raise RequestError(name, "a dict", brief(mapping), f"send one with the keys {', '.join(keys)}")
    if missing := [key for key in keys if key not in mapping]:
        arrived = ", ".join(sorted(map(str, mapping)))[:300] or "none"
        where = "" if name == "request" else f" in {name!r}"
        raise RequestError(
            missing[0],
            f"the keys {', '.join(keys)}{where}",
            f"the keys {arrived}",
            f"add {', '.join(missing)}, or choose the config of this robot",
        )


def read_image(key: str, value: object, *, channels_first: bool | None = None) -> np.ndarray:
    """Check one camera image and bring it to uint8 [H, W, 3].

    Floats in [0, 1] become uint8 by truncation of 255 x, as in openpi.

    Args:
      key: name used in errors.
      value: what the request holds: uint8 or float, [H, W, 3] or [3, H, W].
      channels_first: True when the robot always sends [3, H, W] (ALOHA); None to take a leading 3 as the
        channels (LIBERO, DROID).

    Raises:
      RequestError: anything else, floats that would wrap around, or a size no camera has.
    """
    layout = "[3, H, W]" if channels_first else "[H, W, 3] or [3, H, W]"
    expected = f"a uint8 or float {layout} array"
    if not isinstance(value, np.ndarray):
        raise RequestError(key, expected, brief(value), "send a numpy array")
    if value.dtype != np.uint8 and value.dtype.kind != "f":
        raise RequestError(key, expected, brief(value), "convert it to uint8 in 0..255")
    if value.ndim != 3:
        raise RequestError(key, expected, brief(value), "send one image, without batch or time axis")
    if channels_first or (channels_first is None and value.shape[0] == 3):
        value = np.moveaxis(value, 0, 2)
    height, width, channels = value.shape
    if channels != 3:
        raise RequestError(
            key, expected, f"{channels} channels in {layout} order", "send RGB in the expected axis order"
        )
    if not 1 <= min(height, width) <= max(height, width) <= MAX_IMAGE_SIDE:
        raise RequestError(
            key, f"sides of 1 to {MAX_IMAGE_SIDE} pixels", f"{height} x {width}", "resize it in the client"
        )
    if max(height, width) > MAX_IMAGE_ASPECT * min(height, width):
        raise RequestError(
            key, f"an aspect ratio up to {MAX_IMAGE_ASPECT}", f"{height} x {width}", "crop it in the client"
        )
    if value.dtype == np.uint8:
        return value
    low, high = float(value.min()), float(value.max())
    if not (255 * low > -1 and 255 * high < 256):  # also false for NaN
        raise RequestError(
            key, "floats in [0, 1]", f"values from {low:.4g} to {high:.4g}", "divide by 255 or send uint8"
        )
    return (255 * value).astype(np.uint8)


def read_vector(key: str, value: object, length: int) -> np.ndarray:
    """Check one vector of joint or pose values; floats keep their dtype, integers become float64.

    A single number, as an array without axes or a plain scalar, is a vector of length 1.

    Args:
      key: name used in errors.
      value: what the request holds.
      length: number of values the robot has.

    Raises:
      RequestError: not numeric, another length, or not finite.
    """
    expected = f"a float array of shape ({length},)"
    if isinstance(value, Real):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        raise RequestError(key, expected, brief(value), "send a numpy array")
    if value.dtype.kind not in "fiu":
        raise RequestError(key, expected, brief(value), "convert it to float32 or float64")
    vector = value[np.newaxis] if value.ndim == 0 else value
    if vector.shape != (length,):
        raise RequestError(key, expected, brief(value), "send this robot's values only, without batch axis")
    if not np.isfinite(vector).all():
        bad = np.flatnonzero(~np.isfinite(vector))[0]
        raise RequestError(
            key,
            "finite values",
            f"{vector[bad]} at index {bad}",
            "check the sensor; hold the last valid value",
        )
    return vector if vector.dtype.kind == "f" else vector.astype(np.float64)


def read_prompt(value: object) -> str:
    """Check the instruction: a str, UTF-8 bytes, or a numpy string without axes.

    Raises:
      RequestError: another type, undecodable, blank, or longer than `MAX_PROMPT_CHARS`.
    """
    expected = "a str, bytes in UTF-8, or a numpy str without axes"
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "UST":
        value = value.item()
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
        if not isinstance(text, str):
            raise RequestError("prompt", expected, brief(value), "send the instruction as text")
        text.encode("utf-8")
    except UnicodeError as error:
        raise RequestError("prompt", expected, f"invalid text ({error.reason})", "encode it as UTF-8") from error
    if not text.strip():
        raise RequestError("prompt", "an instruction", "an empty string", "say what the robot should do")
    if len(text) > MAX_PROMPT_CHARS:
        raise RequestError("prompt", f"at most {MAX_PROMPT_CHARS} characters", f"{len(text)} characters", "shorten it")
    return str(text)


class Robot(Protocol):
    """What a robot's client sends and expects.

    `input` checks a raw request, leaves it as it was, and returns openpi's intermediate form: "image" and
    "image_mask" by camera name, "state" float [state_dim] in the robot's units, "prompt" if one came.
    `output` maps actions float64 [AH, AD] in those units to the reply. `target` is its inverse for training: actions
    [T, n] of a demonstration to what the network learns. `example` draws a valid request.
    """

    name: str
    state_dim: int
    action_dim: int

    def input(self, request: dict) -> dict: ...  # noqa: D102

    def output(self, actions: np.ndarray) -> dict: ...  # noqa: D102

    def target(self, actions: np.ndarray) -> np.ndarray: ...  # noqa: D102

    def example(self, rng: np.random.Generator) -> dict: ...  # noqa: D102


def _raw(base: np.ndarray, left: np.ndarray | None, right: np.ndarray | None, state: np.ndarray, request: dict) -> dict:
    """openpi's intermediate form; a missing wrist camera is black and masked."""
    cameras = {"base_0_rgb": base, "left_wrist_0_rgb": left, "right_wrist_0_rgb": right}
    raw = {
        "image": {name: np.zeros_like(base) if image is None else image for name, image in cameras.items()},
        "image_mask": {name: image is not None for name, image in cameras.items()},
        "state": state,
    }
    return raw | ({"prompt": read_prompt(request["prompt"])} if "prompt" in request else {})


@dataclass(frozen=True)
class SingleArm:
    """A robot with one outside and one wrist camera; its state is the concatenation of some entries.

    Args:
      name: for people.
      base_key, wrist_key: image entries, uint8 or float in [0, 1], [H, W, 3] or [3, H, W].
      state_keys: (entry, number of values) in the order of the state.
      action_dim: leading values of an action that the robot takes.
    """

    name: str
    base_key: str
    wrist_key: str
    state_keys: tuple[tuple[str, int], ...]
    action_dim: int

    @property
    def state_dim(self) -> int:
        """Length of the state."""
        return sum(length for _, length in self.state_keys)

    def input(self, request: dict) -> dict:
        """See `Robot`."""
        require(request, (self.base_key, self.wrist_key, *(key for key, _ in self.state_keys)))
        base, wrist = (read_image(key, request[key]) for key in (self.base_key, self.wrist_key))
        state = np.concatenate([read_vector(key, request[key], length) for key, length in self.state_keys])
        return _raw(base, wrist, None, state, request)

    def output(self, actions: np.ndarray) -> dict:
        """See `Robot`."""
        return {"actions": actions[..., : self.action_dim]}

    def target(self, actions: np.ndarray) -> np.ndarray:
        """See `Robot`."""
        return actions[..., : self.action_dim]

    def example(self, rng: np.random.Generator) -> dict:
        """See `Robot`."""
        images = {k: rng.integers(256, size=(224, 224, 3), dtype=np.uint8) for k in (self.base_key, self.wrist_key)}
        return images | {key: rng.random(n) for key, n in self.state_keys} | {"prompt": "do something"}


LIBERO = SingleArm("LIBERO", "observation/image", "observation/wrist_image", (("observation/state", 8),), action_dim=7)
"""LIBERO's Panda. State: end effector (m), axis-angle (rad), fingers (m); action: 6 deltas, the gripper."""

DROID = SingleArm(
    "DROID",
    "observation/exterior_image_1_left",
    "observation/wrist_image_left",
    (("observation/joint_position", 7), ("observation/gripper_position", 1)),
    action_dim=8,
)
"""The DROID platform. State: joints (rad), gripper (0 open, 1 closed); action: 7 joint commands, gripper."""


@dataclass(frozen=True)
class Aloha:
    """Two arms of 6 joints and a gripper each; state and action are left then right, 14 values.

    The request holds "state" [14] and "images", a dict of uint8 or float [3, H, W]: cam_high always,
    cam_left_wrist and cam_right_wrist if there are, cam_low ignored.

    Args:
      adapt_to_pi: convert from ALOHA's joint signs and linear gripper to those π0 was trained on, and back.

    References: gripper constants from ALOHA's and Interbotix' code, as quoted in openpi's `aloha_policy.py`.
    """

    adapt_to_pi: bool = True
    name: ClassVar[str] = "ALOHA"
    state_dim: ClassVar[int] = 14
    action_dim: ClassVar[int] = 14
    cameras: ClassVar[tuple[str, ...]] = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")

    def input(self, request: dict) -> dict:
        """See `Robot`."""
        require(request, ("images", "state"))
        images = request["images"]
        require(images, ("cam_high",), "images")
        if unknown := sorted(str(key) for key in images if key not in self.cameras):
            raise RequestError(
                f"images/{unknown[0]}",
                f"the cameras {', '.join(self.cameras)}",
                unknown[0],
                "rename or drop it",
            )
        base, left, right = (
            read_image(f"images/{key}", images[key], channels_first=True) if key in images else None
            for key in ("cam_high", "cam_left_wrist", "cam_right_wrist")
        )
        state = read_vector("state", request["state"], self.state_dim)
        return _raw(base, left, right, self._to_pi(state) if self.adapt_to_pi else state, request)

    def output(self, actions: np.ndarray) -> dict:
        """See `Robot`."""
        actions = actions[..., : self.action_dim]
        if self.adapt_to_pi:
            actions = _ALOHA_SIGNS * actions
            # π0's angle from its own zero (0.5476 rad), then ALOHA's range of the gripper joint, rad.
            angle = actions[..., _ALOHA_GRIPPERS] + 0.5476
            actions[..., _ALOHA_GRIPPERS] = (angle - -0.6213) / (1.4910 - -0.6213)
        return {"actions": actions}

    def target(self, actions: np.ndarray) -> np.ndarray:
        """See `Robot`."""
        actions = actions[..., : self.action_dim]
        if self.adapt_to_pi:
            actions = _ALOHA_SIGNS * actions
            angle = actions[..., _ALOHA_GRIPPERS] * (1.4910 - -0.6213) + -0.6213
            actions[..., _ALOHA_GRIPPERS] = angle - 0.5476
        return actions

    def example(self, rng: np.random.Generator) -> dict:
        """See `Robot`."""
        images = {key: rng.integers(256, size=(3, 224, 224), dtype=np.uint8) for key in self.cameras}
        return {"state": np.ones(14), "images": images, "prompt": "do something"}

    @staticmethod
    def _to_pi(state: np.ndarray) -> np.ndarray:
        """Flip the joints that turn the other way; opening in [0, 1] to π0's scaled gripper angle."""
        state = _ALOHA_SIGNS * state
        finger = state[_ALOHA_GRIPPERS] * (0.05800 - 0.01844) + 0.01844  # m, ALOHA's closed and open
        horn, arm = 0.022, 0.036  # m, the crank that moves the finger
        angle = np.arcsin(np.clip((horn**2 + finger**2 - arm**2) / (2 * horn * finger), -1.0, 1.0))
        state[_ALOHA_GRIPPERS] = (angle - 0.5476) / (1.6296 - 0.5476)  # encoder counts 2405..3110 in rad
        return state


ALOHA = Aloha()
"""ALOHA and its simulation, in π0's joint convention, as all of openpi's ALOHA configs use it."""

_ALOHA_SIGNS = np.array([1.0, -1, -1, 1, 1, 1, 1] * 2)
_ALOHA_GRIPPERS = [6, 13]
