"""The small policies inside this package: their parameters, and what they can do.

embedded_params("mini_libero")            LIBERO-Object's, the default: float16
embedded_params("mini_libero_spatial")    LIBERO-Spatial's, which was trained from it: 8-bit differences

Two whole policies would be larger than the package may be.
"""

from importlib import resources
from pathlib import Path

import numpy as np
from flax import traverse_util

from safe_pruner_jax.model.params import Params

EMBEDDED = "mini_libero"
"""Name of the configuration whose assets are taken where nothing else is asked for."""

WEIGHTS = {
    EMBEDDED: "trained on shuffled scenes of LIBERO-Object, all ten tasks, 112² pixels; docs/training.md",
    "mini_libero_spatial": "trained on shuffled scenes of LIBERO-Spatial, all ten tasks, 112² pixels; docs/training.md",
}
"""What each can do, by the name of its configuration; shown wherever it is used."""

EMBEDDED_WEIGHTS = WEIGHTS[EMBEDDED]

PARAMS = "params.npz"
"""File of the parameters, in `embedded_folder()`."""

_SCALE = "#scale"  # end of the name of an array of scales beside the differences that it belongs to
_LEVELS = 127


def embedded_name(address: str | None) -> str | None:
    """The policy of this package that an address means: "embedded" or a name of `WEIGHTS`; None: another one, or none.

    >>> embedded_name("embedded"), embedded_name("mini_libero_spatial"), embedded_name("runs/mine")
    ('mini_libero', 'mini_libero_spatial', None)
    """
    return EMBEDDED if address == "embedded" else address if address in WEIGHTS else None


def embedded_folder(name: str = EMBEDDED) -> Path:
    """Assets of an embedded policy inside the package: parameters, tokenizer and norm statistics."""
    return Path(str(resources.files("safe_pruner_jax") / "assets" / name))


def embedded_params(name: str = EMBEDDED) -> Params:
    """Parameters of an embedded policy, widened to float32."""
    return read_embedded(embedded_folder(name))


def read_embedded(folder: Path) -> Params:
    """What `save_embedded` wrote into a folder, as float32."""
    with np.load(folder / PARAMS) as file:
        stored = {path: file[path].astype(np.float32) for path in file.files}
    scales = {path.removesuffix(_SCALE): stored.pop(path) for path in list(stored) if path.endswith(_SCALE)}
    base = traverse_util.flatten_dict(embedded_params(), sep="/") if scales else {}
    whole = {path: base[path] + scales[path] * leaf if path in scales else leaf for path, leaf in stored.items()}
    return traverse_util.unflatten_dict(whole, sep="/")


def save_embedded(params: Params, folder: Path, *, differences: bool = False) -> None:
    """Writes parameters as `read_embedded` reads them.

    Args:
      params: of the embedded policy's sizes.
      folder: to write to.
      differences: of matrices only how they differ from the default policy's is stored, in 8 bits with a scale for
        every output (and layer): half of the size.

    Raises:
      ValueError: a value that float16 cannot hold.
    """
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    if differences:
        base = traverse_util.flatten_dict(embedded_params(), sep="/")
        for path in [path for path, leaf in flat.items() if leaf.ndim > 1]:
            leaf = flat.pop(path)
            within = tuple(range(leaf.ndim > 2, leaf.ndim - 1))
            apart = leaf - np.asarray(base[path])
            scale = np.maximum(np.abs(apart).max(within, keepdims=True) / _LEVELS, np.finfo(np.float16).tiny)
            flat[path] = np.rint(apart / scale.astype(np.float16)).clip(-_LEVELS, _LEVELS).astype(np.int8)
            flat[path + _SCALE] = scale
    with np.errstate(over="ignore"):  # told below
        stored = {path: leaf if leaf.dtype == np.int8 else leaf.astype(np.float16) for path, leaf in flat.items()}
    if lost := [path for path, leaf in stored.items() if not np.isfinite(leaf).all()]:
        largest = np.abs(flat[lost[0]]).max()
        raise ValueError(f"{lost[0]}: expected values within ±65504, got {largest:g}; the training has diverged")
    np.savez_compressed(folder / PARAMS, **stored)
