"""openpi's checkpoints: read, written, and refused with a reason."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_checkpoint import GOLDEN, TINY, assert_equal_trees, flat, unflat

from safe_pruner_jax.model import checkpoint, checks, pi0
from safe_pruner_jax.model.checkpoint import CheckpointError, Stored, load_params, open_params, save_params
from safe_pruner_jax.model.config import GemmaConfig
from safe_pruner_jax.model.params import param_shapes

GOLDEN_SHA256 = "b9d50a457aa04a46b7517da30e809db1cdafcb0e2fb0981882862b1c57a9d187"
"""Of the paths and float32 bytes, in path order, of the openpi model both checkpoints were saved from."""


@pytest.fixture
def golden_copy(tmp_path):
    """A checkpoint to damage."""
    return pathlib.Path(shutil.copytree(GOLDEN["pure"], tmp_path / "ckpt"))


def error(*args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(*args, **kwargs)
    return str(caught.value)


# load


@pytest.mark.parametrize("keys", GOLDEN)
def test_openpi_checkpoints_hold_openpi_parameters(keys):
    leaves = flat(load_params(GOLDEN[keys], TINY))
    digest = hashlib.sha256()
    for path in sorted(leaves):
        digest.update(path.encode())
        digest.update(leaves[path].tobytes())
    assert digest.hexdigest() == GOLDEN_SHA256


@pytest.mark.parametrize("keys", GOLDEN)
def test_tree_is_that_of_the_configuration(keys):
    leaves, shapes = flat(load_params(str(GOLDEN[keys] / "params"), TINY)), flat(param_shapes(TINY))
    assert {k: (v.shape, v.dtype) for k, v in leaves.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}
    assert all(type(v) is np.ndarray for v in leaves.values())


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.float16])
def test_cast_while_loading_is_a_plain_cast(tiny_params, dtype):
    want = unflat({k: v.astype(jnp.dtype(dtype)) for k, v in flat(tiny_params).items()})
    assert_equal_trees(load_params(GOLDEN["value"], TINY, dtype=dtype), want)


def test_dtype_must_be_floating():
    with pytest.raises(ValueError, match=r'floating dtype such as "bfloat16".*got int8'):
        load_params(GOLDEN["pure"], TINY, dtype="int8")


def test_leaves_are_on_disk_until_they_are_read(tmp_path, tiny_params):
    shutil.copytree(GOLDEN["pure"], tmp_path / "ckpt")
    found = flat(open_params(tmp_path / "ckpt", TINY, dtype="float32"))
    assert all(isinstance(leaf, Stored) for leaf in found.values())
    assert sum(leaf.nbytes for leaf in found.values()) == sum(v.nbytes for v in flat(tiny_params).values())
    once = []
    note = lambda k, leaf: once.append(k) or leaf.read()
    counted = {k: types.SimpleNamespace(read=partial(note, k, leaf)) for k, leaf in found.items()}
    want = jax.jit(lambda params: pi0.prepare(params, TINY))(load_params(GOLDEN["pure"], TINY, dtype="float32"))
    got = pi0.prepare(unflat(counted), TINY)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert sorted(once) == sorted(found)  # every leaf, and none of them twice
    shutil.rmtree(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        found["action_in_proj/kernel"].read()


def test_peak_memory_is_one_copy_and_one_leaf(tmp_path):
    """170 MB stored, 85 MB as bfloat16, largest leaf 64 MB stored; Orbax on the whole tree takes 239 MB."""
    script = textwrap.dedent("""
        import pathlib, resource, sys
        from safe_pruner_jax.model.checkpoint import load_params
        from safe_pruner_jax.model.config import GemmaConfig, Pi0Config, SiglipConfig
        from safe_pruner_jax.model.params import param_shapes

        def peak():
            if sys.platform == "linux":  # its ru_maxrss starts at the parent's
                status = pathlib.Path("/proc/self/status").read_text()
                return 1024 * int(status.split("VmHWM:")[1].split()[0])
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        config = Pi0Config(True, GemmaConfig(256, 4, 8192, 8, 1, 32), GemmaConfig(128, 4, 512, 8, 1, 32),
                           SiglipConfig(128, 2, 128, 2), vocab_size=65536)
        shapes = param_shapes(config)  # traced outside of the measurement
        if __name__ == "__main__":
            before = peak()
            params = load_params(sys.argv[1], config, dtype="bfloat16")
            print(peak() - before)
    """)
    (tmp_path / "measure.py").write_text(script)
    names: dict = {"__name__": "measure"}
    exec(script, names)
    rng = np.random.default_rng(0)
    leaves = {k: rng.standard_normal(s.shape, dtype=np.float32) for k, s in flat(names["shapes"]).items()}
    save_params(tmp_path / "ckpt", unflat(leaves))
    root = pathlib.Path(checkpoint.__file__).parents[2]
    command = [sys.executable, "-c", script, str(tmp_path / "ckpt")]
    used = int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)
    copy, largest = sum(v.nbytes for v in leaves.values()) // 2, max(v.nbytes for v in leaves.values())
    assert copy <= used < 1.35 * copy + largest


# save


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("value_keys", [False, True])
def test_round_trip(tmp_path, value_keys, dtype):
    params = load_params(GOLDEN["pure"], TINY, dtype=dtype)
    assert save_params(tmp_path / "new" / "ckpt", params, value_keys=value_keys) == tmp_path / "new/ckpt/params"
    assert_equal_trees(load_params(tmp_path / "new" / "ckpt", TINY), params)


def test_saves_jax_arrays(tmp_path, tiny_params):
    save_params(tmp_path, unflat({k: jnp.asarray(v) for k, v in flat(tiny_params).items()}))
    assert_equal_trees(load_params(tmp_path, TINY), tiny_params)


@pytest.mark.parametrize("keys", GOLDEN)
def test_layout_is_openpis(tmp_path, tiny_params, keys):
    """Orbax itself reads it as openpi does, and lists the same leaves as in openpi's own file."""
    save_params(tmp_path, tiny_params, value_keys=keys == "value")
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = flat(checkpointer.restore(tmp_path / "params"))
    tail = "/value" if keys == "value" else ""
    assert_equal_trees(unflat(restored), unflat({f"params/{k}{tail}": v for k, v in flat(tiny_params).items()}))

    ours, theirs = (json.loads((d / "params/_METADATA").read_text()) for d in (tmp_path, GOLDEN[keys]))
    assert ours["tree_metadata"].keys() == theirs["tree_metadata"].keys()
    assert ours["use_zarr3"] is theirs["use_zarr3"] is False


