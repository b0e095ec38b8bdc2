"""openpi's stored numbers, the oracle's episodes, and a model of other sizes computed here with plain NumPy."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from safe_pruner_jax.model.params import param_shapes
from safe_pruner_jax.testing import parity

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
MODELS = ("openpi_pi05_tiny", "openpi_pi05_tiny_bf16", "openpi_pi0_tiny")
NO_EFFECT = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/bias"
"""Shifts all logits of a query row alike, so softmax removes it."""


def failures(rows):
    return [f"{r.case} {r.quantity}: max {r.max_abs:.2e} rms {r.rms:.2e} limit {r.limit:.1e}" for r in rows if not r.ok]


# The stored references


@pytest.mark.parametrize("name", MODELS)
def test_every_stored_quantity_is_openpis(name):
    path = DATA / f"{name}.npz"
    rows = parity.check_model(path)
    assert not failures(rows)
    compared = {f"{r.case}/{r.quantity}" for r in rows}
    with np.load(path) as file:
        stored = [key for key in file.files if key.startswith("out")]
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


@pytest.mark.parametrize("queries", ["action", "text"])
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


# An independent forward pass: float64 NumPy, one example at a time, loops where openpi has einsums


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def swish(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class NumpyPi0:
    """π0 or π0.5 of any size, from openpi's parameter paths."""

    def __init__(self, meta, params):
        self.meta, self.p = meta, {k: np.asarray(v, np.float64) for k, v in params.items()}
        self.pi05 = meta["model"] == "pi05"

    def dense(self, name, x, i=None):
        w, b = self.p[f"{name}/kernel"], self.p[f"{name}/bias"]
        return x @ w + b if i is None else x @ w[i] + b[i]

    def layer_norm(self, name, x, i=None):
        scale, bias = self.p[f"{name}/scale"], self.p[f"{name}/bias"]
        if i is not None:
            scale, bias = scale[i], bias[i]
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * scale + bias

    def vision(self, image):
        size, v = self.meta["siglip"]["patch_size"][0], self.meta["siglip"]
        x = image.astype(np.float64) / 255 * 2 - 1
        kernel, grid, tokens = self.p["PaliGemma/img/embedding/kernel"], image.shape[0] // size, []
        for row in range(grid):
            for column in range(grid):
                patch = x[row * size : (row + 1) * size, column * size : (column + 1) * size]
                tokens.append(np.einsum("abc,abcd->d", patch, kernel))
        x = np.array(tokens) + self.p["PaliGemma/img/embedding/bias"] + self.p["PaliGemma/img/pos_embedding"][0]
        block = "PaliGemma/img/Transformer/encoderblock"
        attn, hd = f"{block}/MultiHeadDotProductAttention_0", v["width"] // v["num_heads"]
        for i in range(v["depth"]):
            h = self.layer_norm(f"{block}/LayerNorm_0", x, i)
            out = self.p[f"{attn}/out/bias"][i].copy()
            for n in range(v["num_heads"]):
                q, k, val = (
                    h @ self.p[f"{attn}/{m}/kernel"][i][:, n] + self.p[f"{attn}/{m}/bias"][i][n]
                    for m in ("query", "key", "value")
                )
                out = out + softmax(q / np.sqrt(hd) @ k.T) @ val @ self.p[f"{attn}/out/kernel"][i][n]
            x = x + out
            h = self.layer_norm(f"{block}/LayerNorm_1", x, i)
            x = x + self.dense(f"{block}/MlpBlock_0/Dense_1", gelu(self.dense(f"{block}/MlpBlock_0/Dense_0", h, i)), i)
        return self.dense("PaliGemma/img/head", self.layer_norm("PaliGemma/img/Transformer/encoder_norm", x))

    def norm(self, name, x, cond, i=None):
        """The norm and its gate."""
        n = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        name = f"PaliGemma/llm/{name}"
        if f"{name}/scale" in self.p:
            scale = self.p[f"{name}/scale"]
            return n * (1 + (scale if i is None else scale[i])), 1.0
        scale, shift, gate = np.split(self.dense(f"{name}/Dense_0", cond, i), 3)
        return n * (1 + scale) + shift, gate

    @staticmethod
    def rotate(x, positions):
        half = x.shape[-1] // 2
        out = np.empty_like(x)
        for row, position in enumerate(positions):
            for i in range(half):
                angle = position / 10_000 ** (2 * i / x.shape[-1])
                a, b = x[row, i], x[row, i + half]
                out[row, i] = a * np.cos(angle) - b * np.sin(angle)
                out[row, i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    def block(self, i, suffix, x, positions, mask, cond=None, cache=None):
        """One layer; returns x and its own keys and values, each [S, K, H]."""
        sizes = self.meta["action_expert" if suffix else "prefix_llm"]
        weight = lambda name: self.p[f"PaliGemma/llm/layers/{name}"][i]
        h, gate = self.norm(f"layers/pre_attention_norm{suffix}", x, cond, i)
        kv = weight(f"attn/kv_einsum{suffix}/w")
        own_k = [self.rotate(h @ kv[0, g], positions) for g in range(sizes["num_kv_heads"])]
        own_v = [h @ kv[1, g] for g in range(sizes["num_kv_heads"])]
        out = 0.0
        for n in range(sizes["num_heads"]):
            g = n // (sizes["num_heads"] // sizes["num_kv_heads"])
            q = self.rotate(h @ weight(f"attn/q_einsum{suffix}/w")[n], positions) / np.sqrt(sizes["head_dim"])
            k, v = own_k[g], own_v[g]
            if cache is not None:
                k, v = np.concatenate([cache[0][:, g], k]), np.concatenate([cache[1][:, g], v])
            out = (
                out + softmax(np.where(mask, q @ k.T, -2.3819763e38)) @ v @ weight(f"attn/attn_vec_einsum{suffix}/w")[n]
            )
        x = x + gate * out
        h, gate = self.norm(f"layers/pre_ffw_norm{suffix}", x, cond, i)
        up = weight(f"mlp{suffix}/gating_einsum")
        x = x + gate * (gelu(h @ up[0]) * (h @ up[1]) @ weight(f"mlp{suffix}/linear"))
        return x, np.stack(own_k, 1), np.stack(own_v, 1)

    def prefix(self, images, image_mask, tokens, token_mask):
        z = [self.vision(image) for image in images]
        width = self.meta["prefix_llm"]["width"]
        text = self.p["PaliGemma/llm/embedder/input_embedding"][tokens] * np.sqrt(width)
        x = np.concatenate([*z, text])
        mask = np.concatenate([np.repeat(image_mask, len(z[0])), token_mask])
        positions = np.cumsum(mask) - 1
        out = {f"image_tokens/{c}": t for c, t in zip(self.meta["camera_order"], z, strict=True)}
        out |= {"prefix_tokens": x, "prefix_mask": mask, "prefix_pos": positions.astype(np.int32)}
        keys, values = [], []
        for i in range(self.meta["prefix_llm"]["depth"]):
            x, k, v = self.block(i, "", x, positions, mask[:, None] & mask[None, :])
            keys.append(k)
            values.append(v)
        last = self.norm("final_norm", x, None)[0][np.flatnonzero(mask)[-1]]
        return out | {"kv_k": np.stack(keys), "kv_v": np.stack(values), "prefix_out_last_valid": last}

    def velocity(self, prefix, state, x_t, t):
        W, mask = self.meta["action_expert"]["width"], prefix["prefix_mask"]
        period = 4e-3 * 1000 ** np.linspace(0, 1, W // 2)
        embedding = np.concatenate([np.sin(2 * np.pi * t / period), np.cos(2 * np.pi * t / period)])
        x, cond = self.dense("action_in_proj", x_t), None
        own = np.ones((len(x) + (not self.pi05),) * 2, bool)
        if self.pi05:
            cond = swish(self.dense("time_mlp_out", swish(self.dense("time_mlp_in", embedding))))
        else:
            x = np.concatenate([x, np.tile(embedding, (len(x), 1))], axis=1)
            x = self.dense("action_time_mlp_out", swish(self.dense("action_time_mlp_in", x)))
            x = np.concatenate([self.dense("state_proj", state)[None], x])
            own[0, 1:] = False
        out = {"suffix_tokens": x} | ({"adarms_cond": cond} if self.pi05 else {})
        positions = mask.sum() + np.arange(len(x))
        seen = np.concatenate([np.tile(mask, (len(x), 1)), own], axis=1)
        for i in range(self.meta["action_expert"]["depth"]):
            cache = prefix["kv_k"][i], prefix["kv_v"][i]
            x, _, _ = self.block(i, "_1", x, positions, seen, cond, cache)
        x = self.norm("final_norm_1", x, cond)[0]
        v = self.dense("action_out_proj", x[-self.meta["action_horizon"] :])
        return out | {"suffix_out": x, "v": v, "suffix_pos": positions.astype(np.int32)}

    def everything(self, images, image_mask, tokens, token_mask, state, noise, x_half):
        """One example's quantities by their names in a reference file."""
        out = self.prefix(images, image_mask, tokens, token_mask)
        out["prefix_ar_mask"] = np.zeros(len(out["prefix_mask"]), bool)
        for name, t, x_t in (("t1", 1.0, noise), ("t05", 0.5, x_half)):
            now = self.velocity(out, state, x_t, t)
            out["suffix_pos"] = now.pop("suffix_pos")
            out |= {f"{k}_{name}": v for k, v in now.items()}
        x, t, steps = noise.astype(np.float64), np.float32(1), self.meta["num_steps"]
        dt, times, trajectory = np.float32(-1 / steps), [], []
        while t >= -dt / 2:
            x = x - self.velocity(out, state, x, np.float64(t))["v"] / steps
            times.append(t)
            trajectory.append(x)
            t = np.float32(t + dt)
        return out | {"actions": x, "traj_x": np.stack(trajectory), "traj_t": np.array(times)}


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
    return {model: write_reference(folder / f"{model}.npz", other_meta(model)) for model in ("pi05", "pi0")}


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """A model of one layer, which compiles quickly."""
    return write_reference(tmp_path_factory.mktemp("reference") / "shallow.npz", other_meta("pi05", depth=1))


@pytest.mark.parametrize("model", ["pi05", "pi0"])
def test_numpy_agrees_on_a_model_of_other_sizes(other, model):
    config = parity.load_reference(other[model]).config
    assert (config.tokens_per_camera, config.depth, config.prefix.num_kv_heads) == (64, 3, 2)
    rows = parity.check_model(other[model])
    assert not failures(rows)
    with np.load(other[model]) as file:
        assert {f"{r.case}/{r.quantity}" for r in rows} == {k for k in file.files if k.startswith("out")}
        # the numbers are of a size at which the tolerances mean something
        assert all(0.2 < file[f"out/both/{name}"].std() < 5 for name in ("kv_k", "kv_v", "v_t1", "v_t05", "actions"))


@pytest.mark.parametrize("model", ["pi05", "pi0"])
def test_a_change_of_any_parameter_is_noticed(other, model, monkeypatch):
    ref = parity.load_reference(other[model])
    flat = traverse_util.flatten_dict(ref.params, sep="/")
    for path in flat:
        # not by a factor: a norm would undo it
        step = 0.02 * np.random.default_rng(1).standard_normal(flat[path].shape).astype(np.float32)
        changed = traverse_util.unflatten_dict(flat | {path: flat[path] + step}, sep="/")
        monkeypatch.setattr(parity, "load_reference", lambda _, p=changed: dataclasses.replace(ref, params=p))
        assert bool(failures(parity.check_model(other[model]))) == (path != NO_EFFECT), path


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


def test_the_command_rejects_a_perturbed_parameter(shallow, tmp_path):
    with np.load(shallow) as file:
        arrays = {key: file[key] for key in file.files}
    name = "param/PaliGemma/llm/layers/attn/kv_einsum/w"
    arrays[name] = arrays[name].copy()
    arrays[name][0, 1, 1, 3, 4] += 0.05
    path = tmp_path / "perturbed.npz"
    np.savez(path, **arrays)
    path.with_suffix(".json").write_text(shallow.with_suffix(".json").read_text())
    done = check_parity(path)
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.endswith("FAIL")]
    assert any("kv_v" in line for line in lines)
    assert not any("image_tokens" in line for line in lines)


def test_the_command_says_when_it_cannot_compare(tmp_path):
    done = check_parity(tmp_path / "missing.npz")
    assert done.returncode == 2
    assert "cannot compare" in done.stderr
    assert "missing.npz" in done.stderr


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, x=np.zeros(1))
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        parity.load_reference(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="param"):
        parity.load_reference(path)
