"""Requests, robots and named configs: openpi's numbers, its conventions, and what a bad request is told."""

import copy
import dataclasses
import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from safe_pruner_jax.configs import CONFIGS, DEFAULT_CHECKPOINTS, UNSUPPORTED, RobotIO, get_config
from safe_pruner_jax.model.config import CAMERAS
from safe_pruner_jax.observation import NormStats, Tokenizer
from safe_pruner_jax.robots import ALOHA, DROID, LIBERO, MAX_IMAGE_SIDE, MAX_PROMPT_CHARS, Aloha, RequestError

DATA = Path(__file__).parent / "data"
NORM_STATS = DATA / "ckpt_tiny_pi05" / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
ROBOTS = pytest.mark.parametrize("robot", [LIBERO, DROID, ALOHA], ids=lambda r: r.name)


def fake_stats(dim, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.normal(size=dim)
    return NormStats(low, rng.uniform(0.5, 2, dim), low - 1, low + rng.uniform(1, 3, dim))


def robot_io(config, stats=None, **more):
    stats = stats or {
        "state": fake_stats(config.robot.state_dim),
        "actions": fake_stats(config.robot.action_dim, 1),
    }
    return RobotIO(config, stats, Tokenizer(DATA / "toy_sentencepiece.model", config.model.max_token_len), **more)


def request_of(robot, seed=0):
    return robot.example(np.random.default_rng(seed))


# pi05_libero end to end, against openpi


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(DATA / "openpi_pi05_libero_e2e.npz"))


@pytest.fixture(scope="module")
def libero_stats():
    entries = json.loads(NORM_STATS.read_text())["norm_stats"]
    return {key: NormStats(**entry) for key, entry in entries.items()}


@pytest.fixture(scope="module")
def libero_prompt():
    return json.loads((DATA / "openpi_pi05_libero_e2e.json").read_text())["prompt"]


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("sent", ["small", "raw", "float", "channels first"])
def test_libero_end_to_end_is_openpis(golden, libero_stats, libero_prompt, discrete, sent):
    case = "discrete_true" if discrete else "discrete_false"
    config = get_config("pi05_libero")
    model = config.model.replace(discrete_state_input=discrete)
    io = robot_io(dataclasses.replace(config, model=model), libero_stats)
    names = ("in/raw_image_256", "in/raw_wrist_256") if sent == "raw" else ("in/image", "in/wrist_image")
    image, wrist = (golden[name] for name in names)
    if sent == "float":
        image = (image + 0.5) / 255
    if sent == "channels first":
        image = image.transpose(2, 0, 1)
    example, context = io.prepare(
        {
            "observation/image": image,
            "observation/wrist_image": wrist,
            "observation/state": golden["in/state"],
            "prompt": libero_prompt,
        }
    )
    assert tuple(example.images) == CAMERAS
    np.testing.assert_array_equal(example.images["base_0_rgb"], golden["in/image"])
    np.testing.assert_array_equal(example.images["left_wrist_0_rgb"], golden["in/wrist_image"])
    assert not example.images["right_wrist_0_rgb"].any()
    assert example.image_mask == dict(zip(CAMERAS, (True, True, False), strict=True))
    assert example.tokens.dtype == np.int32 and len(example.tokens) == golden[f"{case}/token_mask"].sum()
    np.testing.assert_array_equal(example.tokens, golden[f"{case}/tokens"][: len(example.tokens)])
    assert example.state.dtype == np.float32
    np.testing.assert_allclose(example.state, golden[f"{case}/state_norm_padded"], rtol=0, atol=1e-6)
    reply = io.finish(golden[f"{case}/model_actions"], context)
    assert reply["actions"].dtype == np.float64 and reply["actions"].shape == (10, 7)
    np.testing.assert_allclose(reply["actions"], golden[f"{case}/actions"], rtol=0, atol=1e-9)


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


def _slow_gripper_angle(opening):
    finger = 0.01844 + opening * (0.058 - 0.01844)
    sine = (0.022**2 + finger**2 - 0.036**2) / (2 * 0.022 * finger)
    return (math.asin(min(1.0, max(-1.0, sine))) - 0.5476) / (1.6296 - 0.5476)


