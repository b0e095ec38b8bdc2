"""Where a training run starts: random parameters, or a checkpoint whose images or vocabulary may be others."""

import logging
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from safe_pruner_jax.model.checkpoint import load_params, stored_shapes
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.fetch import fetch
from safe_pruner_jax.model.params import Params, draw_params, param_shapes
from safe_pruner_jax.policy.embedded import EMBEDDED, embedded_folder, embedded_name, embedded_params
from safe_pruner_jax.robots.transforms import NUMBERS, Tokenizer

logger = logging.getLogger(__name__)

EMBEDDING, POSITIONS = "PaliGemma/llm/embedder/input_embedding", "PaliGemma/img/pos_embedding"
"""Leaves whose sizes depend on the tokenizer and on the image size."""


def drawn(model: Pi0Config, tokenizer: Tokenizer, seed: int = 0) -> Params:
    """Random parameters, the words for numbers as `smooth_numbers` has them."""
    params = draw_params(model, seed)
    words = params["PaliGemma"]["llm"]["embedder"]
    words["input_embedding"] = smooth_numbers(words["input_embedding"], tokenizer)
    return params


def start_from(address: str, model: Pi0Config, tokenizer: Path, anew: Params) -> Params:
    """A checkpoint's parameters for a model whose image size and tokenizer may be others.

    SigLIP's position embedding [1, g², D] is interpolated (bicubic). The embedding of another vocabulary is that of
    `anew`, since its rows stand for other pieces.

    Args:
      address: folder or gs:// address, "embedded", or the name of a policy of this package.
      model: what is trained.
      tokenizer: what it is trained with.
      anew: random parameters of `model`.

    Raises:
      CheckpointError, ValueError: not a checkpoint of these sizes otherwise.
    """
    packaged = embedded_name(address)
    folder = embedded_folder(packaged) if packaged else fetch(address)
    params = flatten_dict(embedded_params(packaged), sep="/") if packaged else {}
    shapes = {path: leaf.shape for path, leaf in params.items()} if packaged else stored_shapes(folder)
    rows = shapes.get(EMBEDDING, (model.vocab_size,))[0]
    side = round(shapes.get(POSITIONS, (1, model.tokens_per_camera))[1] ** 0.5)
    theirs = model.replace(vocab_size=rows, image_size=side * model.vision.patch)
    if not packaged:
        params = flatten_dict(load_params(folder, theirs, dtype="float32"), sep="/")
    elif shapes != {path: leaf.shape for path, leaf in flatten_dict(param_shapes(theirs), sep="/").items()}:
        raise ValueError(
            f"init: the embedded policy has other sizes than this model; train {EMBEDDED}, or give a folder"
        )
    if rows != model.vocab_size or other_file(folder / "tokenizer.model", tokenizer):
        logger.info("%s has another vocabulary: the embedding of words starts anew", address)
        params[EMBEDDING] = flatten_dict(anew, sep="/")[EMBEDDING]
    if side != model.grid:
        table = params[POSITIONS].reshape(1, side, side, -1)
        shape = (1, model.grid, model.grid, table.shape[-1])
        params[POSITIONS] = np.asarray(jax.image.resize(table, shape, "bicubic")).reshape(1, -1, shape[-1])
    return unflatten_dict(params, sep="/")


def smooth_numbers(table: np.ndarray, tokenizer: Tokenizer, seed: int = 0) -> np.ndarray:
    """A random embedding [V, D] in which neighbouring numbers of the state start as neighbours.

    Pieces for whole numbers, where the tokenizer has them, get random Fourier features of the number: drawn one by one,
    each of the 257 rows would have to be learned from the samples in which that very number occurs.
    """
    table = np.array(table)
    rows = [(n, row) for n, piece in enumerate(NUMBERS) if (row := tokenizer.row(piece)) is not None]
    rng = np.random.default_rng(seed)
    turns = np.exp(rng.uniform(np.log(0.25), np.log(16), table.shape[1]))
    phase = rng.uniform(0, 2 * np.pi, table.shape[1])
    size = table.std() * 2**0.5
    for n, row in rows:
        table[row] = size * np.cos(2 * np.pi * turns * n / len(NUMBERS) + phase)
    return table


def other_file(path: Path, other: Path) -> bool:
    """Whether there is a file at `path` with other bytes."""
    return path.is_file() and path.read_bytes() != other.read_bytes()
