"""openpi's stored numbers, the oracle's episodes, and a model of other sizes computed here with plain NumPy."""

import dataclasses
import functools
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from oracles.numpy_pi0 import NumpyPi0
from tiers import at_night, by_day

from safe_pruner_jax.model.params import param_shapes
from safe_pruner_jax.testing import parity

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
MODELS = ("openpi_pi05_tiny", "openpi_pi05_tiny_bf16", "openpi_pi0_tiny")
BY_DAY = {("openpi_pi05_tiny", "b2"), ("openpi_pi05_tiny_bf16", "b1"), ("openpi_pi0_tiny", "b2")}
"""The first row of b2 is b1, and bfloat16 is slow on a CPU."""
NO_EFFECT = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/bias"
"""Shifts all logits of a query row alike, so softmax removes it."""


def failures(rows):
    return [f"{r.case} {r.quantity}: max {r.max_abs:.2e} rms {r.rms:.2e} limit {r.limit:.1e}" for r in rows if not r.ok]


# The stored references


@pytest.mark.parametrize(("name", "batch"), by_day(BY_DAY.__contains__, itertools.product(MODELS, ("b1", "b2"))))
def test_every_stored_quantity_is_openpis(name, batch, monkeypatch):
    path = DATA / f"{name}.npz"
    ref = parity.load_reference(path)
    assert set(ref.meta["batch_cases"]) == {"b1", "b2"}
    one = ref.meta | {"batch_cases": {batch: ref.meta["batch_cases"][batch]}}
    monkeypatch.setattr(parity, "load_reference", lambda _: dataclasses.replace(ref, meta=one))
    rows = parity.check_model(path)
    assert not failures(rows)
    compared = {f"{r.case}/{r.quantity}" for r in rows}
    with np.load(path) as file:
        stored = [key for key in file.files if key.startswith("out") and f"/{batch}/" in key]
    assert stored
    for key in stored:
        variant, case, quantity = key.split("/", 2)
        if quantity == "actions_eager":
            continue  # openpi's own second run
        if variant == "out_f32act":  # what both bfloat16 variants are measured against
            assert {f"{v}/{case}/{quantity} vs float32" for v in ("out_pbf16", "out_pf32")} <= compared, key
        else:
            assert {key, f"{key} vs float32"} & compared, key
    if not name.endswith("bf16"):
        assert {"posemb/f64_rounded", "posemb/t"} <= compared


@pytest.mark.parametrize("queries", ["action", *at_night("text")])
def test_safe_plays_the_oracles_episode(queries):
    path = DATA / f"safe_tiny_{queries}.npz"
    rows = parity.check_episode(DATA / "openpi_pi05_tiny.npz", path)
    assert not failures(rows)
    with np.load(path) as file:
        stored = {key for key in file.files if key.startswith("step") and not key.endswith("/margin")}
        assert str(file["queries"]) == queries
        keyframes = [bool(file[f"step{i}/keyframe"]) for i in range(len(file["frames"]))]
    assert keyframes == [True, False, False, False, False, True, False]
    compared = {f"{r.case}/{r.quantity}" for r in rows}
    assert stored - compared == {"step0/kappa"}  # undefined on both sides: there is no keyframe before it


def test_a_number_that_is_not_one_is_not_ok():
    row = parity.Row("case", "quantity", np.nan, 0.0, "max", 1.0)
    assert not row.ok
    assert not dataclasses.replace(row, measure="rms", rms=np.nan).ok
    assert dataclasses.replace(row, max_abs=1.0).ok


# An independent forward pass, of other sizes


def other_meta(model, depth=3):
    """Sizes that share nothing with the stored references."""
    gemma = dict(depth=depth, num_heads=4, num_kv_heads=2, head_dim=12)
    return dict(
        model=model,
        dtype="float32",
        vocab_size=91,
        prefix_llm=dict(width=40, mlp_dim=56, **gemma),
        action_expert=dict(width=28, mlp_dim=44, **gemma),
        siglip=dict(width=30, depth=depth, mlp_dim=52, num_heads=3, patch_size=[14, 14]),
        action_dim=9,
        action_horizon=7,
        max_token_len=60,
        num_steps=5,
        camera_order=["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"],
        batch_cases={"both": "inputs[0:2]"},
    )


def random_params(shapes, rng):
    """Random leaves of a size that keeps activations around 1; nothing is left at zero or one."""
    out = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        shape = leaf.shape
        if path.endswith("bias"):
            out[path] = 0.2 * rng.standard_normal(shape)
        elif path.endswith("scale"):
            out[path] = ("img" in path) + 0.2 * rng.standard_normal(shape)
        elif path.endswith(("pos_embedding", "input_embedding")):
            out[path] = 0.3 * rng.standard_normal(shape)
        else:
            inputs = {"embedding/kernel": 588, "attn_vec_einsum/w": 48, "attn_vec_einsum_1/w": 48, "out/kernel": 30}
            fan_in = next((n for end, n in inputs.items() if path.endswith(end)), shape[-2])
            if any(f"{m}/kernel" in path for m in ("query", "key", "value")):
                fan_in = shape[1]
            out[path] = rng.standard_normal(shape) / np.sqrt(fan_in)
    return {path: value.astype(np.float32) for path, value in out.items()}


