"""Layouts, saliency (Eq. 1-2) and top-K against loops written from the paper's text, in float64."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.selection import slow_budget, slow_saliency, slow_top_k

from safe_pruner_jax import tokens
from safe_pruner_jax.tokens import (
    PROMPT_LENGTHS,
    PrefixLayout,
    budget,
    check_keep,
    counting,
    gather,
    smallest_layout,
    top_k,
)

CAMERAS = ("base", "left", "right")
HUGE = -2.3819763e38  # what the model writes where a key is masked


masks = lambda size: st.lists(st.booleans(), min_size=size, max_size=size).map(lambda x: np.array(x, bool))


# saliency


@st.composite
def attention(draw):
    n, text, rows = draw(st.sampled_from([(1, 1, 1), (7, 5, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = draw(st.sampled_from([0.1, 3.0, 30.0])) * rng.normal(size=(2, 3, rows, n + text))
    if draw(st.booleans()):
        logits = np.round(logits)
    return logits.astype(np.float32), draw(masks(rows)), draw(masks(n))


COMPILED_SALIENCY = jax.jit(tokens.saliency, static_argnames="over")


@given(attention(), st.sampled_from(["visual", "all"]))
def test_saliency_is_eq_1_and_2(drawn, over):
    logits, rows, alive = drawn
    n = len(alive)
    masked = logits.copy()
    masked[..., :n] = np.where(alive, logits[..., :n], HUGE)
    expected = slow_saliency(logits.reshape(6, *logits.shape[2:]), rows, alive, over)
    got = np.asarray(COMPILED_SALIENCY(masked, rows, alive, over=over))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)
    assert (got[~alive] == 0).all()
    if over == "visual":
        assert np.isclose(got.sum(), float(rows.any() and alive.any()), atol=1e-5)
        # Eq. 1 masks by itself, and the prompt's keys have no part in it
        other = logits.copy()
        other[..., n:] += 5.0
        np.testing.assert_array_equal(COMPILED_SALIENCY(other, rows, alive, over=over), got)


def test_saliency_ignores_rows_that_do_not_count():
    rng = np.random.default_rng(0)
    logits, alive = rng.normal(size=(2, 3, 3, 12)).astype(np.float32), np.ones(7, bool)
    rows = np.array([True, False, True])
    other = logits.copy()
    other[:, :, 1] = 1e4 * rng.normal(size=(2, 3, 12))
    for over in ("visual", "all"):
        a, b = (COMPILED_SALIENCY(x, rows, alive, over=over) for x in (logits, other))
        np.testing.assert_array_equal(a, b)


def test_saliency_is_float32_of_bfloat16_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 12)), jnp.bfloat16)
    rows, alive = np.ones(3, bool), np.ones(7, bool)
    got = COMPILED_SALIENCY(logits, rows, alive)
    assert got.dtype == jnp.float32
    expected = slow_saliency(np.asarray(logits, np.float32).reshape(6, 3, 12), rows, alive, "visual")
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_saliency_shows_non_finite_logits():
    logits = np.zeros((1, 2, 5), np.float32)
    logits[0, 1, 2] = np.nan
    assert not np.isfinite(COMPILED_SALIENCY(logits, np.ones(2, bool), np.ones(4, bool))).all()


# top-K

COMPILED_TOP_K = jax.jit(top_k, static_argnums=2, static_argnames="per_camera")


@partial(jax.jit, static_argnums=2, static_argnames="per_camera")
def counted_top_k(score, alive, keep, **cameras):
    with counting(True):
        return top_k(score, alive, keep, **cameras)


N, KEEPS, RESERVED = 12, (0.5, 1.0, 5), (2, 40)  # few: each pair is a program


@st.composite
def ranking(draw):
    value = st.one_of(
        st.sampled_from([0.0, 0.25, 0.5, 1.0]),  # many ties
        st.sampled_from([math.nan, math.inf, -math.inf, -1.0]),
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False).filter(lambda x: x != 0),
    )
    score = np.array(draw(st.lists(value, min_size=N, max_size=N)), np.float32)
    return score, draw(masks(N)), draw(st.sampled_from(KEEPS))


def check_selection(score, alive, keep, index, chosen, **cameras):
    n, living = len(score), int(alive.sum())
    index, chosen = np.asarray(index), np.asarray(chosen)
    assert index.dtype == np.int32 and chosen.dtype == bool
    assert index.shape == chosen.shape == (slow_budget(keep, n),)
    assert (np.diff(index) > 0).all() and (index >= 0).all() and (index < n).all()
    assert index[chosen].tolist() == slow_top_k(score, alive, keep, **cameras)
    assert alive[index].sum() == min(len(index), living)  # no dead token while alive ones remain


@given(ranking())
def test_top_k_is_a_stable_sort_of_the_alive(drawn):
    score, alive, keep = drawn
    check_selection(score, alive, keep, *COMPILED_TOP_K(score, alive, keep))


@given(ranking(), st.sampled_from(RESERVED), st.integers(0, 2**32 - 1))
def test_top_k_with_a_minimum_per_camera(drawn, per_camera, seed):
    score, alive, keep = drawn
    keep = 0.5 if keep == 1 else keep
    camera = np.random.default_rng(seed).integers(0, 3, N).astype(np.int32)
    index, chosen = COMPILED_TOP_K(score, alive, keep, camera=camera, per_camera=per_camera)
    check_selection(score, alive, keep, index, chosen, camera=camera, per_camera=per_camera)
    if per_camera * 3 <= slow_budget(keep, int(alive.sum())):
        counts = np.bincount(camera[np.asarray(index)[np.asarray(chosen)]], minlength=3)
        assert (counts >= np.minimum(per_camera, np.bincount(camera[alive], minlength=3))).all()


@pytest.mark.parametrize(
    ("keep", "reserve"), [(0.5, {}), (5, {}), (5, {"camera": np.zeros(N, np.int32), "per_camera": 2})]
)
def test_top_k_with_everything_dead(keep, reserve):
    index, chosen = COMPILED_TOP_K(np.ones(N, np.float32), np.zeros(N, bool), keep, **reserve)
    assert not chosen.any()
    assert np.unique(index).shape == index.shape == (slow_budget(keep, 12),)


def test_top_k_count_above_the_alive_pads_with_dead_tokens():
    score = np.arange(12, dtype=np.float32)
    alive = np.zeros(12, bool)
    alive[[2, 9, 4]] = True
    index, chosen = COMPILED_TOP_K(score, alive, 5)
    assert index.shape == (5,) and index[chosen].tolist() == [2, 4, 9]
    index, chosen = COMPILED_TOP_K(score, alive, 500)
    assert index.tolist() == list(range(12)) and chosen.tolist() == alive.tolist()


def test_top_k_per_camera_above_the_budget_keeps_the_best_reserved():
    score = np.array([9, 8, 7, 7, 1, 2, 3, 4, 9, 6, 6, 6], np.float32)
    camera = np.repeat(np.arange(3, dtype=np.int32), 4)
    for per_camera, expected in ((2, [0, 1, 7, 8, 9]), (40, [0, 1, 2, 3, 8])):
        index, chosen = COMPILED_TOP_K(score, np.ones(N, bool), 5, camera=camera, per_camera=per_camera)
        assert chosen.all() and index.tolist() == expected


def test_top_k_takes_signed_zeros_as_equal():
    score = np.array([-0.0] * 6 + [0.0] * 6, np.float32)
    camera = np.zeros(N, np.int32)
    assert COMPILED_TOP_K(score, np.ones(N, bool), 5, camera=camera, per_camera=2)[0].tolist() == [0, 1, 2, 3, 4]
    assert COMPILED_TOP_K(score, np.ones(N, bool), 5)[0].tolist() == [0, 1, 2, 3, 4]


def test_top_k_of_an_empty_budget_is_empty():
    index, chosen = COMPILED_TOP_K(np.ones(12, np.float32), np.ones(12, bool), 0.01)
    assert index.shape == chosen.shape == (0,)


@given(ranking())
def test_counting_chooses_what_sorting_does(drawn):
    """The same slots in the same order, dead ones that fill up included."""
    score, alive, keep = drawn
    for sorted_, counted in zip(COMPILED_TOP_K(score, alive, keep), counted_top_k(score, alive, keep), strict=True):
        np.testing.assert_array_equal(sorted_, counted)


def test_counting_and_sorting_are_different_programs():
    """Otherwise the test above would compare one with itself."""
    texts = [
        run.lower(np.ones(N, np.float32), np.ones(N, bool), 0.5).as_text() for run in (COMPILED_TOP_K, counted_top_k)
    ]
    assert ["sort" in text for text in texts] == [True, False]


def test_gather_takes_each_robots_own_rows():
    x = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    index = np.array([[0, 4], [1, 2]])
    np.testing.assert_array_equal(gather(x, index), [x[0, [0, 4]], x[1, [1, 2]]])
    np.testing.assert_array_equal(gather(x[..., 0], index), [x[0, [0, 4], 0], x[1, [1, 2], 0]])


# budget, keep


@pytest.mark.parametrize(
    ("keep", "n", "expected"),
    [
        *[(0.2, 512, 102), (0.25, 10, 2), (0.75, 10, 8), (0.5, 1, 0), (0.5, 3, 2), (0.3, 0, 0), (0.001, 256, 0)],
        *[(1.0, 7, 7), (1, 7, 7), (2, 7, 2), (7, 7, 7), (8, 7, 7), (64.0, 512, 64)],
    ],
)
def test_budget(keep, n, expected):
    assert budget(keep, n) == expected == slow_budget(keep, n)
    assert type(budget(keep, n)) is int


@given(st.one_of(st.floats(2.0**-20, 1, allow_subnormal=False), st.integers(2, 600)), st.integers(0, 600))
def test_budget_is_monotone_and_never_too_large(keep, n):
    assert check_keep(keep) == keep
    assert 0 <= budget(keep, n) <= budget(keep, n + 1) <= n + 1
    assert budget(keep, n) <= n
    assert budget(keep, n) == slow_budget(keep, n)


@pytest.mark.parametrize("keep", [0, 0.0, -0.2, -3, 1.5, 1.0000001, 2.5, math.nan, math.inf, -math.inf, True, False])
def test_check_keep_says_what_it_wants(keep):
    with pytest.raises(ValueError, match=r"keep: expected a share .* or a whole number .* got .*keep=0\.2") as error:
        check_keep(keep)
    assert repr(keep) in str(error.value)


@pytest.mark.parametrize("keep", [1, 1.0, 0.2, 5e-324, 2, 2.0, 10**6, np.float32(0.5), np.int32(8)])
def test_check_keep_takes_shares_and_counts(keep):
    assert check_keep(keep) == keep


# layouts


def layout(masks, prompt_len, **choices):
    choices = {"cameras": CAMERAS, "tokens_per_camera": 4, "max_token_len": 200} | choices
    return smallest_layout(masks, prompt_len, **choices)


@given(st.dictionaries(st.sampled_from((*CAMERAS, "unknown")), st.booleans()), st.integers(0, 200))
def test_smallest_layout_is_the_smallest_that_holds_what_is_alive(alive, prompt_len):
    got = layout(alive, prompt_len)
    expected = [c for c in CAMERAS if alive.get(c)]
    assert got.cameras == tuple(expected or ["base"])
    assert got.text == min(t for t in PROMPT_LENGTHS if t >= prompt_len)
    assert got.visual == 4 * len(got.cameras) and got.slots == got.visual + got.text
    hash(got)


@pytest.mark.parametrize(
    ("prompt_len", "limit", "text"),
    [
        *[(0, 200, 16), (16, 200, 16), (17, 200, 32), (200, 200, 200), (129, 200, 200)],
        *[(40, 48, 48), (33, 40, 40), (17, 20, 20), (5, 10, 10), (201, 256, 256), (200, 256, 200)],
    ],
)
def test_smallest_layout_never_exceeds_openpis_padding(prompt_len, limit, text):
    assert layout({"base": True}, prompt_len, max_token_len=limit).text == text


def test_smallest_layout_order_and_own_lengths():
    got = layout({"right": True, "left": False, "base": True}, 5, prompt_lengths=(12, 6, 9))
    assert got == PrefixLayout(("base", "right"), 4, 6)


def test_smallest_layout_rejects_a_prompt_that_does_not_fit():
    with pytest.raises(ValueError, match=r"expected .* at most 48 tokens, got 49"):
        layout({"base": True}, 49, max_token_len=48)
