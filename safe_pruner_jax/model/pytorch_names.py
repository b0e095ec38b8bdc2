"""openpi's parameter tree ⇄ the tensors of its PyTorch port, which LeRobot's π0 and π0.5 share: names and axes.

Every tensor is one entry of one leaf, with its axes in another order and some of them folded together:

    PaliGemma/llm/layers/attn/q_einsum/w [L, N, D, H]   ⇄   …layers.{l}.self_attn.q_proj.weight [(N H), D]

Facts from openpi's `examples/convert_jax_model_to_pytorch.py` and LeRobot's `policies/pi05/modeling_pi05.py`. For sizes
other than the released ones openpi's script folds the prefix's o_proj differently (its reshape swaps the two axes,
which are equal at the released sizes); here it is the transposed matrix that `torch.nn.Linear` multiplies with.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from safe_pruner_jax.model.config import Pi0Config

LEROBOT = "model."
"""What LeRobot's policies put before every name."""

_VLM = "paligemma_with_expert.paligemma.model"
_SIGLIP = f"{_VLM}.vision_tower.vision_model"
_EXPERT = "paligemma_with_expert.gemma_expert.model"
_LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"

EMBEDDING = f"{_VLM}.language_model.embed_tokens.weight"
"""Table of words; files keep it under this name or that of the output layer tied to it."""

POSITIONS = f"{_SIGLIP}.embeddings.position_embedding.weight"
"""SigLIP's position embedding, [g², D]."""

UNUSED = r"gemma_expert\.lm_head\.weight$|paligemma\.lm_head\.weight$|position_ids$|rotary_emb\.inv_freq$"
"""Tensors of the PyTorch model that never influence actions."""