def test_aloha_input():
    state = np.random.default_rng(1).uniform(0.05, 1, 14)
    images = {key: np.full((3, 4, 5), i, np.uint8) for i, key in enumerate(ALOHA.cameras)}
    raw = ALOHA.input({"state": state, "images": images})
    flipped = (1, 2, 8, 9)
    for i, value in enumerate(raw["state"]):
        slow = _slow_gripper_angle(state[i]) if i in (6, 13) else -state[i] if i in flipped else state[i]
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


# RobotIO


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_serves_its_own_example(name):
    config = get_config(name)
    io = robot_io(config, default_prompt="do something")
    request = request_of(config.robot)
    del request["prompt"]
    example, context = io.prepare(request)
    assert example.state.shape == (config.model.action_dim,) and example.state.dtype == np.float32
    assert not example.state[config.robot.state_dim :].any()
    assert 0 < len(example.tokens) <= config.model.max_token_len
    side = config.model.image_size
    assert {im.shape for im in example.images.values()} == {(side, side, 3)}
    assert tuple(example.images) == tuple(example.image_mask) == config.model.cameras
    actions = np.zeros((config.model.action_horizon, config.model.action_dim), np.float32)
    reply = io.finish(actions, context)["actions"]
    assert reply.shape == (config.model.action_horizon, config.robot.action_dim) and reply.dtype == np.float64


@pytest.mark.parametrize("name", ["pi0_libero", "pi0_aloha", "pi05_droid_jointpos_polaris"])
def test_relative_actions_are_added_to_the_state(name):
    config = (
        dataclasses.replace(get_config(name), robot=Aloha(adapt_to_pi=False)) if "aloha" in name else get_config(name)
    )
    relative, absolute = robot_io(config), robot_io(dataclasses.replace(config, delta_mask=None))
    request = request_of(config.robot)
    example, context = relative.prepare(request)
    actions = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    before = actions.copy()
    added = relative.finish(actions, context)["actions"] - absolute.finish(actions, context)["actions"]
    state, width = config.robot.input(request)["state"], config.robot.action_dim
    slow = [state[i] if config.delta_mask[i] else 0.0 for i in range(width)]
    np.testing.assert_allclose(added, [slow] * 4, atol=1e-6)
    assert not added[:, [i for i in range(width) if not config.delta_mask[i]]].any()
    np.testing.assert_array_equal(actions, before)
    np.testing.assert_array_equal(context.state, example.state)


def test_default_prompts_and_their_order():
    towel = get_config("pi0_aloha_towel")
    request = request_of(ALOHA)
    asked = request.pop("prompt")

    def ids(io, **more):
        return io.prepare(request | more)[0].tokens.tolist()

    encode = robot_io(towel).tokenizer.encode
    assert ids(robot_io(towel)) == encode("fold the towel").tolist()
    assert ids(robot_io(towel, default_prompt="pick up")) == encode("pick up").tolist()
    assert ids(robot_io(towel, default_prompt="pick up"), prompt=asked) == encode(asked).tolist()


@pytest.mark.parametrize(
    "prompt",
    [
        "pick up ü",
        "pick up ü".encode(),
        np.str_("pick up ü"),
        np.array("pick up ü"),
        np.bytes_("pick up ü".encode()),
        np.array("pick up ü".encode()),
    ],
)
def test_prompt_may_be_any_kind_of_text(prompt):
    io = robot_io(get_config("pi05_libero"))
    tokens = io.prepare(request_of(LIBERO) | {"prompt": prompt})[0].tokens
    assert tokens.tolist() == io.tokenizer.encode("pick up ü").tolist()


