"""Requests and robots: openpi's conventions, and what a bad request is told."""

import copy
import pickle

import numpy as np
import pytest
from oracles.robots import slow_gripper_angle
from toy_robots import request_of, robot_io

from safe_pruner_jax.model.config import CAMERAS
from safe_pruner_jax.robots.configs import CONFIGS, get_config
from safe_pruner_jax.robots.robots import ALOHA, DROID, LIBERO, MAX_IMAGE_SIDE, MAX_PROMPT_CHARS, Aloha, RequestError

ROBOTS = pytest.mark.parametrize("robot", [LIBERO, DROID, ALOHA], ids=lambda r: r.name)


# The robots, against slow plain Python


def test_droid_input():
    request = request_of(DROID) | {"observation/gripper_position": np.float32(0.25)}
    raw = DROID.input(request)
    assert raw["state"].tolist() == [*request["observation/joint_position"].tolist(), 0.25]
    np.testing.assert_array_equal(raw["image"]["base_0_rgb"], request["observation/exterior_image_1_left"])
    np.testing.assert_array_equal(raw["image"]["left_wrist_0_rgb"], request["observation/wrist_image_left"])
    assert not raw["image"]["right_wrist_0_rgb"].any()
    assert raw["image_mask"] == dict(zip(CAMERAS, (True, True, False), strict=True))


@pytest.mark.parametrize("gripper", [0.25, np.array(0.25), np.array([0.25]), np.float64(0.25)])
def test_droid_gripper_may_be_a_number(gripper):
    assert DROID.input(request_of(DROID) | {"observation/gripper_position": gripper})["state"][7] == 0.25


@pytest.mark.parametrize("robot, width", [(LIBERO, 7), (DROID, 8)], ids=["LIBERO", "DROID"])
def test_single_arm_takes_its_leading_actions(robot, width):
    actions = np.arange(64.0).reshape(2, 32)
    assert robot.output(actions)["actions"].tolist() == actions[:, :width].tolist()


def test_aloha_input():
    state = np.random.default_rng(1).uniform(0.05, 1, 14)
    images = {key: np.full((3, 4, 5), i, np.uint8) for i, key in enumerate(ALOHA.cameras)}
    raw = ALOHA.input({"state": state, "images": images})
    flipped = (1, 2, 8, 9)
    for i, value in enumerate(raw["state"]):
        slow = slow_gripper_angle(state[i]) if i in (6, 13) else -state[i] if i in flipped else state[i]
        assert value == pytest.approx(slow, rel=1e-12)
    assert [raw["image"][name].shape for name in CAMERAS] == [(4, 5, 3)] * 3
    assert [int(raw["image"][name][0, 0, 0]) for name in CAMERAS] == [0, 2, 3]
    assert all(raw["image_mask"].values()) and "prompt" not in raw


def test_aloha_output():
    actions = np.random.default_rng(2).normal(size=(3, 32))
    before = actions.copy()
    out = ALOHA.output(actions)["actions"]
    for row, given in zip(out, before, strict=True):
        for i, value in enumerate(row):
            slow = -given[i] if i in (1, 2, 8, 9) else given[i]
            if i in (6, 13):
                slow = (given[i] + 0.5476 + 0.6213) / (1.4910 + 0.6213)
            assert value == pytest.approx(slow, rel=1e-12)
    assert out.shape == (3, 14)
    np.testing.assert_array_equal(actions, before)


def test_aloha_without_adaptation_passes_joints_on():
    robot, state = Aloha(adapt_to_pi=False), np.arange(14.0)
    assert robot.input(request_of(robot) | {"state": state})["state"].tolist() == state.tolist()
    assert robot.output(np.ones((2, 32)))["actions"].tolist() == np.ones((2, 14)).tolist()


def test_aloha_masks_the_wrists_that_are_missing():
    request = request_of(ALOHA)
    del request["images"]["cam_left_wrist"]
    raw = ALOHA.input(request)
    assert raw["image_mask"] == dict(zip(CAMERAS, (True, False, True), strict=True))
    assert not raw["image"]["left_wrist_0_rgb"].any()
    assert raw["image"]["left_wrist_0_rgb"].shape == (224, 224, 3)


