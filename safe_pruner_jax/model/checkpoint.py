"""openpi's checkpoints on disk ⇄ the parameter tree.

    fetch(uri) -> folder          gs://… into openpi's own cache; a local path passes through
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
import logging
import os
import pathlib
import re
import shutil
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import traverse_util
from jax.typing import DTypeLike

from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.params import Params, param_shapes

_SHOWN = 6  # mismatches listed in one error
_BLOCK = 1 << 20  # values looked at together by the finiteness check; keeps its temporaries in cache

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be fetched, read or written; the message names the part and what to do."""


# fetch


def fetch(uri: str | os.PathLike, *, cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """The local path of a file or folder, downloaded first if it is a `gs://` one.

    Downloads go where openpi looks for them, `<cache>/<bucket>/<path>`, so either finds what the other
    fetched. They land in `<path>.part`, renamed when complete; one that stopped, or was killed, goes on with
    the files still missing. Processes take turns through the lock file openpi uses.

    Args:
      uri: a local path, or `gs://bucket/path`.
      cache_dir: root of the cache; default `$OPENPI_DATA_HOME`, else `~/.cache/openpi`.

    Returns:
      An absolute path that exists.

    Raises:
      CheckpointError: nothing there, another scheme, gcsfs not installed, or the download stopped; what
        gcsfs raises beyond OSError (credentials, repeated server errors) passes as it is.

    Deviations: openpi discards copies cached before 2025-02-03 and opens permissions to everyone; this does
    neither.
    """
    parts = urllib.parse.urlparse(os.fspath(uri))
    if not parts.scheme:
        local = pathlib.Path(uri).expanduser().absolute()
        if not local.exists():
            raise CheckpointError(f"expected an existing path or gs://bucket/path, got {local}")
        return local
    path = parts.path.strip("/")
    if parts.scheme != "gs" or not parts.netloc or not path:
        raise CheckpointError(f"expected a local path or gs://bucket/path, got {uri}; give its local path")

    cache = pathlib.Path(cache_dir or os.environ.get("OPENPI_DATA_HOME") or "~/.cache/openpi")
    local = cache.expanduser().absolute() / parts.netloc / path
    if local.exists():
        return local
    local.parent.mkdir(parents=True, exist_ok=True)
    with _lock(local.with_suffix(".lock")):
        if not local.exists():  # another process may have finished while this one waited
            partial = local.with_name(f"{local.name}.part")
            _download(f"{parts.netloc}/{path}", partial)
            os.rename(partial, local)
    return local


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    import fcntl  # Unix only; a module-level import would take `load_params` with it elsewhere

    with open(path, "w") as file:  # closing it, or dying, releases the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process holds %s and is downloading; waiting for it", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(root: str, target: pathlib.Path) -> None:
    """Copies `gs://<root>`, a file or all under a folder, to `target`; keeps what is complete there."""
    try:
        import fsspec

        remote = fsspec.filesystem("gs")
    except ImportError as e:
        by_hand = f"gsutil -m cp -r gs://{root} {target.parent}"
        raise CheckpointError(
            f'gs:// needs gcsfs: pip install "safe-pruner-jax[gcs]", or download it with: {by_hand}'
        ) from e
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    at = f"gs://{root}"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        # a name ending in "/" is the empty object some tools leave for a folder
        sizes = {k: v["size"] for k, v in remote.find(root, detail=True).items() if not k.endswith("/")}
        if not sizes:
            raise CheckpointError(f"expected files at {at}, got none; check the spelling and your access")
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar, done = progress.add_task(at, total=sum(sizes.values())), 0
            for name, size in sizes.items():
                at = f"gs://{name.lstrip('/')}"
                file = target / name.lstrip("/")[len(root) :].strip("/")
                incoming = file.with_name(f"{file.name}.incoming")  # gcsfs allocates the full size at the start
                if not file.is_file():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    hook = {"bar": lambda _, n, done=done, **__: progress.update(bar, completed=done + n)}
                    remote.get_file(name, str(incoming), callback=fsspec.Callback(hooks=hook))
                    if (got := incoming.stat().st_size) != size:
                        raise OSError(f"expected {size} bytes, got {got}")
                    os.rename(incoming, file)
                progress.update(bar, completed=(done := done + size))
    except OSError as e:
        raise CheckpointError(f"download stopped at {at}: {e}; run it again to go on from {target}") from e


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
        if bad := _count_nonfinite(value):
            raise CheckpointError(
                f"leaf {self.name} of {self.directory}: expected finite values, got {bad} of {value.size} NaN or "
                f"infinite as {value.dtype}; training diverged or the file is damaged: take an earlier step or "
                "download it"
            )
        return value


def open_params(
    path: str | os.PathLike, config: Pi0Config, *, dtype: DTypeLike | None = None, allow_extra: bool = False
) -> Params:
    """Finds an openpi checkpoint's leaves and checks names, shapes and dtypes; reads no values.

    Args:
      path: a checkpoint folder (with `params/` in it) or the `params/` folder itself.
      config: sizes the tree must have.
      dtype: floating dtype that leaves are read in, e.g. "bfloat16"; None keeps what is stored.
      allow_extra: drop leaves the model does not have, silently, as openpi does. Mind LoRA leaves: without
        them the policy is another one.

    Returns:
      Nested dict of `Stored` with openpi's path components, whichever key layout the file has.

    Raises:
      CheckpointError: not a complete JAX checkpoint; a missing, extra, misshapen or unreadable leaf.
      ValueError: `dtype` is not a floating dtype.
    """
    dtype = None if dtype is None else jnp.dtype(dtype)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f'dtype must be a floating dtype such as "bfloat16" or None, got {dtype}')
    directory = _params_directory(path)
    stored = _stored_names(directory)
    expected = {k: v.shape for k, v in traverse_util.flatten_dict(param_shapes(config), sep="/").items()}
    leaves = {k: _open(directory, k, name) for k, name in stored.items() if k in expected}
    extra = [] if allow_extra else sorted(stored.keys() - expected.keys())
    _check_tree(directory, leaves, extra, expected, config)
    found = {k: Stored(directory, k, store, dtype) for k, store in leaves.items()}
    return traverse_util.unflatten_dict(found, sep="/")