_OLDER = (  # names before transformers 4.52, and without SigLIP's inner module
    (r"paligemma\.language_model\.model\.", "paligemma.model.language_model."),
    (r"paligemma\.language_model\.lm_head\.", "paligemma.lm_head."),
    (r"paligemma\.(vision_tower|multi_modal_projector)\.", r"paligemma.model.\1."),
    (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)


class Rule(NamedTuple):
    """How the tensors of one leaf are called and folded.

    Args:
      path: of the leaf.
      name: of the tensor; "{}" is the layer, the leaf's first axis.
      ours: letters of the axes of an entry, without those of layer and `pick`.
      theirs: the same letters as the tensor has them; folded axes stand together.
      pick: position on the axis after the layer's, where one leaf holds several matrices.
    """

    path: str
    name: str
    ours: str
    theirs: str
    pick: int | None = None

    def fold(self, entry: np.ndarray) -> np.ndarray:
        """An entry of the leaf → the tensor, a view where it can be one."""
        order = [self.ours.index(axis) for axis in self.theirs.replace(" ", "")]
        return entry.transpose(order).reshape(self.folded(entry.shape))

    def unfold(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor → an entry of `shape`."""
        sizes = dict(zip(self.ours, shape, strict=True))
        axes = self.theirs.replace(" ", "")
        return tensor.reshape([sizes[axis] for axis in axes]).transpose([axes.index(axis) for axis in self.ours])

    def folded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape for an entry of `shape`."""
        sizes = dict(zip(self.ours, shape, strict=True))
        return tuple(int(np.prod([sizes[axis] for axis in group])) for group in self.theirs.split())

    def entries(self, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and index of every entry of a leaf of `shape`."""
        picked = () if self.pick is None else (self.pick,)
        if "{}" not in self.name:
            yield self.name, picked
        else:
            yield from ((self.name.format(layer), (layer, *picked)) for layer in range(shape[0]))


def rules(config: Pi0Config) -> list[Rule]:
    """Every tensor of a model, leaf by leaf."""
    all_rules = [*_siglip(), *_gemma("", f"{_VLM}.language_model"), *_gemma("_1", _EXPERT, adaptive=config.pi05)]
    all_rules.append(Rule("PaliGemma/llm/embedder/input_embedding", EMBEDDING, "vd", "v d"))
    pi05, pi0 = ("time_mlp_in", "time_mlp_out"), ("state_proj", "action_time_mlp_in", "action_time_mlp_out")
    for name in ("action_in_proj", "action_out_proj", *(pi05 if config.pi05 else pi0)):
        all_rules += _dense(name, name)
    return all_rules


def canonical(names: set[str]) -> dict[str, str]:
    """The name that `rules` gives a tensor → the name in the file; tensors that nothing needs are left out."""
    translated = {}
    for stored in sorted(names):
        name = stored.removeprefix(LEROBOT)
        for pattern, new in _OLDER:
            name = re.sub(pattern, new, name)
        translated[name] = stored
    if _LM_HEAD in translated:
        translated.setdefault(EMBEDDING, translated[_LM_HEAD])
    return {name: stored for name, stored in translated.items() if not re.search(UNUSED, name)}


def saved_name(name: str) -> str:
    """The name in a new file: the table goes under that of the tied output layer, where openpi and LeRobot look."""
    return _LM_HEAD if name == EMBEDDING else name


def unused(config: Pi0Config) -> dict[str, tuple[int, ...]]:
    """Tensors, by name and shape, that both ports refuse to load without and never read."""
    return {"paligemma_with_expert.gemma_expert.lm_head.weight": (config.vocab_size, config.expert.width)}


def _dense(path: str, name: str) -> list[Rule]:
    return [Rule(f"{path}/kernel", f"{name}.weight", "io", "o i"), Rule(f"{path}/bias", f"{name}.bias", "o", "o")]


def _scaled(path: str, name: str) -> list[Rule]:
    return [Rule(f"{path}/scale", f"{name}.weight", "d", "d"), Rule(f"{path}/bias", f"{name}.bias", "d", "d")]


def _siglip() -> list[Rule]:
    img, block = "PaliGemma/img", "PaliGemma/img/Transformer/encoderblock"
    layer, attention = f"{_SIGLIP}.encoder.layers.{{}}", f"{block}/MultiHeadDotProductAttention_0"
    table = [
        Rule(f"{img}/embedding/kernel", f"{_SIGLIP}.embeddings.patch_embedding.weight", "hwcd", "d c h w"),
        Rule(f"{img}/embedding/bias", f"{_SIGLIP}.embeddings.patch_embedding.bias", "d", "d"),
        Rule(f"{img}/pos_embedding", POSITIONS, "otd", "ot d"),
        *_scaled(f"{img}/Transformer/encoder_norm", f"{_SIGLIP}.post_layernorm"),
        *_dense(f"{img}/head", f"{_VLM}.multi_modal_projector.linear"),
        *_scaled(f"{block}/LayerNorm_0", f"{layer}.layer_norm1"),
        *_scaled(f"{block}/LayerNorm_1", f"{layer}.layer_norm2"),
        *_dense(f"{block}/MlpBlock_0/Dense_0", f"{layer}.mlp.fc1"),
        *_dense(f"{block}/MlpBlock_0/Dense_1", f"{layer}.mlp.fc2"),
        Rule(f"{attention}/out/kernel", f"{layer}.self_attn.out_proj.weight", "nhd", "d nh"),
        Rule(f"{attention}/out/bias", f"{layer}.self_attn.out_proj.bias", "d", "d"),
    ]
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        table.append(Rule(f"{attention}/{ours}/kernel", f"{layer}.self_attn.{theirs}.weight", "dnh", "nh d"))
        table.append(Rule(f"{attention}/{ours}/bias", f"{layer}.self_attn.{theirs}.bias", "nh", "nh"))
    return table


def _gemma(suffix: str, name: str, *, adaptive: bool = False) -> list[Rule]:
    ours, layer = "PaliGemma/llm/layers", f"{name}.layers.{{}}"
    table = [
        Rule(f"{ours}/attn/q_einsum{suffix}/w", f"{layer}.self_attn.q_proj.weight", "ndh", "nh d"),
        Rule(f"{ours}/attn/kv_einsum{suffix}/w", f"{layer}.self_attn.k_proj.weight", "kdh", "kh d", 0),
        Rule(f"{ours}/attn/kv_einsum{suffix}/w", f"{layer}.self_attn.v_proj.weight", "kdh", "kh d", 1),
        Rule(f"{ours}/attn/attn_vec_einsum{suffix}/w", f"{layer}.self_attn.o_proj.weight", "nhd", "d nh"),
        Rule(f"{ours}/mlp{suffix}/gating_einsum", f"{layer}.mlp.gate_proj.weight", "df", "f d", 0),
        Rule(f"{ours}/mlp{suffix}/gating_einsum", f"{layer}.mlp.up_proj.weight", "df", "f d", 1),
        Rule(f"{ours}/mlp{suffix}/linear", f"{layer}.mlp.down_proj.weight", "fd", "d f"),
    ]
    for path, norm in (
        (f"{ours}/pre_attention_norm{suffix}", f"{layer}.input_layernorm"),
        (f"{ours}/pre_ffw_norm{suffix}", f"{layer}.post_attention_layernorm"),
        (f"PaliGemma/llm/final_norm{suffix}", f"{name}.norm"),
    ):
        table += _dense(f"{path}/Dense_0", f"{norm}.dense") if adaptive else _scaled(path, norm)[:1]
    return table