@ROBOTS
def test_float_images_are_truncated(robot):
    request, values = request_of(robot), np.linspace(0, 1, 3 * 6 * 5, dtype=np.float32).reshape(3, 6, 5)
    if robot is ALOHA:
        request["images"]["cam_high"] = values
    else:
        request[robot.base_key] = values
    image = robot.input(request)["image"]["base_0_rgb"]
    slow = [[[int(np.float32(255) * values[c, y, x]) for c in range(3)] for x in range(5)] for y in range(6)]
    assert image.dtype == np.uint8 and image.tolist() == slow


@ROBOTS
def test_the_request_is_left_alone_and_extra_keys_are_ignored(robot):
    request = request_of(robot) | {"reset": True, "observation/unknown": object}
    before = copy.deepcopy(request)
    config = next(c for c in CONFIGS.values() if c.robot == robot)
    example, _ = robot_io(config).prepare(request)
    assert request.keys() == before.keys()
    for key in before:
        np.testing.assert_equal(request[key], before[key])
    arrays = [v for v in (*request.values(), *request.get("images", {}).values()) if isinstance(v, np.ndarray)]
    assert not any(np.shares_memory(image, v) for image in example.images.values() for v in arrays)


# Bad requests

GOOD = np.zeros((8, 8, 3), np.uint8)
IMAGE = "observation/image"
STATE = "observation/state"
BAD = {
    "image missing": ({IMAGE: ...}, IMAGE, "observation/wrist_image, prompt"),
    "state missing": ({STATE: ...}, STATE, "the keys observation/image"),
    "prompt missing": ({"prompt": ...}, "prompt", "default prompt"),
    "image is a list": ({IMAGE: GOOD.tolist()}, IMAGE, "got list"),
    "image is None": ({IMAGE: None}, IMAGE, "got NoneType"),
    "image is bytes": ({IMAGE: b"\xff\xd8jpeg"}, IMAGE, "got bytes"),
    "image of objects": ({IMAGE: GOOD.astype(object)}, IMAGE, "object array"),
    "image of int64": ({IMAGE: GOOD.astype(np.int64)}, IMAGE, "int64 array"),
    "image of bool": ({IMAGE: GOOD.astype(bool)}, IMAGE, "bool array"),
    "image of text": ({IMAGE: np.array([["x"]])}, IMAGE, "array"),
    "image without channels": ({IMAGE: GOOD[..., 0]}, IMAGE, "shape (8, 8)"),
    "batch of images": ({IMAGE: GOOD[None]}, IMAGE, "batch or time axis"),
    "four channels": ({IMAGE: np.zeros((8, 8, 4), np.uint8)}, IMAGE, "4 channels"),
    "one channel": ({IMAGE: np.zeros((8, 8, 1), np.uint8)}, IMAGE, "1 channels"),
    "empty image": ({IMAGE: np.zeros((0, 8, 3), np.uint8)}, IMAGE, "0 x 8"),
    "empty image, channels first": ({IMAGE: np.zeros((3, 8, 0), np.float32)}, IMAGE, "8 x 0"),
    "huge image": (
        {IMAGE: np.broadcast_to(np.uint8(0), (MAX_IMAGE_SIDE + 1, 9, 3))},
        IMAGE,
        f"{MAX_IMAGE_SIDE + 1} x 9",
    ),
    "a thread of an image": ({IMAGE: np.zeros((1, 300, 3), np.uint8)}, IMAGE, "aspect"),
    "float image in 0..255": ({IMAGE: np.full((8, 8, 3), 200.0)}, IMAGE, "divide by 255"),
    "float image in -1..1": ({IMAGE: np.full((8, 8, 3), -1.0)}, IMAGE, "floats in [0, 1]"),
    "image with NaN": ({IMAGE: np.full((8, 8, 3), np.nan, np.float32)}, IMAGE, "nan"),
    "state is a list": ({STATE: [0.0] * 8}, STATE, "got list"),
    "state too short": ({STATE: np.zeros(7)}, STATE, "shape (7,)"),
    "state with a batch axis": ({STATE: np.zeros((1, 8))}, STATE, "shape (1, 8)"),
    "state is a number": ({STATE: 1.5}, STATE, "shape ()"),
    "state of objects": ({STATE: np.zeros(8, object)}, STATE, "object array"),
    "state of bool": ({STATE: np.zeros(8, bool)}, STATE, "bool array"),
    "state is a bool": ({STATE: True}, STATE, "got"),
    "many other keys": ({IMAGE: ...} | {f"key {i}": 0 for i in range(999)}, IMAGE, "the keys key 0"),
    "state of complex": ({STATE: np.zeros(8, complex)}, STATE, "complex128 array"),
    "state with NaN": ({STATE: np.array([0, 0, np.nan, 0, 0, 0, 0, 0])}, STATE, "nan at index 2"),
    "state with inf": ({STATE: np.full(8, np.inf)}, STATE, "inf at index 0"),
    "state beyond float32": ({STATE: np.full(8, 1e300)}, "state", "1e+300"),
    "prompt is a number": ({"prompt": 3}, "prompt", "got int;"),
    "prompt is None": ({"prompt": None}, "prompt", "got NoneType"),
    "prompt is a list": ({"prompt": ["pick"]}, "prompt", "got list"),
    "prompts": ({"prompt": np.array(["pick", "up"])}, "prompt", "shape (2,)"),
    "prompt object": ({"prompt": np.array("pick", object)}, "prompt", "object array"),
    "empty prompt": ({"prompt": ""}, "prompt", "empty"),
    "blank prompt": ({"prompt": " \n\t"}, "prompt", "empty"),
    "endless prompt": (
        {"prompt": "a" * (MAX_PROMPT_CHARS + 1)},
        "prompt",
        f"{MAX_PROMPT_CHARS + 1} characters",
    ),
    "prompt in Latin-1": ({"prompt": "für".encode("latin-1")}, "prompt", "UTF-8"),
    "prompt with half a character": ({"prompt": "\ud800"}, "prompt", "surrogates"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request(case):
    changes, key, told = BAD[case]
    request = {k: v for k, v in (request_of(LIBERO) | changes).items() if v is not ...}
    with pytest.raises(RequestError) as error:
        robot_io(get_config("pi05_libero")).prepare(request)
    message = str(error.value)
    assert error.value.key == key and told in message
    assert error.value.expected and error.value.got and error.value.advice and len(message) < 500


@pytest.mark.parametrize("request_", [None, [], b"", np.zeros(3)])
@ROBOTS
def test_a_request_that_is_no_dict(robot, request_):
    with pytest.raises(RequestError, match="a dict"):
        robot.input(request_)


ALOHA_BAD = {
    "images missing": ({"images": ...}, "images", "add images"),
    "images is an array": ({"images": GOOD}, "images", "a dict"),
    "no cam_high": ({"images": {"cam_low": GOOD}}, "cam_high", "the keys cam_low"),
    "unknown camera": (
        {"images": {"cam_high": GOOD.T, "cam_left": GOOD.T}},
        "images/cam_left",
        "cam_left_wrist",
    ),
    "channels last": ({"images": {"cam_high": GOOD}}, "images/cam_high", "8 channels in [3, H, W] order"),
    "one arm": ({"state": np.zeros(7)}, "state", "shape (14,)"),
}


@pytest.mark.parametrize("case", ALOHA_BAD)
def test_bad_aloha_request(case):
    changes, key, told = ALOHA_BAD[case]
    request = {k: v for k, v in (request_of(ALOHA) | changes).items() if v is not ...}
    with pytest.raises(RequestError) as error:
        ALOHA.input(request)
    assert error.value.key == key and told in str(error.value)


def test_request_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(RequestError("prompt", "text", "int 3", "send text")))
    assert str(error) == "request['prompt']: expected text, got int 3; send text"
