"""π0 and π0.5 in safetensors: openpi's PyTorch checkpoints and LeRobot's, ⇄ the parameter tree.

    open_pytorch(folder, config)            a checked tree whose leaves are still on disk
    save_pytorch(folder, params, config)    model.safetensors, one leaf of `params` in memory beside it

A folder holds `model.safetensors`, or several files and `model.safetensors.index.json`, which says what is where.
A leaf is put together from the tensors of its layers (`pytorch_names`) when it is read. Needs the package safetensors.
"""

import functools
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from safe_pruner_jax.model import pytorch_names
from safe_pruner_jax.model.checks import check_tree, require_finite
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.fetch import CheckpointError
from safe_pruner_jax.model.params import Params, param_shapes, read
from safe_pruner_jax.model.pytorch_names import Rule

MODEL = "model.safetensors"
"""The file that openpi and LeRobot write."""

INDEX = f"{MODEL}.index.json"
"""Which tensor is in which file, where there are several."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def pytorch_folder(path: str | os.PathLike) -> pathlib.Path | None:
    """The folder of a PyTorch checkpoint, named by itself or its file; None for another, or one with `params/` too."""
    path = pathlib.Path(path).expanduser().absolute()
    folder = path.parent if path.name in (MODEL, INDEX) else path
    if (folder / "params").is_dir():
        return None
    if (folder / "adapter_model.safetensors").is_file() and not (folder / MODEL).is_file():
        raise CheckpointError(
            f"expected whole weights at {folder}, got an adapter (adapter_model.safetensors); "
            "merge it into its base model first: peft's merge_and_unload()"
        )
    return folder if (folder / MODEL).is_file() or (folder / INDEX).is_file() else None


class Header(NamedTuple):
    """Shape and dtype of a tensor, by safetensors' own name of the dtype unless it is a floating one."""

    shape: tuple[int, ...]
    dtype: str


class Shelf:
    """The files of a checkpoint and what is in them; values are read when they are asked for.

    Raises:
      CheckpointError: a file that is missing, truncated or corrupt; the package safetensors is missing.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        files = {MODEL} if (folder / MODEL).is_file() else set(_index(folder / INDEX).values())
        self._files = {name: _open(folder / name) for name in sorted(files)}
        self._home = {tensor: file for file, opened in self._files.items() for tensor in opened.keys()}  # noqa: SIM118
        if not (folder / MODEL).is_file():
            for tensor, file in _index(folder / INDEX).items():
                if self._home.get(tensor) != file:
                    raise CheckpointError(f"{tensor}: expected in {folder / file} ({INDEX}), got no such tensor")

    @functools.cached_property
    def headers(self) -> dict[str, Header]:
        """Name in the file → header."""
        slices = {tensor: self._files[file].get_slice(tensor) for tensor, file in self._home.items()}
        kind = lambda s: _DTYPES.get(s.get_dtype(), s.get_dtype())
        return {tensor: Header(tuple(s.get_shape()), kind(s)) for tensor, s in slices.items()}

    def read(self, tensor: str) -> np.ndarray:
        """The values of a tensor."""
        return self._files[self._home[tensor]].get_tensor(tensor)


@dataclass(frozen=True)
class Assembled:
    """A leaf whose tensors are on disk.

    Args:
      shelf: the files.
      name, shape: of the leaf.
      dtype: that it is read in; None: the widest of its tensors.
      parts: name in the file and index in the leaf of every tensor, and its rule.
    """

    shelf: Shelf
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    parts: list[tuple[str, tuple[int, ...], Rule]] = field(default_factory=list)

    @property
    def stored_dtype(self) -> np.dtype:
        """The widest dtype of its tensors."""
        return jnp.result_type(*(jnp.dtype(self.shelf.headers[part].dtype) for part, _, _ in self.parts))

    @property
    def nbytes(self) -> int:
        """As stored."""
        return int(np.prod(self.shape)) * self.stored_dtype.itemsize

    def read(self) -> np.ndarray:
        """The values; CheckpointError if they are not finite. Beside them one tensor is in memory at a time."""
        value = np.empty(self.shape, self.stored_dtype if self.dtype is None else self.dtype)
        for tensor, index, rule in self.parts:
            value[index] = rule.unfold(self.shelf.read(tensor), value[index].shape)
        return require_finite(value, self.name, self.shelf.folder)


def open_pytorch(
    folder: pathlib.Path, config: Pi0Config, *, dtype: np.dtype | None = None, allow_extra: bool = False
) -> Params:
    """Finds the tensors of a checkpoint, checks names, shapes and dtypes, and reads no values.

    Args:
      folder: with `MODEL` or `INDEX`.
      config: sizes the tree must have.
      dtype: that leaves are read in; None keeps what is stored.
      allow_extra: drop tensors that the model does not have.

    Returns:
      Nested dict of `Assembled` with openpi's path components.

    Raises:
      CheckpointError: a missing, extra or misshapen tensor, a file that cannot be read, safetensors not installed.
    """
    shelf = Shelf(folder)
    stored = pytorch_names.canonical(set(shelf.headers))
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(param_shapes(config), sep="/").items()}
    leaves = {k: Assembled(shelf, k, shape, dtype) for k, shape in shapes.items()}
    expected: dict[str, tuple[int, ...]] = {}
    for rule in pytorch_names.rules(config):
        for name, index in rule.entries(shapes[rule.path]):
            shape = shapes[rule.path][len(index) :]
            expected[stored.get(name, name)] = rule.folded(shape)
            leaves[rule.path].parts.append((stored.get(name, name), index, rule))
    headers = {name: header for name, header in shelf.headers.items() if name in expected}
    extra = [] if allow_extra else set(stored.values()) - expected.keys()
    check_tree(folder, headers, extra, expected, config, kind="tensor")
    return traverse_util.unflatten_dict(leaves, sep="/")


def table_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves whose sizes depend on vocabulary and image size, as far as they are there."""
    shelf = Shelf(folder)
    stored = pytorch_names.canonical(set(shelf.headers))
    tables = {
        "PaliGemma/llm/embedder/input_embedding": (pytorch_names.EMBEDDING, ()),
        "PaliGemma/img/pos_embedding": (pytorch_names.POSITIONS, (1,)),
    }
    return {leaf: lead + shelf.headers[stored[name]].shape for leaf, (name, lead) in tables.items() if name in stored}


