"""Weights in safetensors: openpi's PyTorch layout and LeRobot's, read, written, and refused with a reason."""

import hashlib
import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_checkpoint import DATA, GOLDEN, TINY, assert_equal_trees
from tiny_policy import FILES, load_tiny, request, tiny_config

from safe_pruner_jax.cli import convert
from safe_pruner_jax.cli.convert import Convert, run_convert
from safe_pruner_jax.model.checkpoint import load_params, open_params, save_params, stored_shapes
from safe_pruner_jax.model.fetch import CheckpointError
from safe_pruner_jax.model.params import draw_params
from safe_pruner_jax.model.pytorch import INDEX, MODEL, Assembled, save_pytorch
from safe_pruner_jax.model.pytorch_names import LEROBOT
from safe_pruner_jax.policy.lerobot import read_lerobot
from safe_pruner_jax.policy.loading import load_policy
from safe_pruner_jax.robots.transforms import load_norm_stats

HEAD = "paligemma_with_expert.paligemma.lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    """The tiny checkpoint in openpi's PyTorch layout."""
    return save_pytorch(tmp_path / "torch", open_params(GOLDEN["pure"], TINY), TINY).parent


def error(*args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(*args, **kwargs)
    return str(caught.value)


def rewritten(folder, change):
    """The folder with another set of tensors."""
    tensors = change(safetensors.numpy.load_file(folder / MODEL))
    (folder / MODEL).unlink()
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / MODEL)
    return folder


@pytest.mark.parametrize("prefix", ["", LEROBOT])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_there_and_back(tmp_path, prefix, dtype):
    kind = None if dtype is None else jnp.dtype(dtype)
    save_pytorch(tmp_path, open_params(GOLDEN["value"], TINY), TINY, dtype=kind, prefix=prefix)
    want = load_params(GOLDEN["pure"], TINY, dtype=dtype)
    for path in (tmp_path, tmp_path / MODEL):
        assert_equal_trees(load_params(path, TINY), want)
    found = open_params(tmp_path, TINY)["action_in_proj"]["kernel"]
    assert isinstance(found, Assembled) and found.nbytes == 32 * 64 * (4 if dtype is None else 2)


def test_pi0_too(tmp_path):
    pi0 = TINY.replace(pi05=False)
    params = draw_params(pi0)
    save_pytorch(tmp_path, params, pi0)
    assert_equal_trees(load_params(tmp_path, pi0), params)
    message = error(tmp_path, TINY)
    assert "it has pi05=True, the file holds a model with pi05=False" in message


def test_several_files(folder, tiny_params):
    def split(tensors):
        names = sorted(tensors)
        files = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
        for file, own in files.items():
            safetensors.numpy.save_file({name: tensors[name] for name in own}, folder / file)
        index = {"weight_map": {name: file for file, own in files.items() for name in own}}
        (folder / INDEX).write_text(json.dumps(index))

    split(safetensors.numpy.load_file(folder / MODEL))
    (folder / MODEL).unlink()
    assert_equal_trees(load_params(folder, TINY), tiny_params)
    assert_equal_trees(load_params(folder / INDEX, TINY), tiny_params)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in error(folder, TINY)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    assert "got no such tensor" in error(folder, TINY)


def test_names_of_other_versions(folder, tiny_params):
    def older(tensors):
        table = tensors.pop(HEAD)
        old = {
            name.replace("paligemma.model.language_model.", "paligemma.language_model.model.").replace(
                "paligemma.model.vision_tower.vision_model.", "paligemma.vision_tower."
            ): value
            for name, value in tensors.items()
        }
        return old | {"paligemma_with_expert.paligemma.language_model.model.embed_tokens.weight": table}

    assert_equal_trees(load_params(rewritten(folder, older), TINY), tiny_params)


def test_the_file_is_that_of_openpis_conversion(folder):
    """Names, shapes and bytes of what openpi's own script made of the tiny checkpoint in float32."""
    told = json.loads((DATA / "openpi_pytorch_tiny.json").read_text())["tensors"]
    made = safetensors.numpy.load_file(folder / MODEL)
    assert made.keys() == told.keys()
    for name, (shape, digest) in told.items():
        assert list(made[name].shape) == shape, name
        if digest is not None:  # one tensor that nothing reads is random in theirs
            assert hashlib.sha256(made[name].tobytes()).hexdigest()[:16] == digest, name


def test_missing_extra_and_misshapen_tensors_are_named(folder):
    message = error(rewritten(folder, lambda t: {k: v for k, v in t.items() if k != "time_mlp_in.bias"}), TINY)
    assert "time_mlp_in.bias: expected (64,), got no such tensor" in message
    message = error(rewritten(folder, lambda t: t | {"time_mlp_in.bias": np.zeros(65, np.float32)}), TINY)
    assert "time_mlp_in.bias: expected (64,), got (65,)" in message
    message = error(rewritten(folder, lambda t: t | {"time_mlp_in.bias": np.zeros(64, np.int32)}), TINY)
    assert "time_mlp_in.bias: expected floating values, got I32" in message
    rewritten(folder, lambda t: t | {"time_mlp_in.bias": np.zeros(64, np.float32), "lora_A": np.zeros(1, np.float32)})
    assert "lora_A: expected no such tensor, got one" in error(folder, TINY)
    load_params(folder, TINY, allow_extra=True)
    rewritten(folder, lambda t: t | {"time_mlp_in.bias": np.full(64, np.nan, np.float32)})
    assert "leaf time_mlp_in/bias" in error(folder, TINY, allow_extra=True)