def stored_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of a checkpoint, of whatever model, by its path in the parameter tree."""
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
    found = traverse_util.flatten_dict(open_params(path, config, dtype=dtype, allow_extra=allow_extra), sep="/")
    # A leaf being read is there twice, stored and cast: the largest goes first, while little else is there.
    order = sorted(found, key=lambda k: found[k].nbytes, reverse=True)
    return traverse_util.unflatten_dict({k: found[k].read() for k in order}, sep="/")


def _params_directory(path: str | os.PathLike) -> pathlib.Path:
    """The folder that holds the Orbax item, or an error that says what `path` is instead."""
    path = pathlib.Path(path).expanduser().absolute()
    if not path.exists():
        raise CheckpointError(f"expected a checkpoint folder, got {path}, which is absent; fetch() a gs:// one first")
    directory = path / "params" if (path / "params").is_dir() else path
    if path.suffix == ".safetensors" or (directory / "model.safetensors").exists():
        raise CheckpointError(
            f"expected openpi's JAX checkpoint (params/), got its PyTorch one (model.safetensors) at {path}; "
            "use the JAX one it was converted from, e.g. gs://openpi-assets/checkpoints/pi05_libero"
        )
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
            f'expected {file} to list {{"params": tree}}, got top-level names {tops[:_SHOWN]}; '
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


def _check_tree(
    directory: pathlib.Path,
    leaves: dict[str, ts.TensorStore],
    extra: list[str],
    expected: dict[str, tuple[int, ...]],
    config: Pi0Config,
) -> None:
    wrong = []
    for k, shape in expected.items():
        if k not in leaves:
            wrong.append(f"{k}: expected {shape}, got no such leaf")
        elif leaves[k].shape != shape:
            wrong.append(f"{k}: expected {shape}, got {leaves[k].shape}")
        elif not jnp.issubdtype(leaves[k].dtype.numpy_dtype, jnp.floating):
            wrong.append(f"{k}: expected floating values, got {leaves[k].dtype.name}")
    lines = wrong + [f"{k}: expected no such leaf, got one" for k in extra]
    if not lines:
        return
    is_pi05 = "time_mlp_in/kernel" in extra or "time_mlp_in/kernel" in leaves
    if wrong and extra and is_pi05 != config.pi05:
        do = f"The configuration seems wrong: it has pi05={config.pi05}, the file holds a model with pi05={is_pi05}."
    elif len(wrong) > 1:
        do = "The configuration seems wrong for this checkpoint: compare its sizes with those above."
    elif wrong:
        do = "The checkpoint is incomplete or of another model: save or download it again."
    else:
        do = "Merge LoRA leaves into the weights first; drop others with allow_extra=True."
    shown = lines[:_SHOWN] + ([f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
    raise CheckpointError("\n  ".join([f"{directory} does not fit the configuration:", *shown]) + f"\n{do}")


def _count_nonfinite(leaf: np.ndarray) -> int:
    """How many values are NaN or infinite, without a temporary of its size."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return 0
    bits = leaf.reshape(-1).view(f"u{leaf.dtype.itemsize}")
    exponent = np.array(np.inf, leaf.dtype).view(bits.dtype)  # infinity is the bare exponent, NaN has it too
    blocks = (bits[i : i + _BLOCK] for i in range(0, bits.size, _BLOCK))
    return sum(int(np.count_nonzero((b & exponent) == exponent)) for b in blocks)


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
    import orbax.checkpoint as ocp  # half a second, and only saving needs it

    path = pathlib.Path(path).expanduser().absolute()
    final, scratch = path / "params", path / ".saving"
    if final.exists() and not overwrite:
        raise CheckpointError(f"expected no {final}, got one; give another folder or overwrite=True")
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params).items()}
    for k, v in flat.items():
        if bad := _count_nonfinite(v):
            raise CheckpointError(
                f"leaf {'/'.join(k)}: expected finite values, got {bad} of {v.size} NaN or infinite; "
                "nothing was written: save an earlier step"
            )
    if value_keys:
        flat = {(*k, "value"): v for k, v in flat.items()}

    shutil.rmtree(scratch, ignore_errors=True)  # what a killed save left
    scratch.mkdir(parents=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(scratch / "params", {"params": traverse_util.unflatten_dict(flat)})
    if final.exists():
        os.rename(final, scratch / "replaced")
    os.rename(scratch / "params", final)
    shutil.rmtree(scratch)
    return final
