"""Checkpoints on disk ⇄ the parameter tree: openpi's own here, in safetensors through `pytorch`.

    open_params(folder, config)   a checked tree whose leaves are still on disk, for `pi0.prepare`
    load_params(folder, config)   the same, read: one copy of it in memory
    save_params(folder, params)   the same layout, for openpi to read

A checkpoint is a folder whose `params/` holds one Orbax PyTree item {"params": tree}: an OCDBT key-value
store with one zarr array per leaf, named by the path joined with dots. Trees written by openpi's trainer
end every path in `value`; others may not. Both load.

Writing goes through Orbax. Reading goes through TensorStore, the layer under it: leaf by leaf the memory is
bounded and every error has a name, and it is the same in openpi's pinned Orbax and in the current one.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tensorstore as ts
from flax import traverse_util
from jax.typing import DTypeLike

from safe_pruner_jax.model.checks import SHOWN, check_dtype, check_tree, count_nonfinite, require_finite
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.fetch import CheckpointError
from safe_pruner_jax.model.params import Params, param_shapes
from safe_pruner_jax.model.pytorch import open_pytorch, pytorch_folder, table_shapes

# load


@dataclass(frozen=True)
class Stored:
    """A leaf on disk.

    Args:
      directory, name: where and which, for errors.
      store: its array.
      dtype: that it is cast to while it is read; None: as it is stored.
    """

    directory: pathlib.Path
    name: str
    store: ts.TensorStore
    dtype: np.dtype | None

    @property
    def nbytes(self) -> int:
        """As stored."""
        return self.store.size * self.store.dtype.numpy_dtype.itemsize

    def read(self) -> np.ndarray:
        """The values; CheckpointError if they cannot be read or are not finite."""
        with _reading(self.directory, self.name):
            store = self.store if self.dtype is None else ts.cast(self.store, self.dtype)
            value = store.read(order="C").result()
        return require_finite(value, self.name, self.directory)


def open_params(
    path: str | os.PathLike, config: Pi0Config, *, dtype: DTypeLike | None = None, allow_extra: bool = False
) -> Params:
    """Finds an openpi checkpoint's leaves and checks names, shapes and dtypes; reads no values.

    Args:
      path: a checkpoint folder (with `params/` in it) or the `params/` folder itself; without one, a folder with
        model.safetensors, openpi's or LeRobot's.
      config: sizes the tree must have.
      dtype: floating dtype that leaves are read in, e.g. "bfloat16"; None keeps what is stored.
      allow_extra: drop leaves the model does not have, silently, as openpi does. Mind LoRA leaves: without
        them the policy is another one.

    Returns:
      Nested dict of `Stored`, or of `pytorch.Assembled`, with openpi's path components, whichever layout the file has.

    Raises:
      CheckpointError: not a complete checkpoint; a missing, extra, misshapen or unreadable leaf.
      ValueError: `dtype` is not a floating dtype.
    """
    dtype = check_dtype(dtype)
    if (folder := pytorch_folder(path)) is not None:
        return open_pytorch(folder, config, dtype=dtype, allow_extra=allow_extra)
    directory = _params_directory(path)
    stored = _stored_names(directory)
    expected = {k: v.shape for k, v in traverse_util.flatten_dict(param_shapes(config), sep="/").items()}
    leaves = {k: _open(directory, k, name) for k, name in stored.items() if k in expected}
    extra = [] if allow_extra else sorted(stored.keys() - expected.keys())
    kinds = {k: (store.shape, store.dtype.name) for k, store in leaves.items()}
    check_tree(directory, kinds, extra, expected, config)
    unread = {k: Stored(directory, k, store, dtype) for k, store in leaves.items()}
    return traverse_util.unflatten_dict(unread, sep="/")


def stored_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of a checkpoint, of whatever model, by its path in the parameter tree.

    Of a PyTorch one only those of leaves that depend on vocabulary and image size: others fold axes together.
    """
    if (folder := pytorch_folder(path)) is not None:
        return table_shapes(folder)
    directory = _params_directory(path)
    return {leaf: _open(directory, leaf, name).shape for leaf, name in _stored_names(directory).items()}


def load_params(
    path: str | os.PathLike, config: Pi0Config, *, dtype: DTypeLike | None = None, allow_extra: bool = False
) -> Params:
    """Reads an openpi checkpoint into the tree of `param_shapes(config)`, NumPy arrays; arguments as `open_params`.

    Leaves are read one at a time, largest first, and cast on the way in: the peak on the host is about one
    copy of the result plus one leaf as stored.

    Raises:
      CheckpointError: as `open_params`, and for a leaf that is not finite.
      ValueError: `dtype` is not a floating dtype.
    """
    flat = traverse_util.flatten_dict(open_params(path, config, dtype=dtype, allow_extra=allow_extra), sep="/")
    # A leaf being read is there twice, stored and cast: the largest goes first, while little else is there.
    order = sorted(flat, key=lambda k: flat[k].nbytes, reverse=True)
    return traverse_util.unflatten_dict({k: flat[k].read() for k in order}, sep="/")