def test_a_damaged_file_says_so(folder):
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[: len(data) // 2])
    assert "truncated or corrupt" in error(folder, TINY)
    (folder / MODEL).unlink()
    (folder / INDEX).write_text("{}")
    assert f"{INDEX} is corrupt" in error(folder, TINY)
    (folder / INDEX).unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert "got an adapter" in error(folder, TINY)


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    assert 'pip install "safe-pruner-jax[safetensors]"' in error(folder, TINY)


def test_tables_tell_vocabulary_and_image_size(folder):
    tables = stored_shapes(folder)
    assert tables["PaliGemma/llm/embedder/input_embedding"] == (512, 64)
    assert tables["PaliGemma/img/pos_embedding"] == (1, 256, 32)


# a policy


@pytest.fixture
def named(monkeypatch):
    """The tiny model under a name that `openpi convert` can look up."""
    config = tiny_config(True)
    monkeypatch.setattr(convert, "get_config", lambda _: config)
    return config


def test_convert_goes_both_ways_and_the_actions_stay(tmp_path, named):
    steps = [("openpi-pytorch", tmp_path / "a"), ("lerobot", tmp_path / "b"), ("orbax", tmp_path / "c")]
    source = FILES["checkpoint"]
    for to, out in steps:
        run_convert(Convert(checkpoint=str(source), config="tiny", out=out, to=to))
        source = out
    assert_equal_trees(load_params(source, named.model), load_params(FILES["checkpoint"], named.model))
    noise = np.random.default_rng(0).standard_normal((10, 32)).astype(np.float32)
    want = load_tiny(True).session().infer(request(0), noise=noise)["actions"]
    shutil.rmtree(tmp_path / "b" / "assets")  # LeRobot's own statistics
    for _, out in steps:
        tokenizer = FILES["tokenizer"]
        policy = load_policy(named, out, tokenizer=tokenizer, param_dtype="bfloat16")
        got = policy.session().infer(request(0), noise=noise)["actions"]
        np.testing.assert_allclose(got, want, atol=1e-4 * np.ptp(want))
    with pytest.raises(ValueError, match="empty or new"):
        run_convert(Convert(checkpoint=str(source), config="tiny", out=tmp_path / "a"))


def test_lerobots_configuration_is_followed(tmp_path, named):
    run_convert(Convert(checkpoint=str(FILES["checkpoint"]), config="tiny", out=tmp_path / "l", to="lerobot"))
    file = tmp_path / "l" / "config.json"
    about = json.loads(file.read_text())
    relative = {
        "chunk_size": 7,
        "use_relative_actions": True,
        "relative_exclude_joints": ["gripper"],
        "action_feature_names": ["a", "b", "Gripper"],
    }
    file.write_text(json.dumps(about | relative))
    config, stats = read_lerobot(tmp_path / "l", tiny_config(False))
    assert config.model.action_horizon == 7 and config.model.discrete_state_input and config.quantiles
    assert config.delta_mask == (True, True, False)
    own = load_norm_stats(FILES["checkpoint"], named.asset_id)
    np.testing.assert_allclose(stats["actions"].q99, own["actions"].q99, rtol=1e-6)

    def refuses(text, **changes):
        file.write_text(json.dumps(about | changes))
        with pytest.raises(CheckpointError, match=text):
            read_lerobot(tmp_path / "l", tiny_config(False))

    refuses("expected type pi05 .* got pi0", type="pi0")
    features = about["input_features"]
    refuses("in the order", input_features=dict(reversed(features.items())))
    wrist = {"observation.images.wrist": {}, "observation.images.front": {}}
    refuses("got observation.images.wrist", input_features=wrist)
    (tmp_path / "l" / "policy_preprocessor.json").unlink()
    refuses("STATE IDENTITY and ACTION QUANTILES", normalization_mapping={"STATE": "IDENTITY", "ACTION": "QUANTILES"})
    file.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_lerobot(tmp_path / "l", tiny_config(False))


def test_lerobot_has_no_pi05_without_the_state_in_the_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "get_config", lambda _: tiny_config(False))
    with pytest.raises(CheckpointError, match="convert to openpi's layout"):
        run_convert(Convert(checkpoint=str(FILES["checkpoint"]), config="tiny", out=tmp_path, to="lerobot"))


def test_both_layouts_in_one_folder_read_the_jax_one(folder, tiny_params):
    doubled = {k: 2 * v for k, v in safetensors.numpy.load_file(folder / MODEL).items()}
    rewritten(folder, lambda _: doubled)
    save_params(folder, tiny_params)
    assert_equal_trees(load_params(folder, TINY), tiny_params)