def test_threads_may_share_one_io():
    io = robot_io(get_config("pi05_droid"))
    requests = [request_of(DROID, seed) for seed in range(16)]
    alone = [io.prepare(request)[0] for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = [example for example, _ in pool.map(io.prepare, requests)]
    for a, b in zip(alone, together, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_array_equal(a.images["base_0_rgb"], b.images["base_0_rgb"])


def test_io_refuses_what_does_not_belong_to_its_policy():
    config = get_config("pi05_libero")
    good = {"state": fake_stats(8), "actions": fake_stats(7)}
    tokenizer = Tokenizer(DATA / "toy_sentencepiece.model", 200)
    bare = NormStats(np.zeros(8), np.ones(8))
    for stats, message in (
        (good | {"state": fake_stats(7)}, "expected 8 to 32 values for LIBERO, got 7"),
        (good | {"actions": fake_stats(33)}, "expected 7 to 32 values for LIBERO, got 33"),
        ({"state": fake_stats(8)}, "'actions': .* got None"),
        (good | {"state": bare}, "q01 and q99"),
    ):
        with pytest.raises(ValueError, match=message):
            RobotIO(config, stats, tokenizer)
    with pytest.raises(ValueError, match="expected max_token_len 200"):
        RobotIO(config, good, Tokenizer(DATA / "toy_sentencepiece.model", 48))
    with pytest.raises(ValueError, match="expected at most 10 ids"):
        RobotIO(dataclasses.replace(config, model=config.model.replace(vocab_size=10)), good, tokenizer)
    with pytest.raises(RequestError, match="empty"):
        RobotIO(config, good, tokenizer, default_prompt=" ")


@pytest.mark.parametrize("shape", [(10, 7), (1, 10, 32), (32,)])
def test_actions_of_another_shape(shape):
    io = robot_io(get_config("pi05_libero"))
    _, context = io.prepare(request_of(LIBERO))
    with pytest.raises(ValueError, match=r"expected shape \(horizon, 32\)"):
        io.finish(np.zeros(shape, np.float32), context)


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


# Named configs


def test_names_are_openpis():
    openpis = set(CONFIGS) - {"mini_libero"}
    assert len(openpis) == 17 and len(openpis | set(UNSUPPORTED)) == len(openpis) + len(UNSUPPORTED) == 31
    assert all(config.name == name for name, config in CONFIGS.items())


@pytest.mark.parametrize(
    "name, is_pi05, horizon, tokens, discrete, asset, relative, prompt",
    [
        ("pi0_aloha", False, 50, 48, False, "trossen", 12, None),
        ("pi05_aloha", True, 50, 200, True, "trossen", 12, None),
        ("pi0_aloha_towel", False, 50, 48, False, "trossen", 12, "fold the towel"),
        ("pi0_aloha_sim", False, 50, 48, False, "lerobot/aloha_sim_transfer_cube_human", 0, "Transfer cube"),
        ("pi0_droid", False, 10, 48, False, "droid", 0, None),
        ("pi05_droid", True, 15, 200, True, "droid", 0, None),
        ("pi0_libero", False, 50, 48, False, "physical-intelligence/libero", 6, None),
        ("pi05_libero", True, 10, 200, False, "physical-intelligence/libero", 0, None),
        ("pi05_droid_jointpos_polaris", True, 15, 200, True, "droid", 7, None),
        ("pi0_droid_jointpos_polaris", False, 10, 100, False, "droid", 7, None),
        ("pi05_full_droid_finetune", True, 16, 200, True, "droid", 7, None),
    ],
)
def test_settings_are_openpis(name, is_pi05, horizon, tokens, discrete, asset, relative, prompt):
    config = get_config(name)
    model = config.model
    assert (model.pi05, model.action_horizon, model.max_token_len) == (is_pi05, horizon, tokens)
    assert (model.discrete_state_input, model.action_dim, config.quantiles) == (discrete, 32, is_pi05)
    assert (config.asset_id, sum(config.delta_mask or ()), config.default_prompt) == (asset, relative, prompt)
    assert len(config.delta_mask or ()) in (0, config.robot.action_dim)


def test_configs_are_values():
    assert len({hash(config) for config in CONFIGS.values()}) == len(CONFIGS)
    assert get_config("pi05_libero") == dataclasses.replace(get_config("pi05_libero"))


def test_default_checkpoints_name_configs():
    assert set(DEFAULT_CHECKPOINTS) == {"ALOHA", "ALOHA_SIM", "DROID", "LIBERO"}
    for name, uri in DEFAULT_CHECKPOINTS.values():
        assert get_config(name).default_checkpoint_uri == uri and uri.startswith("gs://openpi-assets/")


def test_an_unknown_config_suggests_close_ones():
    with pytest.raises(ValueError, match="got 'pi05_libro'; did you mean pi05_libero"):
        get_config("pi05_libro")
    with pytest.raises(ValueError, match="did you mean"):
        get_config("")


@pytest.mark.parametrize(
    "name, why",
    [("pi0_fast_libero", "autoregressively"), ("pi0_libero_low_mem_finetune", "LoRA"), ("debug", "mini")],
)
def test_an_unsupported_config_says_why(name, why):
    with pytest.raises(ValueError, match=why):
        get_config(name)
