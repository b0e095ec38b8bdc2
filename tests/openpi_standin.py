"""openpi's `Policy` as this package sees it, on the tiny checkpoint: the attributes, transforms and NNX parameters that
openpi's source has, without openpi."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent))
from tiny_policy import tiny_config

from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.checkpoint import load_params
from safe_pruner_jax.robots.transform import RobotIO
from safe_pruner_jax.robots.transforms import Tokenizer, load_norm_stats

DATA = Path(__file__).parent / "data"


class Node(nnx.Module):
    """A part of the model: parameters and further parts."""


def module(tree: dict) -> Node:
    """Nested dict of arrays → NNX modules with the same paths."""
    node = Node()
    for name, value in tree.items():
        setattr(node, name, module(value) if isinstance(value, dict) else nnx.Param(value))
    return node


class Embedding:
    """Stands for the linen module inside openpi's language model; static for NNX."""

    embed_dtype = "float32"


class LiberoInputs:
    """By the name of openpi's transform; it does what all of openpi's do together."""

    def __init__(self, io: RobotIO):
        self._io = io

    def __call__(self, request: dict) -> dict:
        example, context = self._io.prepare(request)
        tokens, mask = np.zeros(200, np.int32), np.zeros(200, bool)
        tokens[: len(example.tokens)], mask[: len(example.tokens)] = example.tokens, True
        return {
            "image": example.images,
            "image_mask": {name: np.bool_(alive) for name, alive in example.image_mask.items()},
            "state": context.state,
            "tokenized_prompt": tokens,
            "tokenized_prompt_mask": mask,
        }


class Composite:
    """Several transforms, one after the other."""

    def __init__(self, transforms: list):
        self.transforms = transforms

    def __call__(self, data: dict) -> dict:
        for transform in self.transforms:
            data = transform(data)
        return data


@partial(jax.jit, static_argnums=(0, 1))
def step(config, num_steps: int, params, observed: tuple, state, noise):
    """Actions of openpi's prefix and sampler."""
    weights = pi0.prepare(params, config, num_steps=num_steps)
    rows = pi0.embed_prefix(weights, config, *observed)
    _, segments, _ = pi0.prefix_layers(weights, config, rows, range(config.depth))
    return pi0.sample(weights, config, pi0.Prefix(segments, rows.count), state, noise)[0]


class Policy:
    """openpi's interface. `infer` runs openpi's prefix and sampler with every slot, dead or not, and no engine."""

    def __init__(self, sample_kwargs: dict | None = None, rng=None, metadata: dict | None = None):
        config = tiny_config(False)
        params = jax.tree.map(jnp.asarray, load_params(DATA / "ckpt_tiny_pi05", config.model, dtype="bfloat16"))
        self._model = module(params)
        self._model.action_dim, self._model.action_horizon, self._model.max_token_len = 32, 10, 200
        self._model.PaliGemma.llm.module = Embedding()
        self._io = RobotIO(
            config,
            load_norm_stats(DATA / "ckpt_tiny_pi05", config.asset_id),
            Tokenizer(DATA / "toy_sentencepiece.model", 200),
        )
        self._input_transform = Composite([LiberoInputs(self._io)])
        self._sample_kwargs, self._metadata = sample_kwargs or {}, metadata or {}
        self._rng = rng if rng is not None else jax.random.key(0)
        self._is_pytorch_model = False
        self._params, self._config = params, config.model

    def _output_transform(self, outputs: dict) -> dict:
        return self._io.finish(outputs["actions"], SimpleNamespace(state=outputs["state"]))

    def infer(self, obs: dict, *, noise: np.ndarray | None = None) -> dict:
        """openpi's control step."""
        inputs, c = self._input_transform(obs), self._config
        self._rng, key = jax.random.split(self._rng)
        if noise is None:
            noise = jax.random.normal(key, (1, c.action_horizon, c.action_dim))
        noise = jnp.asarray(noise).reshape(1, c.action_horizon, c.action_dim)
        images = np.stack([inputs["image"][name] for name in c.cameras])[None]
        cameras = np.array([[bool(inputs["image_mask"][name]) for name in c.cameras]])
        prompt = (inputs[key][None] for key in ("tokenized_prompt", "tokenized_prompt_mask"))
        num_steps, state = self._sample_kwargs.get("num_steps", 10), np.asarray(inputs["state"])[None]
        actions = step(c, num_steps, self._params, (images, cameras, *prompt), state, noise)
        return self._output_transform({"state": inputs["state"], "actions": np.asarray(actions[0])}) | {
            "policy_timing": {"infer_ms": 0.0}
        }

    @property
    def metadata(self) -> dict:
        """openpi's metadata."""
        return self._metadata