def test_overwrite_is_asked_for_and_leaves_the_rest(tmp_path, tiny_params):
    (tmp_path / "assets").mkdir()
    save_params(tmp_path, tiny_params)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save_params(tmp_path, tiny_params)
    twice = unflat({k: 2 * v for k, v in flat(tiny_params).items()})
    save_params(tmp_path, twice, overwrite=True)
    assert_equal_trees(load_params(tmp_path, TINY), twice)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["assets", "params"]


@pytest.mark.parametrize("before, moves", [("nothing", 0), ("tiny", 0), ("tiny", 1)])
def test_a_save_that_dies_loads_as_before_or_not_at_all(tmp_path, tiny_params, monkeypatch, before, moves):
    """Dies late: all data is written, and `moves` of the renames in or out of the final place are done."""
    final, rename, left = tmp_path / "params", checkpoint.os.rename, [moves]
    overwrite = before == "tiny"
    if overwrite:
        save_params(tmp_path, tiny_params)

    def die(source, target):
        if final in (source, target):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        rename(source, target)

    twice = unflat({k: 2 * v for k, v in flat(tiny_params).items()})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.os, "rename", die)
        save_params(tmp_path, twice, overwrite=overwrite)
    if overwrite and not moves:
        assert_equal_trees(load_params(tmp_path, TINY), tiny_params)
    else:
        assert "got no _METADATA" in error(tmp_path, TINY)
    save_params(tmp_path, twice, overwrite=overwrite)  # what was left behind is no obstacle
    assert_equal_trees(load_params(tmp_path, TINY), twice)
    assert [p.name for p in tmp_path.iterdir()] == ["params"]


def test_orbax_own_unfinished_save_does_not_load(golden_copy):
    (golden_copy / "params").rename(golden_copy / "params.orbax-checkpoint-tmp")
    assert "expected a complete checkpoint" in error(golden_copy, TINY)


# what is refused


def saved_with(path, tiny_params, **changes):
    """`tiny` with leaves replaced, or removed where None; `__` stands for `/`."""
    leaves = flat(tiny_params) | {k.replace("__", "/"): v for k, v in changes.items()}
    save_params(path, unflat({k: v for k, v in leaves.items() if v is not None}))
    return path


def test_missing_leaf(tmp_path, tiny_params):
    message = error(saved_with(tmp_path, tiny_params, time_mlp_in__bias=None), TINY)
    assert "time_mlp_in/bias: expected (64,), got no such leaf" in message
    assert "save or download it again" in message