def write_reference(path, meta):
    """A reference file of given sizes, its `out` arrays from NumPy; row 0 lacks the third camera."""
    rng = np.random.default_rng(0)
    cameras, A, D, T = meta["camera_order"], meta["action_horizon"], meta["action_dim"], meta["max_token_len"]
    arrays = {f"in/image/{c}": rng.integers(0, 256, (2, 112, 112, 3), np.uint8) for c in cameras}
    arrays |= {f"in/image_mask/{c}": np.array([c != cameras[2], True]) for c in cameras}
    lengths = np.array([13, T])
    arrays["in/tokenized_prompt_mask"] = np.arange(T) < lengths[:, None]
    arrays["in/tokenized_prompt"] = rng.integers(0, meta["vocab_size"], (2, T)).astype(np.int32)
    arrays["in/state"] = rng.standard_normal((2, D)).astype(np.float32)
    for name in ("noise", "x_t_half"):
        arrays[f"in/{name}"] = rng.standard_normal((2, A, D)).astype(np.float32)
    # sizes are read through the files themselves, with parameters still missing
    path.with_suffix(".json").write_text(json.dumps(meta))
    np.savez(path, **arrays, **{"param/none": np.zeros(1)})
    params = random_params(param_shapes(parity.load_reference(path).config), rng)
    numpy_model = NumpyPi0(meta, params)
    rows = [
        numpy_model.everything(
            [arrays[f"in/image/{c}"][i] for c in cameras],
            np.array([arrays[f"in/image_mask/{c}"][i] for c in cameras]),
            arrays["in/tokenized_prompt"][i],
            arrays["in/tokenized_prompt_mask"][i],
            *(arrays[f"in/{name}"][i] for name in ("state", "noise", "x_t_half")),
        )
        for i in range(2)
    ]
    for name in rows[0]:
        shared = name in ("traj_t", "prefix_ar_mask")
        axis = 1 if name in ("kv_k", "kv_v", "traj_x") else 0
        arrays[f"out/both/{name}"] = rows[0][name] if shared else np.stack([r[name] for r in rows], axis)
    for name in ("v_t1", "v_t05", "actions"):
        arrays[f"out_posemb64/both/{name}"] = arrays[f"out/both/{name}"]
    np.savez(path, **arrays, **{f"param/{k}": v for k, v in params.items()})
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return functools.cache(lambda model: write_reference(folder / f"{model}.npz", other_meta(model)))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """A model of one layer, which compiles quickly."""
    return write_reference(tmp_path_factory.mktemp("reference") / "shallow.npz", other_meta("pi05", depth=1))


@pytest.mark.parametrize("model", ["pi05", *at_night("pi0")])
def test_numpy_agrees_on_a_model_of_other_sizes(other, model):
    config = parity.load_reference(other(model)).config
    assert (config.tokens_per_camera, config.depth, config.prefix.num_kv_heads) == (64, 3, 2)
    rows = parity.check_model(other(model))
    assert not failures(rows)
    with np.load(other(model)) as file:
        assert {f"{r.case}/{r.quantity}" for r in rows} == {k for k in file.files if k.startswith("out")}
        # the numbers are of a size at which the tolerances mean something
        assert all(0.2 < file[f"out/both/{name}"].std() < 5 for name in ("kv_k", "kv_v", "v_t1", "v_t05", "actions"))


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["pi05", "pi0"])
def test_a_change_of_any_parameter_is_noticed(other, model, monkeypatch):
    ref = parity.load_reference(other(model))
    flat = traverse_util.flatten_dict(ref.params, sep="/")
    for path in flat:
        # not by a factor: a norm would undo it
        step = 0.02 * np.random.default_rng(1).standard_normal(flat[path].shape).astype(np.float32)
        changed = traverse_util.unflatten_dict(flat | {path: flat[path] + step}, sep="/")
        monkeypatch.setattr(parity, "load_reference", lambda _, p=changed: dataclasses.replace(ref, params=p))
        assert bool(failures(parity.check_model(other(model)))) == (path != NO_EFFECT), path


# The command


def check_parity(*arguments):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "scripts" / "check_parity.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, timeout=300)


def test_the_command_accepts_a_good_model(shallow):
    done = check_parity(shallow, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert all(row["ok"] for row in report["rows"])
    assert {row["quantity"] for row in report["rows"]} >= {"kv_k", "kv_v", "v_t1", "actions", "traj_x"}
    assert set(report["rows"][0]) == {"case", "quantity", "max_abs", "rms", "measure", "limit", "ok"}


@pytest.fixture(scope="module")
def script():
    """What the command does, in this process."""
    return runpy.run_path(str(ROOT / "scripts" / "check_parity.py"))["main"]


def test_the_command_rejects_a_perturbed_parameter(shallow, script, tmp_path, capsys):
    with np.load(shallow) as file:
        arrays = {key: file[key] for key in file.files}
    name = "param/PaliGemma/llm/layers/attn/kv_einsum/w"
    arrays[name] = arrays[name].copy()
    arrays[name][0, 1, 1, 3, 4] += 0.05
    path = tmp_path / "perturbed.npz"
    np.savez(path, **arrays)
    path.with_suffix(".json").write_text(shallow.with_suffix(".json").read_text())
    assert script(path) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAIL")]
    assert any("kv_v" in line for line in lines)
    assert not any("image_tokens" in line for line in lines)


def test_the_command_says_when_it_cannot_compare(script, tmp_path, capsys):
    assert script(tmp_path / "missing.npz") == 2
    error = capsys.readouterr().err
    assert "cannot compare" in error and "missing.npz" in error


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, x=np.zeros(1))
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        parity.load_reference(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="param"):
        parity.load_reference(path)
