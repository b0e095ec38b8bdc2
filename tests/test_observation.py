"""The host-side steps against openpi's output (tests/data) and their definitions."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.robots import slow_normalise
from PIL import Image

from safe_pruner_jax.robots.transforms import (
    NormStats,
    Tokenizer,
    discretise,
    load_norm_stats,
    normalise,
    resize_with_pad,
    save_norm_stats,
    unnormalise,
)

DATA = Path(__file__).parent / "data"
NORM_STATS = DATA / "ckpt_tiny_pi05" / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
TOY = DATA / "toy_sentencepiece.model"
quick = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(DATA / "openpi_pi05_libero_e2e.npz"))


@pytest.fixture(scope="module")
def prompt():
    return json.loads((DATA / "openpi_pi05_libero_e2e.json").read_text())["prompt"]


@pytest.fixture(scope="module")
def stats():
    entries = json.loads(NORM_STATS.read_text())["norm_stats"]
    return {key: NormStats(**entry) for key, entry in entries.items()}


# Resizing


def test_resize_of_a_wide_image_is_openpis(golden):
    np.testing.assert_array_equal(resize_with_pad(golden["resize/in_180x256"], 224, 224), golden["resize/out_224"])


@pytest.mark.parametrize("raw, small", [("in/raw_image_256", "in/image"), ("in/raw_wrist_256", "in/wrist_image")])
def test_resize_of_a_square_image_is_openpis(golden, raw, small):
    np.testing.assert_array_equal(resize_with_pad(golden[raw], 224, 224), golden[small])


def test_resize_keeps_an_image_that_fits(golden):
    assert resize_with_pad(golden["in/image"], 224, 224) is golden["in/image"]


@quick
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_resize_centres_the_picture_on_black(h, w, seed):
    image = np.random.default_rng(seed).integers(1, 256, (h, w, 3), dtype=np.uint8)
    out = resize_with_pad(image, 64, 64)
    assert out.shape == (64, 64, 3) and out.dtype == np.uint8
    new_h, new_w = (64, int(w / (h / 64))) if h >= w else (int(h / (w / 64)), 64)
    top, left = (64 - new_h) // 2, (64 - new_w) // 2
    inside = np.zeros((64, 64), bool)
    inside[top : top + new_h, left : left + new_w] = True
    assert not out[~inside].any()
    small = Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(out[inside], np.asarray(small).reshape(-1, 3))


# The state as text


def test_bins_are_openpis(golden):
    np.testing.assert_array_equal(discretise(golden["digitize/x"]), golden["digitize/bin"])


@quick
@given(st.lists(st.floats(allow_nan=False, width=64) | st.integers(-140, 140).map(lambda k: k / 128), max_size=8))
def test_bin_counts_the_edges_at_or_below(values):
    edges = [-1 + 2 * k / 256 for k in range(256)]
    slow = [sum(edge <= x for edge in edges) - 1 for x in values]
    assert discretise(np.array(values, np.float64)).tolist() == slow
    numpys = np.digitize(np.array(values, np.float64), np.linspace(-1, 1, 257)[:-1]) - 1
    assert numpys.tolist() == slow


def test_bins_at_the_limits():
    x = np.array([-2.0, -1 - 1e-12, -1.0, 0.0, -1e-20, 0.9921875, 1.0, 50.0])
    assert discretise(x).tolist() == [-1, -1, 0, 128, 127, 255, 255, 255]


# The tokeniser


@pytest.mark.parametrize("discrete", [False, True])
def test_tokens_are_openpis(golden, prompt, stats, discrete):
    case = "discrete_true" if discrete else "discrete_false"
    state = normalise(golden["in/state"], stats["state"], quantiles=True)
    tokens = Tokenizer(TOY, 200).encode(prompt, state if discrete else None)
    valid = golden[f"{case}/token_mask"]
    assert tokens.dtype == np.int32 and len(tokens) == valid.sum()
    np.testing.assert_array_equal(tokens, golden[f"{case}/tokens"][: len(tokens)])
    assert valid[: len(tokens)].all() and not golden[f"{case}/tokens"][len(tokens) :].any()


def test_underscores_newlines_and_outer_space_are_cleaned():
    tokenizer = Tokenizer(TOY, 200)
    assert tokenizer.encode(" pick_up\nit \n").tolist() == tokenizer.encode("pick up it").tolist()


def test_state_goes_into_the_prompt_as_bins():
    tokenizer = Tokenizer(TOY, 200)
    one, other = (tokenizer.encode("pick up", np.array([x, -1.5])) for x in (0.0, 0.001))
    assert one.tolist() == other.tolist() != tokenizer.encode("pick up", np.array([0.1, -1.5])).tolist()


def test_a_long_prompt_is_cut_with_a_warning(caplog):
    text = "pick up the plate " * 10
    full = Tokenizer(TOY, 200).encode(text)
    with caplog.at_level(logging.WARNING):
        assert not caplog.records
        cut = Tokenizer(TOY, 12).encode(text)
    assert cut.tolist() == full[:12].tolist()
    assert f"{len(full)} tokens" in caplog.text and "12" in caplog.text


def test_a_prompt_that_just_fits_is_not_warned_about(caplog):
    n = len(Tokenizer(TOY, 200).encode("pick up"))
    with caplog.at_level(logging.WARNING):
        assert len(Tokenizer(TOY, n).encode("pick up")) == n
    assert not caplog.records


def test_tokenizer_without_a_file_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="gs://big_vision"):
        Tokenizer(tmp_path / "none.model", 48)


# Norm stats


def test_normalised_state_is_openpis(golden, stats):
    state = normalise(golden["in/state"], stats["state"], quantiles=True)
    assert state.dtype == np.float64
    np.testing.assert_array_equal(state.astype(np.float32), golden["discrete_false/state_norm_padded"][:8])


@pytest.mark.parametrize("case", ["discrete_false", "discrete_true"])
def test_unnormalised_actions_are_openpis(golden, stats, case):
    actions = unnormalise(golden[f"{case}/model_actions"], stats["actions"], quantiles=True)
    assert actions.dtype == np.float64 and actions.shape == (10, 32)
    np.testing.assert_allclose(actions[:, :7], golden[f"{case}/actions"], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(actions[:, 7:], golden[f"{case}/model_actions"][:, 7:])


vectors = st.lists(st.floats(-100, 100), min_size=4, max_size=4).map(np.array)


@quick
@given(vectors, vectors, st.lists(st.floats(0, 100), min_size=4, max_size=4).map(np.array), st.booleans())
def test_unnormalise_inverts_normalise(x, low, span, quantiles):
    s = NormStats(mean=low, std=span, q01=low, q99=low + span)
    y = normalise(x, s, quantiles=quantiles)
    np.testing.assert_allclose(y, slow_normalise(x, s, quantiles), rtol=1e-12)
    np.testing.assert_allclose(unnormalise(y, s, quantiles=quantiles), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("quantiles", [False, True])
def test_stats_longer_than_the_data_are_cut(stats, quantiles):
    x = np.arange(3.0)
    expected = slow_normalise(x, stats["state"], quantiles)
    np.testing.assert_allclose(normalise(x, stats["state"], quantiles=quantiles), expected, rtol=1e-12)


def test_z_score_leaves_the_padding_almost_alone():
    s = NormStats(np.array([3.0]), np.array([2.0]))
    out = unnormalise(np.ones((2, 3)), s, quantiles=False)
    np.testing.assert_allclose(out, [[5 + 1e-6, 1 + 1e-6, 1 + 1e-6]] * 2, rtol=1e-15)


@pytest.mark.parametrize("scale", [normalise, unnormalise])
def test_quantiles_that_are_absent(scale):
    with pytest.raises(ValueError, match="q01 and q99"):
        scale(np.zeros(2), NormStats(np.zeros(2), np.ones(2)), quantiles=True)


def test_stats_file_round_trip(tmp_path, stats):
    stats = stats | {"actions": NormStats([1.0, 2.0], [3.0, 4.0])}
    path = save_norm_stats(tmp_path, "someone/robot", stats)
    assert path == tmp_path / "assets" / "someone" / "robot" / "norm_stats.json"
    back = load_norm_stats(str(tmp_path), "someone/robot")
    assert back["actions"].q01 is None and back["actions"].mean.dtype == np.float64
    for key in stats:
        for name in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(back[key], name), getattr(stats[key], name))


def test_openpis_stats_file_loads_and_is_written_back_equal(tmp_path, stats):
    text = NORM_STATS.read_text()
    target = tmp_path / "assets" / "physical-intelligence" / "libero"
    target.mkdir(parents=True)
    (target / "norm_stats.json").write_text(text)
    loaded = load_norm_stats(tmp_path, "physical-intelligence/libero")
    assert loaded.keys() == stats.keys() == {"state", "actions"} and loaded["state"].dim == 8
    assert json.loads(save_norm_stats(tmp_path, "copy", loaded).read_text()) == json.loads(text)


def test_missing_stats_list_the_asset_ids_there_are(tmp_path, stats):
    save_norm_stats(tmp_path, "someone/robot", stats)
    with pytest.raises(FileNotFoundError, match="someone/robot"):
        load_norm_stats(tmp_path, "droid")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"norm_stats": 3}',
        '{"norm_stats": {"state": null}}',
        '{"norm_stats": {"state": {"mean": [1]}}}',
        '{"norm_stats": {"state": {"mean": [1], "std": [1, 2]}}}',
        '{"norm_stats": {"state": {"mean": [null], "std": [1]}}}',
    ],
)
def test_bad_stats_files(tmp_path, text):
    path = tmp_path / "assets" / "x" / "norm_stats.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match="norm"):
        load_norm_stats(tmp_path, "x")
