"""From raw numbers to one robot's network input, on the host: the steps every robot shares.

    image   uint8 [h, w, 3]  ── resize_with_pad ──────────────────> uint8 [S, S, 3]   ┐
    state   float [n]        ── normalise ── zero padding ────────> float32 [AD]      ├ Example
    prompt  str (and state)  ── Tokenizer.encode (discretise) ────> int32 [len]       ┘
    actions float [AH, AD]   ── unnormalise ──> float64 [AH, AD] in the robot's units

The arithmetic, its order and its dtypes are openpi's (`transforms.py`, `models/tokenizer.py`,
`openpi_client/image_tools.py`), so a checkpoint sees the numbers it was trained on. numpy only; no device.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image

EPSILON = 1e-6
"""openpi's guard against a zero scale; part of the formula, not a tolerance."""

_STATE_EDGES = np.linspace(-1, 1, 257)[:-1]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Example:
    """One robot's network input, on the host, nothing padded except the state.

    Args:
      images: camera name -> uint8 [S, S, 3], S the model's image size; owned, never a view of the request.
      image_mask: camera name -> whether the camera is real. A missing camera is black.
      state: float32 [action_dim], normalised and zero-padded.
      tokens: int32 [len], the valid prompt ids only, at most max_token_len.
    """

    images: dict[str, np.ndarray]
    image_mask: dict[str, bool]
    state: np.ndarray
    tokens: np.ndarray


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fit an image into height x width keeping its aspect, centred on black; unchanged if it already fits.

    Bilinear with PIL's antialiasing, sizes truncated to whole pixels: openpi's path for uint8 images.

    Args:
      image: uint8 [h, w, 3].
      height, width: of the result, pixels.

    Returns:
      uint8 [height, width, 3].
    """
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    ratio = max(w / width, h / height)
    new_h, new_w = int(h / ratio), int(w / ratio)
    small = Image.fromarray(np.ascontiguousarray(image)).resize((new_w, new_h), resample=Image.Resampling.BILINEAR)
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = int((height - new_h) / 2), int((width - new_w) / 2)
    canvas[top : top + new_h, left : left + new_w] = np.asarray(small)
    return canvas


@dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of one vector over the training data, each float64 [d]; quantiles may be absent.

    Raises:
      ValueError: other than vectors of one length, or values that are not finite.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None

    def __post_init__(self):
        for name in ("mean", "std", "q01", "q99"):
            value = getattr(self, name)
            if value is None and name.startswith("q"):
                continue
            array = np.asarray(value, np.float64)
            if array.ndim != 1 or array.shape != np.shape(self.mean) or not np.isfinite(array).all():
                raise ValueError(
                    f"norm stats {name}: expected {np.size(self.mean)} finite numbers like mean, got "
                    f"shape {array.shape}; recompute norm_stats.json with openpi's compute_norm_stats.py"
                )
            object.__setattr__(self, name, array)

    @property
    def dim(self) -> int:
        """Number of values d."""
        return len(self.mean)

    @property
    def has_quantiles(self) -> bool:
        """Whether both quantiles are known."""
        return self.q01 is not None and self.q99 is not None


def _stats_path(checkpoint_dir: str | os.PathLike, asset_id: str) -> Path:
    return Path(checkpoint_dir) / "assets" / asset_id / "norm_stats.json"


def load_norm_stats(checkpoint_dir: str | os.PathLike, asset_id: str) -> dict[str, NormStats]:
    """Read `<checkpoint_dir>/assets/<asset_id>/norm_stats.json`: "state" and "actions".

    Raises:
      FileNotFoundError: no such file; the message lists the asset ids the checkpoint does have.
      ValueError: not a norm-stats file.
    """
    path = _stats_path(checkpoint_dir, asset_id)
    if not path.is_file():
        root = Path(checkpoint_dir) / "assets"
        ids = sorted(str(p.parent.relative_to(root)) for p in root.rglob("norm_stats.json"))
        raise FileNotFoundError(
            f"no norm stats at {path}; this checkpoint has the asset ids {ids or 'none'}: "
            "choose the config it was trained with, or copy the assets folder beside params"
        )
    try:
        entries = json.loads(path.read_text())["norm_stats"]
        return {key: NormStats(s["mean"], s["std"], s.get("q01"), s.get("q99")) for key, s in entries.items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: expected openpi's norm stats (mean, std, q01, q99 under norm_stats/<key>), got "
            f"{type(error).__name__}: {error}; copy the file from the checkpoint again"
        ) from error


def save_norm_stats(checkpoint_dir: str | os.PathLike, asset_id: str, stats: dict[str, NormStats]) -> Path:
    """Write what `load_norm_stats` and openpi read; returns the file's path."""
    fields = ("mean", "std", "q01", "q99")
    entries = {
        key: {f: None if getattr(s, f) is None else getattr(s, f).tolist() for f in fields} for key, s in stats.items()
    }
    path = _stats_path(checkpoint_dir, asset_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"norm_stats": entries}, indent=2))
    return path


