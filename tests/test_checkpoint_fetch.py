"""openpi's checkpoints fetched from a bucket: once, completely, to where openpi looks, or refused with a reason."""

import pathlib
import sys
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny_checkpoint import GOLDEN, TINY, assert_equal_trees

from safe_pruner_jax.model.checkpoint import load_params
from safe_pruner_jax.model.fetch import CheckpointError, fetch

pytestmark = pytest.mark.newest


class Bucket(MemoryFileSystem):
    """A bucket in memory that counts downloads and can lose the connection in the middle of the n-th file.

    What it leaves then is what gcsfs does when killed: a file of full size without its content.
    """

    cachable = False
    store: dict = {}  # noqa: RUF012  MemoryFileSystem keeps its files on the class
    pseudo_dirs: list = [""]  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.store, self.pseudo_dirs, self.downloaded, self.fails_at = {}, [""], [], None

    def get_file(self, rpath, lpath, **kwargs):
        self.downloaded.append(rpath)
        if len(self.downloaded) == self.fails_at:
            pathlib.Path(lpath).write_bytes(b"\0" * self.size(rpath))
            raise ConnectionResetError("connection lost")
        super().get_file(rpath, lpath, **kwargs)


URI = "gs://bucket/checkpoints/pi05"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
    remote = Bucket()
    for file in sorted(p for p in GOLDEN["pure"].rglob("*") if p.is_file()):
        remote.pipe_file(f"bucket/checkpoints/pi05/{file.relative_to(GOLDEN['pure'])}", file.read_bytes())
    monkeypatch.setattr(fsspec, "filesystem", {"gs": remote}.__getitem__)
    return remote


def test_fetch_passes_a_local_path_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("here").mkdir()
    assert fetch("here") == fetch(tmp_path / "here") == tmp_path / "here"
    with pytest.raises(CheckpointError, match=r"expected an existing path or gs://bucket/path, got .*absent"):
        fetch("absent")


def test_fetch_downloads_once_to_where_openpi_looks(bucket, tmp_path, tiny_params):
    local = fetch(URI)
    assert local == tmp_path / "cache/bucket/checkpoints/pi05"
    assert_equal_trees(load_params(local, TINY), tiny_params)
    assert sorted(p.name for p in local.parent.iterdir()) == ["pi05", "pi05.lock"]
    count = len(bucket.downloaded)
    assert fetch(f"{URI}/") == local and len(bucket.downloaded) == count


def test_fetch_uses_the_cache_without_a_remote(monkeypatch, tmp_path):
    def no_network(_):
        raise AssertionError("asked for a remote file system")

    monkeypatch.setattr(fsspec, "filesystem", no_network)
    there = tmp_path / "bucket/checkpoints/pi05"
    there.mkdir(parents=True)
    assert fetch(URI, cache_dir=tmp_path) == there


def test_fetch_of_one_file(bucket):
    bucket.pipe_file("bucket/tokenizer.model", b"pieces")
    assert fetch("gs://bucket/tokenizer.model").read_bytes() == b"pieces"


@pytest.mark.parametrize("fails_at", [1, 4])
def test_an_interrupted_download_is_not_a_checkpoint_and_resumes(bucket, tmp_path, tiny_params, fails_at):
    bucket.fails_at = fails_at
    with pytest.raises(CheckpointError, match=r"download stopped at gs://bucket/.*connection lost; run it again"):
        fetch(URI)
    assert not (tmp_path / "cache/bucket/checkpoints/pi05").exists()
    bucket.fails_at = None
    assert_equal_trees(load_params(fetch(URI), TINY), tiny_params)
    files = bucket.find("bucket/checkpoints/pi05")
    assert len(bucket.downloaded) == len(files) + 1  # only the file that broke came twice
    assert set(bucket.downloaded) == set(files)
    assert not list(tmp_path.rglob("*.incoming")) and not list(tmp_path.rglob("*.part"))


def test_a_short_file_is_noticed(bucket, monkeypatch):
    monkeypatch.setattr(Bucket, "get_file", lambda self, name, to, **_: pathlib.Path(to).write_bytes(b"x"))
    with pytest.raises(CheckpointError, match=r"expected \d+ bytes, got 1"):
        fetch(URI)


def test_two_at_once_download_once(bucket):
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch(URI))) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 2 and results[0] == results[1]
    assert len(bucket.downloaded) == len(set(bucket.downloaded))


def test_nothing_at_the_address(bucket):
    with pytest.raises(CheckpointError, match="expected files at gs://bucket/nowhere, got none"):
        fetch("gs://bucket/nowhere")


@pytest.mark.parametrize("uri", ["s3://bucket/path", "gs://bucket", "https://example.org/x"])
def test_other_addresses(uri):
    with pytest.raises(CheckpointError, match="expected a local path or gs://bucket/path, got"):
        fetch(uri)


def test_without_gcsfs_the_error_is_one_line_to_paste(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(CheckpointError) as caught:
        fetch(URI, cache_dir=tmp_path)
    message = str(caught.value)
    assert 'pip install "safe-pruner-jax[gcs]"' in message and "\n" not in message
    assert f"gsutil -m cp -r {URI} {tmp_path}/bucket/checkpoints" in message
