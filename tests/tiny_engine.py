"""openpi's small π0.5 in an engine, compiled once per process, and the scenes and robots it is tried on.

Test modules share these by calling them; the layout is two cameras and 48 prompt slots. The engine sees pictures of 56
pixels, 16 tokens per camera, with every fourth row and column of the model's positions; only what is compared with
openpi's numbers sees openpi's own pictures.
"""

import copy
import dataclasses
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.model import pi0
from safe_pruner_jax.policy.policy import pack
from safe_pruner_jax.pruners import PRUNERS
from safe_pruner_jax.robots.transforms import Example
from safe_pruner_jax.testing import parity
from safe_pruner_jax.tokens import PrefixLayout

DATA = Path(__file__).parent / "data"
SLOTS, TOKENS = 48, 16
CUT, GAMMA = 2, 0.988
compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compilations.append(event) if event.endswith("backend_compile_duration") else None
)


def close(got, want, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=atol)


def same(got, want):
    """Equal to the last bit, over whole pytrees; keys by their bits."""
    bits = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), got, want)


@cache
def reference():
    """The model and what openpi computed with it."""
    return parity.load_reference(DATA / "openpi_pi05_tiny.npz")


def prepare(ref):
    """The weights of a reference, prepared."""
    return jax.jit(lambda p: pi0.prepare(p, ref.config))(ref.params)


@cache
def prepared():
    """The weights of openpi's model."""
    return prepare(reference())


@cache
def small():
    """The same model on pictures of 56 pixels; `arrays` are openpi's and do not fit it, but for `in/noise`."""
    ref = reference()
    image = ref.params["PaliGemma"]["img"]
    table = image["pos_embedding"].reshape(1, ref.config.grid, ref.config.grid, -1)[:, 2::4, 2::4]
    image = image | {"pos_embedding": table.reshape(1, TOKENS, -1)}
    params = ref.params | {"PaliGemma": ref.params["PaliGemma"] | {"img": image}}
    return dataclasses.replace(ref, config=ref.config.replace(image_size=56), params=params)


@cache
def small_weights():
    """Its weights."""
    return prepare(small())


@cache
def safe_engine():
    """SAFE on prompt rows, so that κ does not depend on the noise: the same frame has κ = 1, another scene 0.976."""
    pruner = PRUNERS["safe"](keep=0.2, cut=CUT, threshold=GAMMA, queries="text")
    return Engine(small_weights(), small().config, pruner)


@cache
def two_scenes():
    """Two scenes [camera, 56, 56, 3], and the first with a bright square that wanders."""
    with np.load(DATA / "safe_tiny_text.npz") as file:
        a = file["frames"][0]
    b = np.stack([reference().arrays[f"in/image/{c}"][1] for c in reference().config.cameras[:2]])
    squares = []
    for i in range(4):
        square = a.copy()
        square[0, 40 * i : 40 * i + 28, 56:98] = 230
        squares.append(square)
    named = {"a": a, "b": b} | {f"a{i}": s for i, s in enumerate(squares)}
    return {name: np.ascontiguousarray(scene[:, 2::4, 2::4]) for name, scene in named.items()}


def example(config, images, *, mask=(True, True), length=37, seed=0):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, length).astype(np.int32)
    cameras = config.cameras[: len(images)]
    return Example(
        dict(zip(cameras, images, strict=True)),
        dict(zip(cameras, mask, strict=True)),
        np.zeros(config.action_dim, np.float32),
        tokens,
    )


def inputs_of(config, *examples, cameras=2, slots=SLOTS):
    layout = PrefixLayout(config.cameras[:cameras], config.tokens_per_camera, slots)
    return jax.device_put(pack(examples, layout))


@cache
def lone_robot():
    """One robot through quiet steps, a scene cut and a lost camera: every control state and info."""
    config, scenes, engine = small().config, two_scenes(), safe_engine()
    control, out = engine.init((7,), 2), []
    plan = [("a", True), ("a0", True), ("a1", True), ("b", True), ("b", True), ("b", False), ("b", False), ("b", True)]
    for frame, second in plan:
        inputs = inputs_of(config, example(config, scenes[frame], mask=(True, second)))
        actions, control, info = engine.step(control, inputs)
        out.append((np.asarray(actions), control, info))
    return out


class BadRequest(ValueError):
    pass


class FakeTransform:
    """A robot whose request already is a network input."""

    def __init__(self, config):
        self.model, self.finished = config, []

    @staticmethod
    def request(one, prompt="go", **more):
        return {"example": one, "prompt": prompt} | more

    def prepare(self, request):
        if "example" not in request:
            raise BadRequest("example: expected a network input, got none")
        return request["example"], request.get("context")

    def finish(self, actions, context):
        assert actions.shape == (self.model.action_horizon, self.model.action_dim)
        return {"actions": actions.astype(np.float64)[:, :7], "context": context}


def poisoned(engine, where):
    """The same compiled programs on weights with one NaN."""
    spoil = lambda a: a.at[(0,) * a.ndim].set(jnp.nan)
    w, out = engine.weights, copy.copy(engine)
    if where == "vision":
        out.weights = w.replace(vision=w.vision.replace(head=w.vision.head.replace(w=spoil(w.vision.head.w))))
    elif where == "before the cut":
        out.weights = w.replace(prefix=(w.prefix[0].replace(down=spoil(w.prefix[0].down)), *w.prefix[1:]))
    else:
        out.weights = w.replace(
            prefix=(*w.prefix[:-1], w.prefix[-1].replace(qkv=jnp.full_like(w.prefix[-1].qkv, jnp.nan)))
        )
    return out


def golden_examples():
    """The two observations that openpi answered."""
    ref = reference()

    def one(i):
        cameras = ref.config.cameras
        return Example(
            {c: ref.arrays[f"in/image/{c}"][i] for c in cameras},
            {c: bool(ref.arrays[f"in/image_mask/{c}"][i]) for c in cameras},
            ref.arrays["in/state"][i],
            ref.arrays["in/tokenized_prompt"][i][ref.arrays["in/tokenized_prompt_mask"][i]],
        )

    return [one(0), one(1)]