def save_pytorch(
    folder: str | os.PathLike,
    params: Params,
    config: Pi0Config,
    *,
    dtype: np.dtype | None = None,
    prefix: str = "",
) -> pathlib.Path:
    """Writes `<folder>/model.safetensors` as openpi's conversion does, or with `prefix=LEROBOT` as LeRobot does.

    The file appears under its name when it is complete. In memory: its tensors, and one leaf of `params`.

    Args:
      folder: made if absent.
      params: the tree; leaves may still be on disk.
      config: its sizes.
      dtype: floating dtype of the file; None keeps each leaf's.
      prefix: before every name.

    Raises:
      CheckpointError: safetensors is not installed, a file of that name is there, or a leaf has non-finite values.
    """
    library = _library()
    folder = pathlib.Path(folder).expanduser().absolute()
    if (folder / MODEL).exists():
        raise CheckpointError(f"expected no {folder / MODEL}, got one; give another folder")
    tensors: dict[str, np.ndarray] = {}
    leaves, by_leaf = traverse_util.flatten_dict(params, sep="/"), _by_leaf(config)
    for path, rules in by_leaf.items():
        leaf = require_finite(np.asarray(read(leaves[path])), path, folder)
        kind = leaf.dtype if dtype is None else dtype
        for rule in rules:
            for name, index in rule.entries(leaf.shape):
                folded = rule.fold(leaf[index])
                # a copy: without one, a leaf would stay in memory for the sake of a view of it
                tensors[prefix + pytorch_names.saved_name(name)] = np.array(folded, dtype=kind, order="C")
    for name, shape in pytorch_names.unused(config).items():
        tensors[prefix + name] = np.zeros(shape, tensors[f"{prefix}action_in_proj.weight"].dtype)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{MODEL}.partial"
    library.numpy.save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / MODEL)
    return folder / MODEL


def read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything in a small file, statistics for example."""
    opened = _open(file)
    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def write_arrays(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes what `read_arrays` reads."""
    _library().numpy.save_file(dict(arrays), file, metadata={"format": "pt"})


def _by_leaf(config: Pi0Config) -> dict[str, list[Rule]]:
    grouped: dict[str, list[Rule]] = {}
    for rule in pytorch_names.rules(config):
        grouped.setdefault(rule.path, []).append(rule)
    return grouped


def _library() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise CheckpointError(
            'a PyTorch checkpoint needs safetensors: pip install "safe-pruner-jax[safetensors]"'
        ) from error
    return safetensors


def _open(file: pathlib.Path) -> Any:
    library = _library()
    if not file.is_file():
        raise CheckpointError(f"expected {file}, which another file names, got no such file; download it again")
    try:
        return library.safe_open(file, framework="np")
    except library.SafetensorError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}; it is truncated or corrupt: download it again"
        ) from error


def _index(file: pathlib.Path) -> Mapping[str, str]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is corrupt ({error!r}); download it again") from error
