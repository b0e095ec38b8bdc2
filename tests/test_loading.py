"""From a checkpoint on disk and a request dictionary to actions, against openpi's own policy."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from safe_pruner_jax.configs import get_config
from safe_pruner_jax.loading import EMBEDDED, load_policy
from safe_pruner_jax.model.config import GemmaConfig, SiglipConfig, mini
from safe_pruner_jax.model.params import draw_params
from safe_pruner_jax.pruners import fastv, full, safe

DATA = Path(__file__).parent / "data"
GEMMA = GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)


@pytest.fixture(scope="module")
def golden():
    arrays = np.load(DATA / "openpi_pi05_libero_e2e.npz")
    return arrays, json.loads((DATA / "openpi_pi05_libero_e2e.json").read_text())


def tiny_config(discrete: bool):
    """openpi's pi05_libero on the tiny model the reference was made with."""
    config = get_config("pi05_libero")
    model = config.model.replace(
        prefix=GEMMA,
        expert=GEMMA,
        vision=SiglipConfig(width=32, depth=2, mlp_dim=128, num_heads=2),
        vocab_size=512,
        dtype="float32",
        discrete_state_input=discrete,
    )
    return dataclasses.replace(config, model=model)


def load_tiny(discrete: bool, pruner=None, checkpoint="ckpt_tiny_pi05"):
    return load_policy(
        tiny_config(discrete),
        DATA / checkpoint,
        pruner=pruner,
        tokenizer=DATA / "toy_sentencepiece.model",
        param_dtype="bfloat16",  # as openpi's loader does, whatever the activations
    )


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
    policy = load_policy(EMBEDDED, pruner=safe(), prompt_lengths=(32,))
    assert policy.engine.config == mini()
    request = policy.transform.config.robot.example(np.random.default_rng(0))
    session = policy.session()
    first, second = session.infer(request), session.infer(request)
    assert first["pruning"]["keyframe"] and not second["pruning"]["keyframe"]
    assert second["pruning"]["kept"] == 102 and second["pruning"]["alive"] == 512
    assert second["pruning"]["kappa"] == pytest.approx(1.0, abs=0.1)
    assert first["actions"].shape == (10, 7) and np.isfinite(first["actions"]).all()


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
        (EMBEDDED, None, fastv(cut=8), "below the model's depth 8, got 8"),
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