def _quantiles(stats: NormStats) -> tuple[np.ndarray, np.ndarray]:
    if stats.q01 is None or stats.q99 is None:
        raise ValueError(
            "quantile normalisation (pi0.5) needs q01 and q99, got stats without; use the checkpoint's own"
        )
    return stats.q01, stats.q99


def normalise(x: np.ndarray, stats: NormStats, *, quantiles: bool) -> np.ndarray:
    """Scale by z-score, (x - mean) / (std + ε), or quantiles, 2 (x - q01) / (q99 - q01 + ε) - 1.

    Nothing is clipped. Statistics longer than the data are cut to it.

    Args:
      x: float [..., n], n <= stats.dim, in the robot's units.
      stats: of this vector.
      quantiles: True for π0.5, False for π0.

    Returns:
      float64 [..., n], about [-1, 1] with quantiles.

    Raises:
      ValueError: quantiles asked for and absent.
    """
    n = x.shape[-1]
    if quantiles:
        q01, q99 = (q[:n] for q in _quantiles(stats))
        return (x - q01) / (q99 - q01 + EPSILON) * 2.0 - 1.0
    return (x - stats.mean[:n]) / (stats.std[:n] + EPSILON)


def unnormalise(x: np.ndarray, stats: NormStats, *, quantiles: bool) -> np.ndarray:
    """Invert `normalise` on the first stats.dim values.

    Values beyond pass through: exactly with quantiles, scaled by 1 + ε with z-scores (std is padded by 1).

    Args:
      x: float [..., n], n >= stats.dim.
      stats, quantiles: as for `normalise`.

    Returns:
      float64 [..., n] in the robot's units.

    Raises:
      ValueError: quantiles asked for and absent.
    """
    d = stats.dim
    if quantiles:
        q01, q99 = _quantiles(stats)
        inside = (x[..., :d] + 1.0) / 2.0 * (q99 - q01 + EPSILON) + q01
        return np.concatenate([inside, x[..., d:]], axis=-1)
    pad = (0, x.shape[-1] - d)
    return x * (np.pad(stats.std, pad, constant_values=1.0) + EPSILON) + np.pad(stats.mean, pad)


NUMBERS = tuple(f"▁{n}" for n in range(-1, 256))
"""The numbers that `discretise` makes, as SentencePiece writes them behind a space."""


def discretise(state: np.ndarray) -> np.ndarray:
    """Bin of each normalised value: how many of the edges -1 + 2k/256, k = 0..255, are <= x, minus 1.

    Args:
      state: float [n], normalised.

    Returns:
      int [n] in -1..255; -1 below the first edge, 255 from 0.9921875 up.
    """
    return np.searchsorted(_STATE_EDGES, state, side="right") - 1


class Tokenizer:
    """PaliGemma's SentencePiece model with openpi's two prompt layouts.

    Args:
      model_path: the `.model` file; openpi's is gs://big_vision/paligemma_tokenizer.model.
      max_token_len: prompt slots of the model; longer prompts lose their end, with a warning.

    Raises:
      FileNotFoundError: no such file.
    """

    def __init__(self, model_path: str | os.PathLike, max_token_len: int):
        if not Path(model_path).is_file():
            raise FileNotFoundError(
                f"no tokenizer model at {model_path}; get paligemma_tokenizer.model from gs://big_vision "
                "(also https://storage.googleapis.com/big_vision/paligemma_tokenizer.model)"
            )
        self.max_token_len = max_token_len
        self._model = sentencepiece.SentencePieceProcessor(model_proto=Path(model_path).read_bytes())

    @property
    def vocab_size(self) -> int:
        """Number of ids; the model's embedding table must have at least as many rows."""
        return self._model.vocab_size()

    def row(self, piece: str) -> int | None:
        """Id of a piece as SentencePiece writes it ("▁" for a space); None if there is none."""
        row = self._model.piece_to_id(piece)
        return None if row == self._model.unk_id() else row

    def encode(self, prompt: str, state: np.ndarray | None = None) -> np.ndarray:
        r"""Ids of a prompt: BOS and text then "\n" (no state), or "Task: …, State: …;\nAction: ".

        Args:
          prompt: the instruction; outer whitespace is dropped, "_" and newlines become spaces.
          state: float [n], normalised and not padded, to be written as text; None to leave it out.

        Returns:
          int32 [len], len <= max_token_len.
        """
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            ids = self._model.encode(text, add_bos=True) + self._model.encode("\n")
        else:
            bins = " ".join(str(b) for b in discretise(state))
            ids = self._model.encode(f"Task: {text}, State: {bins};\nAction: ", add_bos=True)
        if len(ids) > self.max_token_len:
            logger.warning(
                "prompt has %d tokens, the model takes %d: the last %d are cut; shorten the prompt",
                len(ids),
                self.max_token_len,
                len(ids) - self.max_token_len,
            )
        return np.asarray(ids[: self.max_token_len], np.int32)