def _params_directory(path: str | os.PathLike) -> pathlib.Path:
    """The folder that holds the Orbax item, or an error that says what `path` is instead."""
    path = pathlib.Path(path).expanduser().absolute()
    if not path.exists():
        raise CheckpointError(f"expected a checkpoint folder, got {path}, which is absent; fetch() a gs:// one first")
    directory = path / "params" if (path / "params").is_dir() else path
    absent = [name for name in ("_METADATA", "manifest.ocdbt") if not (directory / name).is_file()]
    if absent:
        raise CheckpointError(
            f"expected a complete checkpoint at {directory}, got no {' and no '.join(absent)}; "
            "give the folder that holds params/, or save or download it again if that was interrupted"
        )
    return directory


def _stored_names(directory: pathlib.Path) -> dict[str, str]:
    """`{path in the parameter tree: name in the store}`; the `value` that may end all paths is dropped."""
    file = directory / "_METADATA"
    try:
        leaves = json.loads(file.read_text())["tree_metadata"].values()
        keys = [[str(part["key"]) for part in leaf["key_metadata"]] for leaf in leaves]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{file} is corrupt ({e!r}); download or save the checkpoint again") from e
    tops = sorted({k[0] for k in keys})
    if tops != ["params"]:
        raise CheckpointError(
            f'expected {file} to list {{"params": tree}}, got top-level names {tops[:SHOWN]}; '
            "give the folder that holds params/, not train_state/"
        )
    end = -1 if all(k[-1] == "value" for k in keys) else None
    return {"/".join(k[1:end]): ".".join(k) for k in keys}


@contextlib.contextmanager
def _reading(directory: pathlib.Path, leaf: str) -> Iterator[None]:
    """Turns TensorStore's errors, all of them ValueError, into one line that names the leaf."""
    try:
        yield
    except ValueError as e:
        reason = re.split(r" \[(?:tensorstore_spec|source locations)=", str(e))[0]
        raise CheckpointError(
            f"leaf {leaf} of {directory} cannot be read: {reason}; a file is missing, truncated or corrupt: "
            "download or save the checkpoint again"
        ) from e


def _open(directory: pathlib.Path, leaf: str, name: str) -> ts.TensorStore:
    base = {"driver": "file", "path": f"{directory}/"}
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
        "fill_missing_data_reads": False,  # an absent chunk would read as zeros
    }
    with _reading(directory, leaf):
        return ts.open(spec, open=True, read=True).result()


# save


def save_params(
    path: str | os.PathLike, params: Params, *, value_keys: bool = False, overwrite: bool = False
) -> pathlib.Path:
    """Writes `<path>/params/` as openpi does; its `restore_params` reads the result.

    The item is written beside its place and renamed into it: a save that dies leaves the folder as it was,
    or without `params/`, never with half of one.

    Args:
      path: the checkpoint folder; made if absent. Whatever else is in it (assets/) stays.
      params: nested dict of floating arrays, numpy or JAX, with openpi's path components as keys.
      value_keys: end every path in `value`, as openpi's trainer does.
      overwrite: replace a `params/` that is there.

    Returns:
      The `params/` folder, absolute.

    Raises:
      CheckpointError: `params/` exists and `overwrite` is False, or a leaf has a non-finite value.
    """
    import jax
    import orbax.checkpoint as ocp  # half a second, and only saving needs it

    path = pathlib.Path(path).expanduser().absolute()
    final, scratch = path / "params", path / ".saving"
    if final.exists() and not overwrite:
        raise CheckpointError(f"expected no {final}, got one; give another folder or overwrite=True")
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params).items()}
    for k, v in flat.items():
        if bad := count_nonfinite(v):
            raise CheckpointError(
                f"leaf {'/'.join(k)}: expected finite values, got {bad} of {v.size} NaN or infinite; "
                "nothing was written: save an earlier step"
            )
    if value_keys:
        flat = {(*k, "value"): v for k, v in flat.items()}

    shutil.rmtree(scratch, ignore_errors=True)  # what a killed save left
    scratch.mkdir(parents=True)
    alone = {}
    if jax.process_count() > 1:  # of several hosts that train as one, the one that calls this
        me = jax.process_index()
        alone["multiprocessing_options"] = ocp.options.MultiprocessingOptions(me, {me}, f"host_{me}")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**alone), **alone) as checkpointer:
        checkpointer.save(scratch / "params", ocp.args.PyTreeSave({"params": traverse_util.unflatten_dict(flat)}))
    if final.exists():
        os.rename(final, scratch / "replaced")
    os.rename(scratch / "params", final)
    shutil.rmtree(scratch)
    return final
