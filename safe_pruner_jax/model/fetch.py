"""Where checkpoints come from: a local path, or a gs:// address brought into openpi's own cache."""

import contextlib
import logging
import os
import pathlib
import urllib.parse
from collections.abc import Iterator

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be fetched, read or written; the message names the part and what to do."""


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
