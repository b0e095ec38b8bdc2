"""Stages of a policy that sees: labels per patch, losses by name, the order of the stages."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from safe_pruner_jax.cli.stages import Stages, action_stats, curves, embedded_weights, run_stages
from safe_pruner_jax.cli.train import Train, run_train
from safe_pruner_jax.libero.labels import CLASSES
from safe_pruner_jax.libero.scenes import write
from safe_pruner_jax.model.config import GemmaConfig, SiglipConfig, mini
from safe_pruner_jax.model.params import draw_params
from safe_pruner_jax.policy.embedded import WEIGHTS, embedded_folder
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transforms import Tokenizer
from safe_pruner_jax.training import perception, stages
from safe_pruner_jax.training.loop import Settings
from safe_pruner_jax.training.scenes import UNIT, Scenes

pytestmark = pytest.mark.newest
KINDS = ("basket", "butter", "milk")
SAID = {
    "instructions": tuple(f"pick up the {kind} and place it in the basket" for kind in KINDS[1:]),
    "receptacle": "basket",
}
TINY = mini(
    image_size=28,
    prefix=GemmaConfig(16, 3, 32, 2, 1, 8),
    expert=GemmaConfig(16, 3, 32, 2, 1, 8),
    vision=SiglipConfig(16, 1, 32, 2),
)
SETTINGS = Settings(steps=4, batch=4, draws=2, warmup=1, log_every=2, validate_every=4, save_every=2, augment=False)
TOKENIZER = embedded_folder() / "tokenizer.model"


@pytest.fixture(autouse=True)
def shallow_cut(monkeypatch):
    """In three layers tokens are dropped after the first, and the second is supervised."""
    monkeypatch.setattr(perception, "CUT", 1)


def frames(seed: int, count: int = 6, acts: bool = True) -> dict[str, np.ndarray]:
    """The left half of every outside picture is butter, the right half of every wrist picture milk."""
    rng = np.random.default_rng(seed)
    segmentation = np.zeros((count, 2, 28, 28), np.uint8)
    segmentation[:, 0, :, :14] = len(CLASSES) + 1
    segmentation[:, 1, :, 14:] = len(CLASSES) + 2
    image = np.repeat((segmentation * 40)[..., None], 3, -1)
    return {
        "image": image,
        "segmentation": segmentation,
        "position": rng.normal(0, 0.1, (count, 3, 3)).astype(np.float32),
        "site": rng.normal(0, 0.1, (count, 3)).astype(np.float32),
        "yaw": np.full(count, np.pi / 2, np.float32),
        "turn": np.full(count, 0.3, np.float32),
        "named": np.tile(np.int32([1, 2]), (count, 1)),
        "target": np.zeros(count, np.int32),
        "held": np.full(count, -1, np.int32),
        "actions": np.full((count, 10, 7), 0.15, np.float32),
        "acts": np.full(count, acts),
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for seed in (0, 1, 3):
        save(tmp_path / "data" / f"{seed}.npz", seed)
    return tmp_path / "data"


def save(path: Path, seed: int, **about) -> None:
    known = {"suite": "libero_object", "task": 0, "what": "demo", "seed": seed, "kinds": KINDS} | SAID
    write(path, frames(seed), known | about)


def scenes(folder: Path, **more) -> Scenes:
    config = dataclasses.replace(get_config("mini_libero"), model=TINY)
    return Scenes([folder], Tokenizer(TOKENIZER, 200), action_stats(config), TINY, **more)


def test_labels_per_patch_say_what_the_segmentation_says(folder):
    data = scenes(folder)
    assert len(data.training) == 12 and len(data.held) == 6  # seed 3 is held out
    batch = data.batch(np.array([0, 1]), np.array([0, 1]))
    # tokens: outside camera row by row, then the wrist; 2 by 2 patches each
    np.testing.assert_array_equal(batch.cells[0, :, 0], [4, 0, 4, 0, 0, 5, 0, 5])
    np.testing.assert_array_equal(batch.thing[0], [2, 0, 2, 0, 0, 3, 0, 3])
    np.testing.assert_array_equal(batch.mask[0] > 0, batch.thing[0] == 2)
    np.testing.assert_array_equal(batch.mask[1] > 0, batch.thing[1] == 3)
    np.testing.assert_array_equal(batch.acts, [1, 0])  # the expert fetched the butter, not the milk
    np.testing.assert_allclose(batch.attention.sum(1), 1, atol=1e-6)
    all_ = data._all
    away = (all_["position"][0] - all_["site"][0]) / UNIT
    np.testing.assert_allclose(batch.way[0], np.concatenate([away[1], away[0]]), atol=1e-6)
    x, y, z = away[1]  # a hand turned by 90° sees the world's y ahead
    np.testing.assert_allclose(batch.offset[0, 0], [y, -x, z], atol=1e-6)
    np.testing.assert_allclose(batch.place[0, 0], all_["position"][0, 1] / UNIT, atol=1e-6)
    np.testing.assert_array_equal(batch.place_weight[0] > 0, [1, 0, 1, 0, 0, 0, 0, 0])  # not by the wrist camera
    np.testing.assert_allclose(batch.actions[0, 0, :4], [0.15, 0.15, 0.15, 0.5], atol=1e-4)


def test_every_loss_has_a_gradient_where_it_should(folder):
    data = scenes(folder)
    batch = data.batch(np.arange(4), np.array([0, 1, 0, 1]))
    params = stages.initial(TINY, len(KINDS))

    def losses(params):
        looks = perception.look(params, TINY, batch, batch.images, data.vocabulary)
        return {name: loss(looks, batch) for name, loss in perception.LOSSES.items()}

    gradients = jax.jit(jax.jacrev(losses))(params)
    middle = perception.supervised_layers(TINY.depth)
    for name in perception.LOSSES:
        grads = flatten_dict(gradients[name], sep="/")
        size = lambda path, g=grads: np.abs(np.asarray(g[path])).reshape(len(g[path]), -1).max(1)
        assert size("PaliGemma/img/embedding/kernel").max() > 0, name
        queries = size("PaliGemma/llm/layers/attn/q_einsum/w") > 0
        if name == "attention":
            assert queries.nonzero()[0].max() == middle[-1]  # nothing behind the supervised layers
        if name in ("cells", "names", "offset", "place"):
            assert not queries.any()
        assert not size("PaliGemma/llm/layers/attn/q_einsum_1/w").any()  # the expert learns from flow alone


def test_a_glance_is_the_dense_half_of_a_look(folder):
    data = scenes(folder)
    batch = data.batch(np.arange(2), np.array([0, 1]))
    params = jax.tree.map(jnp.asarray, stages.initial(TINY, len(KINDS)))
    short = jax.jit(lambda params: perception.glance(params, TINY, batch.images, data.vocabulary))(params)
    long = jax.jit(lambda params: perception.look(params, TINY, batch, batch.images, data.vocabulary))(params)
    for name in ("cells", "names", "offset", "place"):
        np.testing.assert_allclose(getattr(short, name), getattr(long, name), atol=1e-5)


def test_names_are_the_words_in_which_instructions_differ(folder):
    words, tokenizer = scenes(folder).vocabulary, Tokenizer(TOKENIZER, 200)
    rows = [tuple(row[mask]) for row, mask in zip(words.tokens, words.mask, strict=True)]
    assert rows == [tuple(tokenizer.encode(text)) for text in SAID["instructions"]]
    names = [tuple(row[mask]) for row, mask in zip(words.names, words.names_mask, strict=True)]
    assert len(set(names)) == len(KINDS) and all(names)
    for said, name in zip(rows, names[1:], strict=True):
        assert any(said[k : k + len(name)] == name for k in range(len(said)))


def test_two_of_a_kind_look_alike_and_an_instruction_names_one_of_them(tmp_path):
    """The butter of the other tests becomes a second bowl, the milk the first."""
    about = {"kinds": ("plate", "akita_black_bowl_2", "akita_black_bowl"), "receptacle": "plate"}
    about["instructions"] = ("pick up the left one", "pick up the right one", "pick up the one that is not here")
    write(tmp_path / "0.npz", frames(0) | {"named": np.tile(np.int32([1, 2, -1]), (6, 1))}, about | {"seed": 0})
    data = scenes(tmp_path)
    batch = data.batch(np.array([0, 1]), np.array([0, 1]))
    np.testing.assert_array_equal(batch.cells[0, :, 0], [4, 0, 4, 0, 0, 4, 0, 4])  # one class
    np.testing.assert_array_equal(batch.mask > 0, [[1, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 1]])
    names = data.vocabulary.names
    np.testing.assert_array_equal(names[1], names[2])
    assert (names[0] != names[1]).any()
    drawn = data.draw(np.random.default_rng(0), 64)
    said = {tuple(row) for row in np.asarray(drawn.tokens)}
    assert said == {tuple(row) for row in data.vocabulary.tokens[:2]}  # what names nothing is not said


def test_heads_for_other_things_start_anew(folder):
    params = stages.initial(TINY, 3)
    assert stages.fit_heads(params, TINY, 3)[perception.HEADS] == params[perception.HEADS]
    other = stages.fit_heads(params, TINY, 7)
    assert other[perception.HEADS]["cells"]["bias"].shape == (4 * (len(CLASSES) + 7),)
    assert other[perception.HEADS]["way"] is params[perception.HEADS]["way"]


@pytest.mark.nightly
def test_align_learns_and_goes_on_where_it_was(folder, tmp_path):
    rows, data = [], scenes(folder)
    start = stages.initial(TINY, len(KINDS))
    s = dataclasses.replace(SETTINGS, steps=60, learning_rate=1e-2, validate_every=60, save_every=30)
    stages.train_stage("align", TINY, data, start, s, tmp_path, on_log=rows.append)
    losses = [row["cells"] for row in rows if "cells" in row]
    assert losses[-1] < 0.3 * losses[0] and rows[-1]["validation"]["cell_accuracy"] > 0.9
    again, steps = stages.train_stage("align", TINY, data, start, dataclasses.replace(s, steps=62), tmp_path)
    assert steps == 62
    for name, leaf in flatten_dict(stages.load_weights(tmp_path / "align" / "weights.npz"), sep="/").items():
        np.testing.assert_array_equal(leaf, flatten_dict(again, sep="/")[name])


@pytest.mark.nightly
def test_all_stages_end_in_a_checkpoint_without_heads(folder, tmp_path):
    from safe_pruner_jax.model.checkpoint import load_params

    config = dataclasses.replace(get_config("mini_libero"), model=TINY)
    for stage in ("align", "refer", "act"):
        run_stages(stage, Stages(scenes=(folder,)), config, TOKENIZER, SETTINGS, tmp_path / "run")
    params = load_params(tmp_path / "run" / "checkpoint", TINY, dtype="float32")
    assert flatten_dict(params).keys() == flatten_dict(draw_params(TINY)).keys()
    moved = [
        np.abs(flatten_dict(params)[k] - flatten_dict(stages.initial(TINY, 3))[k]).max() for k in flatten_dict(params)
    ]
    assert np.isfinite(moved).all() and sum(m > 0 for m in moved) > 0.9 * len(moved)
    drawn = curves(tmp_path / "run")
    assert {line.get_label() for line in drawn.axes[0].get_lines()} >= {"place_cm", "near_cm"}
    assert [text.get_text() for text in drawn.axes[2].texts] == [" align", " refer", " act"]
    rows = (tmp_path / "run" / "act" / "metrics.jsonl").read_text()
    assert '"flow"' in rows and '"near_cm"' in rows and '"turn_deg"' in rows


@pytest.mark.parametrize(("name", "kinds"), [("mini_libero", 11), ("mini_libero_spatial", 7)])
def test_training_goes_on_from_the_package(name, kinds):
    config = get_config(name).model
    weights = embedded_weights(name)
    heads = perception.init_heads(config, kinds)
    assert jax.tree.map(np.shape, weights.pop(perception.HEADS)) == jax.tree.map(np.shape, heads)
    assert jax.tree.map(np.shape, weights) == jax.tree.map(np.shape, draw_params(config))


def test_wrong_runs_are_refused_in_one_line(folder, tmp_path):
    config = dataclasses.replace(get_config("mini_libero"), model=TINY)
    run = lambda stage, **more: run_stages(stage, Stages(**more), config, TOKENIZER, SETTINGS, tmp_path / "run")
    with pytest.raises(ValueError, match=r"stage act: expected .*refer/weights.npz.* train refer first"):
        run("act", scenes=(folder,))
    with pytest.raises(ValueError, match=r"without: expected losses of cells, .* got beauty"):
        run("align", scenes=(folder,), without=("beauty",))
    with pytest.raises(ValueError, match=r"expected labelled scenes in .*, got none; run scripts"):
        run("align", scenes=(tmp_path / "nothing",))
    save(folder / "7.npz", 7, kinds=("bowl", "plate"))
    with pytest.raises(ValueError, match=r"7.npz: expected scenes of one suite \(basket, butter, milk\)"):
        run("align", scenes=(folder,))
    with pytest.raises(ValueError, match=r"expected frames of 56 pixels, got 28"):
        Scenes([folder], Tokenizer(TOKENIZER, 200), action_stats(config), TINY.replace(image_size=56))


@pytest.mark.parametrize("config", WEIGHTS)
def test_a_configuration_of_the_package_brings_its_tokenizer(tmp_path, config):
    """Without one the command would stop before it looks at anything else."""
    with pytest.raises(ValueError, match="init: expected embedded, mini_libero, mini_libero_spatial"):
        run_train(Train(stage="act", config=config, init="runs/elsewhere", out=tmp_path))
