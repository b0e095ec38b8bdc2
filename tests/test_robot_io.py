"""Robots of named configs, from a request to the model and back: openpi's numbers and settings."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from toy_robots import DATA, fake_stats, request_of, robot_io

from safe_pruner_jax.model.config import CAMERAS
from safe_pruner_jax.policy.embedded import WEIGHTS
from safe_pruner_jax.robots.configs import CONFIGS, DEFAULT_CHECKPOINTS, UNSUPPORTED, get_config
from safe_pruner_jax.robots.robots import ALOHA, DROID, LIBERO, Aloha, RequestError
from safe_pruner_jax.robots.transform import RobotIO
from safe_pruner_jax.robots.transforms import NormStats, Tokenizer

NORM_STATS = DATA / "ckpt_tiny_pi05" / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"


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


# Named configs


def test_names_are_openpis():
    openpis = set(CONFIGS) - {*WEIGHTS, "mini_libero_state"}
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
