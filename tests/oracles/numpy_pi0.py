"""π0 and π0.5 in float64 NumPy, one example at a time, with loops where openpi has einsums."""

import numpy as np


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
