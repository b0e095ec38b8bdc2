"""From a checkpoint on disk and a request dictionary to actions, against openpi's own policy."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_policy import DATA, load_tiny, tiny_config

from safe_pruner_jax.model.checkpoint import save_params
from safe_pruner_jax.model.config import GemmaConfig, mini
from safe_pruner_jax.model.params import draw_params, param_shapes
from safe_pruner_jax.policy.embedded import (
    EMBEDDED,
    PARAMS,
    WEIGHTS,
    embedded_folder,
    embedded_params,
    read_embedded,
    save_embedded,
)
from safe_pruner_jax.policy.loading import load_policy
from safe_pruner_jax.pruners import fastv, full, safe
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transforms import Tokenizer, load_norm_stats, save_norm_stats
from safe_pruner_jax.tokens import budget


@pytest.fixture(scope="module")
def golden():
    arrays = np.load(DATA / "openpi_pi05_libero_e2e.npz")
    return arrays, json.loads((DATA / "openpi_pi05_libero_e2e.json").read_text())


@pytest.mark.parametrize("discrete", [False, True])
def test_request_to_actions_equals_openpi(golden, discrete):
    arrays, meta = golden
    request = {
        "observation/image": arrays["in/image"],
        "observation/wrist_image": arrays["in/wrist_image"],
        "observation/state": arrays["in/state"],
        "prompt": meta["prompt"],
    }
    checkpoint = "ckpt_tiny_pi05_purekeys" if discrete else "ckpt_tiny_pi05"
    reply = load_tiny(discrete, checkpoint=checkpoint).session().infer(request, noise=arrays["in/noise"])
    want = arrays[f"discrete_{str(discrete).lower()}/actions"]
    assert reply["actions"].dtype == want.dtype and reply["actions"].shape == want.shape
    # float32 sampler on both sides: 1e-4 of the network's range, see the parity tests
    np.testing.assert_allclose(reply["actions"], want, atol=1e-4 * np.ptp(want))


def test_embedded_policy_needs_nothing_but_the_package():
    policy = load_policy(EMBEDDED, pruner=safe(), prompt_lengths=(16,))
    config = policy.engine.config
    assert config == get_config(EMBEDDED).model and config.replace(image_size=224, temperature=1.0) == mini()
    request = policy.transform.example(np.random.default_rng(0)) | {"prompt": "pick up the cream cheese"}
    session = policy.session()
    first, second = session.infer(request), session.infer(request)
    assert first["pruning"]["keyframe"] and not second["pruning"]["keyframe"]
    assert second["pruning"]["alive"] == 2 * config.tokens_per_camera
    assert second["pruning"]["kept"] == budget(0.2, second["pruning"]["alive"])
    assert second["pruning"]["kappa"] == pytest.approx(1.0, abs=0.1)
    assert first["actions"].shape == (10, 7) and np.isfinite(first["actions"]).all()
    # deterministic unless asked otherwise, openpi's configurations as openpi
    again = policy.session().infer(request | {"seed": 5})
    np.testing.assert_array_equal(again["actions"], first["actions"])
    assert load_policy(EMBEDDED, temperature=1.0).engine.config.temperature == 1
    assert {get_config(name).model.temperature for name in ("pi05_libero", "pi05_droid", "pi0_aloha")} == {1}


def test_embedded_parameters_fit_the_package_and_survive_the_trip(tmp_path):
    file = embedded_folder() / PARAMS
    assert file.stat().st_size < 24e6
    params = embedded_params()
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, param_shapes(get_config(EMBEDDED).model))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    save_embedded(params, tmp_path)
    with np.load(tmp_path / PARAMS) as again, np.load(file) as before:
        assert all((again[name] == before[name]).all() and before[name].dtype == np.float16 for name in before.files)
    params["action_out_proj"]["bias"] = params["action_out_proj"]["bias"] + 1e6
    with pytest.raises(ValueError, match="action_out_proj/bias: expected values within ±65504, got 1"):
        save_embedded(params, tmp_path)


def test_differences_in_eight_bits_need_half_the_space(tmp_path):
    base, rng = embedded_params(), np.random.default_rng(0)
    size = lambda leaf: rng.normal(0, 0.02, (*leaf.shape[:-1], 1)) if leaf.ndim > 1 else 0.0
    params = jax.tree.map(lambda leaf: leaf + np.float32(size(leaf)) * rng.standard_normal(leaf.shape), base)
    save_embedded(params, tmp_path, differences=True)
    assert (tmp_path / PARAMS).stat().st_size < 8.5e6
    largest = lambda a, b, c: np.abs(a - b).max() / max(np.abs(a - c).max(), 1e-2)
    errors = jax.tree.map(largest, params, read_embedded(tmp_path), base)
    assert max(jax.tree.leaves(errors)) < 1 / 120


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != EMBEDDED])
def test_every_policy_of_the_package_loads_by_its_name(name):
    policy = load_policy(name, prompt_lengths=(32,))
    shapes = jax.tree.map(np.shape, embedded_params(name))
    assert shapes == jax.tree.map(np.shape, param_shapes(get_config(name).model))
    request = {"observation/state": np.zeros(8), "prompt": "pick up the black bowl next to the plate"}
    request |= {key: np.full((224, 224, 3), 80, np.uint8) for key in ("observation/image", "observation/wrist_image")}
    actions = policy.session().infer(request)["actions"]
    other = load_policy(EMBEDDED, prompt_lengths=(32,)).session().infer(request)["actions"]
    assert np.isfinite(actions).all() and np.abs(actions - other).max() > 0.01


@pytest.mark.nightly
def test_a_trained_checkpoint_becomes_the_embedded_policy(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("embed", Path(__file__).parents[1] / "scripts" / "embed.py")
    embed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(embed)
    config, checkpoint, out = get_config(EMBEDDED), tmp_path / "checkpoint", tmp_path / "assets"
    params = draw_params(config.model)
    save_params(checkpoint, params)
    save_norm_stats(checkpoint, config.asset_id, load_norm_stats(embedded_folder(), config.asset_id))
    shutil.copy(embedded_folder() / "tokenizer.model", checkpoint)
    assert embed.main(checkpoint, out=out) == 0 and "MB in all" in capsys.readouterr().out
    with np.load(out / EMBEDDED / PARAMS) as file:
        np.testing.assert_allclose(file["action_in_proj/kernel"], params["action_in_proj"]["kernel"], rtol=1e-3)
    own = out / EMBEDDED
    assert load_norm_stats(own, config.asset_id) and (own / "tokenizer.model").stat().st_size > 1000
    (checkpoint / "tokenizer.model").unlink()
    assert embed.main(checkpoint, out=out) == 2 and "tokenizer.model" in capsys.readouterr().err
    embed.LARGEST = 1_000_000
    shutil.copy(embedded_folder() / "tokenizer.model", checkpoint)
    assert embed.main(checkpoint, out=out) == 2 and "expected at most 1 MB of parameters" in capsys.readouterr().err


def test_a_tokenizer_beside_the_checkpoint_is_taken(tmp_path):
    config = get_config("mini_libero_state")  # not the embedded one, nothing to download
    checkpoint = tmp_path / "checkpoint"
    save_params(checkpoint, draw_params(config.model))
    save_norm_stats(checkpoint, config.asset_id, load_norm_stats(embedded_folder(), get_config(EMBEDDED).asset_id))
    shutil.copy(embedded_folder() / "tokenizer.model", checkpoint)
    policy = load_policy(config, checkpoint, prompt_lengths=(32,))
    own = Tokenizer(embedded_folder() / "tokenizer.model", config.model.max_token_len)
    assert list(policy.transform.tokenizer.encode("the soup")) == list(own.encode("the soup"))


def test_drawn_params_are_seeded():
    small = mini(prefix=GemmaConfig(16, 1, 16, 2, 1, 8), expert=GemmaConfig(16, 1, 16, 2, 1, 8), vocab_size=8)
    a, b, c = (draw_params(small, seed)["action_in_proj"]["kernel"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize(
    ("config", "checkpoint", "pruner", "text"),
    [
        ("pi05_libro", None, full(), "did you mean pi05_libero"),
        ("pi0_fast_libero", None, full(), "not supported"),
        ("pi0_libero", None, full(), "no published weights"),
        ("pi05_libero", "/no/such/folder", full(), "/no/such/folder"),
        (EMBEDDED, None, fastv(cut=18), "below the model's depth 18, got 18"),
    ],
)
def test_a_policy_that_cannot_be_loaded_says_why(config, checkpoint, pruner, text):
    with pytest.raises((ValueError, OSError), match=text):
        load_policy(config, checkpoint, pruner=pruner)


def test_wrong_config_names_the_leaf():
    with pytest.raises(ValueError, match=r"vocab|input_embedding"):
        load_policy(
            dataclasses.replace(tiny_config(False), model=tiny_config(False).model.replace(vocab_size=600)),
            DATA / "ckpt_tiny_pi05",
            tokenizer=DATA / "toy_sentencepiece.model",
        )


def test_missing_norm_stats_name_the_file(tmp_path):
    (tmp_path / "params").symlink_to(DATA / "ckpt_tiny_pi05" / "params")
    with pytest.raises(FileNotFoundError, match="norm"):
        load_policy(tiny_config(False), tmp_path, tokenizer=DATA / "toy_sentencepiece.model")
