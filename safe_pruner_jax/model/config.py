"""Sizes of the model, as frozen hashable values; what a program is compiled for.

`pi05()` and `pi0()` are openpi's released sizes, `mini()` is the embedded model of the same architecture.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""Prefix order of the cameras; fixed by openpi whatever the order in a request."""

KERNELS = ("attention", "gated_mlp", "layer", "vision")
"""Names that `Pi0Config.kernels` may hold, see `model.kernels`."""

Saving = Literal["stacked", "room", "rotation", "vision", "counting", "arguments", "graph"]

SAVINGS: tuple[Saving, ...] = ("stacked", "room", "rotation", "vision", "counting", "arguments", "graph")
"""Names that `Pi0Config.savings` may hold: what makes a GPU launch less and computes the same.

* stacked: the adaptive norms of all layers in one array with 1 + scale in it (`gemma.Stacked`);
* room: a layer's own keys and values are written behind the prefix's, with one mask for all steps (`model.room`);
* rotation: angles of the action rows once per chunk and not per denoise step;
* vision: the tower's MLP is padded to a width that products like, once, when weights are prepared, and q, k, v are
  turned in one;
* counting: the best tokens are counted and not sorted (`tokens.best`);
* arguments: what a program hands on as it was given does not leave it, since XLA would copy it (`engine.xla.Step`);
* graph: a program is one CUDA graph, the denoise loop inside (`engine.xla.GRAPH`): as many launches, started at once.
"""


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of one Gemma expert. Both experts share depth, heads, kv heads and head_dim."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the vision tower; `patch` and the image size give the token grid of a camera."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch: int = 14


@dataclass(frozen=True)
class Pi0Config:
    """A π0 (`pi05=False`) or π0.5 (`pi05=True`) model.

    Args:
      pi05: adaptive norms carry the flow time and no state enters the network, as in π0.5.
      prefix, expert, vision: sizes of the language model, the action expert and SigLIP.
      action_dim: padded action and state width of the network (openpi: 32).
      action_horizon: actions per chunk.
      max_token_len: prompt slots openpi pads to (200 for π0.5, 48 for π0).
      discrete_state_input: whether the state is written into the prompt as text.
      image_size: side of the square input image, pixels.
      dtype: activation dtype, "bfloat16" or "float32".
      cameras: their names, in prefix order.
      kernels: names of the Pallas kernels that programs use, see `kernels`; chosen by `engine.autotune.tuned`.
      savings: names of `SAVINGS` that programs use, for fewer launches on a GPU, see `engine.xla.savings`; weights have
        to be prepared with the same.
      temperature: standard deviation of the noise that a chunk is made from, where the caller brings none. At 1,
        openpi's and what training assumes, chunks are samples; at 0 they are one deterministic function of what is
        seen, near the middle of the samples.

    Raises:
      ValueError: sizes that cannot form one model.
    """

    pi05: bool
    prefix: GemmaConfig
    expert: GemmaConfig
    vision: SiglipConfig
    vocab_size: int = 257152
    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int = 200
    discrete_state_input: bool = False
    image_size: int = 224
    dtype: str = "bfloat16"
    cameras: tuple[str, ...] = field(default=CAMERAS)
    kernels: tuple[str, ...] = ()
    savings: tuple[str, ...] = ()
    temperature: float = 1.0

    def __post_init__(self):
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            a, b = getattr(self.prefix, name), getattr(self.expert, name)
            if a != b:
                raise ValueError(
                    f"both experts need the same {name}: expected expert.{name} = {a}, got {b}; change one of them"
                )
        if self.prefix.num_heads % self.prefix.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.prefix.num_heads} and "
                f"{self.prefix.num_kv_heads}"
            )
        if self.image_size % self.vision.patch:
            raise ValueError(
                f"image_size must be a multiple of the patch size {self.vision.patch}, got {self.image_size}"
            )
        if self.vision.width % self.vision.num_heads:
            raise ValueError(
                f"vision.width must be a multiple of vision.num_heads, got {self.vision.width} and "
                f"{self.vision.num_heads}"
            )
        if unknown := set(self.kernels) - set(KERNELS):
            raise ValueError(f"kernels: expected some of {', '.join(KERNELS)}, got {', '.join(sorted(unknown))}")
        if unknown := set(self.savings) - set(SAVINGS):
            raise ValueError(f"savings: expected some of {', '.join(SAVINGS)}, got {', '.join(sorted(unknown))}")
        if not 0 <= self.temperature <= 1:
            raise ValueError(f"temperature: expected 0 (deterministic) to 1 (as trained), got {self.temperature}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f'dtype must be "bfloat16" or "float32", got {self.dtype!r}')

    @property
    def depth(self) -> int:
        """Number of transformer layers L."""
        return self.prefix.depth

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.vision.patch

    @property
    def tokens_per_camera(self) -> int:
        """Visual tokens of one camera."""
        return self.grid**2

    def replace(self, **changes: Any) -> "Pi0Config":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_depth(self, depth: int) -> "Pi0Config":
        """A copy in which both experts have so many layers; ValueError unless there are as many here."""
        if not 1 <= depth <= self.depth:
            raise ValueError(f"depth: expected 1 to {self.depth} layers, got {depth}; choose fewer than the model has")
        cut = lambda expert: dataclasses.replace(expert, depth=depth)
        return self.replace(prefix=cut(self.prefix), expert=cut(self.expert))


_GEMMA_2B = GemmaConfig(2048, 18, 16384, 8, 1, 256)
_GEMMA_300M = GemmaConfig(1024, 18, 4096, 8, 1, 256)
_SO400M = SiglipConfig(1152, 27, 4304, 16)


def pi05(**changes: Any) -> Pi0Config:
    """π0.5 at its released size; keyword arguments replace fields."""
    base = Pi0Config(True, _GEMMA_2B, _GEMMA_300M, _SO400M, max_token_len=200, discrete_state_input=True)
    return base.replace(**changes)


def pi0(**changes: Any) -> Pi0Config:
    """π0 at its released size; keyword arguments replace fields."""
    return Pi0Config(False, _GEMMA_2B, _GEMMA_300M, _SO400M, max_token_len=48).replace(**changes)


def mini(**changes: Any) -> Pi0Config:
    """The embedded model: π0.5's architecture and depth, 256 tokens per camera, narrow enough for two CPU cores."""
    base = Pi0Config(
        True,
        prefix=GemmaConfig(128, 18, 256, 4, 1, 32),
        expert=GemmaConfig(128, 18, 256, 4, 1, 32),
        vision=SiglipConfig(128, 6, 512, 4),
        vocab_size=512,
        action_dim=8,
        action_horizon=10,
        max_token_len=200,
        dtype="float32",
    )
    return base.replace(**changes)