def test_misshapen_leaf(tmp_path, tiny_params):
    message = error(saved_with(tmp_path, tiny_params, time_mlp_in__bias=np.zeros((3, 64), np.float32)), TINY)
    assert "time_mlp_in/bias: expected (64,), got (3, 64)" in message


def test_integer_leaf(tmp_path, tiny_params):
    message = error(saved_with(tmp_path, tiny_params, time_mlp_in__bias=np.zeros(64, np.int8)), TINY)
    assert "time_mlp_in/bias: expected floating values, got int8" in message


def test_extra_leaf_is_refused_unless_allowed(tmp_path, tiny_params):
    name = "PaliGemma__llm__layers__attn__q_einsum__lora_a"
    path = saved_with(tmp_path, tiny_params, **{name: np.ones((4, 8, 64, 2), np.float32)})
    message = error(path, TINY)
    assert "attn/q_einsum/lora_a: expected no such leaf, got one" in message
    assert "allow_extra=True" in message and "LoRA" in message
    assert_equal_trees(load_params(path, TINY, allow_extra=True), tiny_params)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_non_finite_leaf(tmp_path, tiny_params, monkeypatch, bad, dtype):
    leaf = flat(tiny_params)["time_mlp_in/kernel"].copy()
    leaf[[0, 5], [1, 63]] = bad
    params = unflat(flat(tiny_params) | {"time_mlp_in/kernel": leaf})
    with pytest.raises(CheckpointError, match=r"leaf time_mlp_in/kernel: .*got 2 of 4096 NaN or infinite"):
        save_params(tmp_path, params)
    assert not (tmp_path / "params").exists()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "count_nonfinite", lambda _: 0)
        save_params(tmp_path, params)
    message = error(tmp_path, TINY, dtype=dtype)
    assert "leaf time_mlp_in/kernel" in message and "got 2 of 4096 NaN or infinite" in message


def test_largest_finite_values_are_finite():
    for dtype in (np.float16, jnp.bfloat16, np.float32, np.float64):
        edges = [jnp.finfo(dtype).max, jnp.finfo(dtype).min, jnp.finfo(dtype).smallest_subnormal, 0.0, -0.0]
        assert checks.count_nonfinite(np.array(edges, dtype)) == 0


def test_wrong_sizes_are_one_error_with_the_first_mismatches():
    wider = TINY.replace(expert=GemmaConfig(128, 4, 256, 8, 1, 16))
    shapes, stored = flat(param_shapes(wider)), flat(param_shapes(TINY))
    differ = sum(shapes[k].shape != stored[k].shape for k in shapes)
    message = error(GOLDEN["value"], wider)
    assert "attn_vec_einsum_1/w: expected (4, 8, 16, 128), got (4, 8, 16, 64)" in message
    assert f"and {differ - checks.SHOWN} more" in message
    assert "The configuration seems wrong for this checkpoint" in message
    assert len(message.splitlines()) == checks.SHOWN + 3


def test_pi0_configuration_on_a_pi05_checkpoint():
    message = error(GOLDEN["pure"], TINY.replace(pi05=False))
    assert "The configuration seems wrong: it has pi05=False, the file holds a model with pi05=True." in message


def test_truncated_data_names_the_leaf_and_the_file(golden_copy):
    largest = max((golden_copy / "params").rglob("d/*"), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    message = error(golden_copy, TINY)
    assert message.startswith("leaf PaliGemma/") and "cannot be read: OUT_OF_RANGE" in message
    assert str(golden_copy) in message and "download or save the checkpoint again" in message
    assert len(message) < 1000


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d"])
@pytest.mark.parametrize("damage", [b"", b"\0" * 200])
def test_corrupt_index(golden_copy, name, damage):
    file = golden_copy / "params" / name
    file = next(file.iterdir()) if file.is_dir() else file
    file.write_bytes(damage)
    assert "cannot be read" in error(golden_copy, TINY)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"tree_metadata": {"a": {}}}'])
def test_corrupt_metadata(golden_copy, text):
    (golden_copy / "params/_METADATA").write_text(text)
    assert "_METADATA is corrupt" in error(golden_copy, TINY)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_absent_file_is_named(golden_copy, name):
    (golden_copy / "params" / name).unlink()
    assert f"got no {name}" in error(golden_copy, TINY)


def test_another_item_is_not_taken_for_parameters(tmp_path, tiny_params):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"opt_state": tiny_params, "step": np.zeros(())})
    message = error(tmp_path / "state", TINY)
    assert "got top-level names ['opt_state', 'step']" in message and "train_state/" in message


def test_absent_checkpoint(tmp_path):
    assert f"got {tmp_path}/nothing, which is absent" in error(tmp_path / "nothing", TINY)
