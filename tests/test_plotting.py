"""Pictures: which pixels are dimmed, and that every figure draws without touching pyplot."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from safe_pruner_jax.figures import kept, theme
from safe_pruner_jax.figures.film import Shot, film, save
from safe_pruner_jax.figures.kept import (
    OUTLINE,
    Shown,
    heat,
    kept_patches_figure,
    methods_figure,
    overlay,
    paths_diagram,
    picture,
    saliency_figure,
    video_frame,
)

pytestmark = pytest.mark.newest

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(30, 226, (224, 224, 3), dtype=np.uint8)
KEPT = RNG.random((16, 16)) < 0.3


def pixels(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


# ------------------------------------------------------------------------------------------------------------ overlay


def test_kept_patches_keep_their_pixels_and_dropped_ones_are_dim_and_grey():
    out = overlay(IMAGE, KEPT, dim=0.25)
    assert out.shape == IMAGE.shape and out.dtype == np.uint8
    for row in range(16):
        for column in range(16):
            inner = np.s_[14 * row + 1 : 14 * row + 13, 14 * column + 1 : 14 * column + 13]
            before, after = IMAGE[inner].astype(int), out[inner].astype(int)
            if KEPT[row, column]:
                # only the outline may differ, and it stays on the border of the patch
                np.testing.assert_array_equal(after, before)
            else:
                assert abs(after.mean() - 0.25 * before.mean()) < 1
                assert np.ptp(after, axis=-1).max() < 0.1 * np.ptp(before, axis=-1).max()


def test_the_outline_runs_around_kept_regions_not_through_them():
    kept = np.zeros((16, 16), bool)
    kept[4:6, 7:10] = True
    outlined = (overlay(IMAGE, kept) == OUTLINE).all(-1)
    edge = np.zeros((224, 224), bool)
    edge[56:84, 98:140] = True
    edge[57:83, 99:139] = False
    np.testing.assert_array_equal(outlined, edge)


def test_indices_and_masks_say_the_same():
    np.testing.assert_array_equal(overlay(IMAGE, np.flatnonzero(KEPT)), overlay(IMAGE, KEPT))
    np.testing.assert_array_equal(overlay(IMAGE, np.array([], np.int32)), overlay(IMAGE, np.zeros((16, 16), bool)))


@pytest.mark.parametrize(("side", "grid"), [(64, 16), (100, 16), (448, 16), (56, 4)])
def test_sides_need_not_be_multiples_of_the_grid(side, grid):
    image = np.full((side, side, 3), 200, np.uint8)
    out = overlay(image, np.array([0]), grid=grid, dim=0.5)
    assert (out[-1, -1] == 100).all() and (out[0, 0] == OUTLINE).all()
    np.testing.assert_array_equal(overlay(image, np.arange(grid**2), grid=grid)[2:-2, 2:-2], image[2:-2, 2:-2])


@pytest.mark.parametrize(
    ("image", "kept", "message"),
    [
        (IMAGE[:, :100], KEPT, "image: expected uint8"),
        (IMAGE.astype(np.float32), KEPT, "image: expected uint8"),
        (IMAGE[:8, :8], KEPT, "S ≥ 16"),
        (IMAGE, np.array([256]), "0 to 255"),
        (IMAGE, np.array([-1]), "0 to 255"),
        (IMAGE, np.ones((4, 8), bool), "square"),
    ],
)
def test_wrong_arguments_say_what_was_expected(image, kept, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, kept)


# -------------------------------------------------------------------------------------------------- frames and figures


def test_a_video_frame_has_a_codecs_size_and_numbers_slots_camera_after_camera():
    white = np.full((224, 224, 3), 255, np.uint8)
    images = {"base": white, "wrist": white}
    second_only = np.arange(256, 512)
    frame = video_frame(images, second_only, 256, "step 5", badge="KEYFRAME", dim=0.25)
    assert frame.shape == (496, 912, 3) and frame.dtype == np.uint8
    assert frame.shape[0] % 16 == frame.shape[1] % 16 == 0
    assert frame[200, 200].max() < 70 and (frame[200, 600] == 255).all()
    assert (frame[448:] == OUTLINE).all(-1).any()  # the badge
    plain = video_frame(images, second_only, 256, "step 5", dim=0.25)
    assert not (plain[448:] == OUTLINE).all(-1).any() and plain[448:].max() > 200


def test_kept_patches_have_a_row_per_step_and_a_column_per_camera():
    images = {"base": IMAGE, "wrist": IMAGE[::-1].copy()}
    steps = [Shown(images, np.arange(512), "step 0"), Shown(images, np.arange(0, 512, 5), "step 5")]
    figure = kept_patches_figure(steps, 256, "a title")
    assert [ax.get_title() for ax in figure.axes] == ["base", "wrist", "", ""]
    assert [ax.get_xlabel() for ax in figure.axes] == ["256 of 256 kept"] * 2 + ["52 of 256 kept", "51 of 256 kept"]
    assert pixels(figure).std() > 10


@pytest.mark.parametrize(
    ("index", "tokens", "message"),
    [(np.array([512]), 256, "0 to 511"), (np.array([-1]), 256, "0 to 511"), (np.array([0]), 250, "square")],
)
def test_slots_that_no_camera_has_are_refused(index, tokens, message):
    with pytest.raises(ValueError, match=message):
        video_frame({"base": IMAGE, "wrist": IMAGE}, index, tokens, "")


def test_methods_lie_side_by_side_with_all_cameras_and_their_label():
    images = {"base": IMAGE, "wrist": IMAGE}
    shown = [Shown(images, np.arange(512), "full"), *(Shown(images, np.arange(256), f"half {i}") for i in range(3))]
    figure = methods_figure(shown, 256, columns=2)
    assert [ax.get_title() for ax in figure.axes] == ["full", "half 0", "half 1", "half 2"]
    full, half = (ax.images[0].get_array() for ax in figure.axes[:2])
    assert full.shape == half.shape == (448, 896, 3)
    np.testing.assert_array_equal(full[:, :448], half[:, :448])
    assert half[:, 448:].mean() < 0.6 * full[:, 448:].mean()  # the dropped camera is dimmed
    assert pixels(figure).std() > 10


def test_no_steps_is_an_error():
    for draw in (kept_patches_figure, methods_figure):
        with pytest.raises(ValueError, match="at least one"):
            draw([], 256)


def test_the_diagram_stays_inside_its_picture():
    figure = paths_diagram()
    picture = pixels(figure)[..., :3]
    border = np.concatenate([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3), picture[:, :4].reshape(-1, 3)])
    assert (border == 255).all()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 > 0 and box.y0 > 0 and box.x1 < picture.shape[1] and box.y1 < picture.shape[0], text


def test_importing_chooses_no_backend_and_loads_no_pyplot():
    code = f"import sys, {kept.__name__}; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ----------------------------------------------------------------------------------------------------------- saliency


def test_heat_is_brightest_where_saliency_is_highest_and_grey_without_strength():
    image, s = np.full((64, 64, 3), 90, np.uint8), np.zeros((4, 4))
    s[1, 2] = 2.0
    out = heat(image, s)
    brightness = out.astype(int).sum(-1).reshape(4, 16, 4, 16).mean((1, 3))
    assert np.unravel_index(brightness.argmax(), (4, 4)) == (1, 2)
    assert np.ptp(np.delete(brightness.ravel(), 6)) == 0
    np.testing.assert_array_equal(heat(image, s, strength=0.0), image)
    np.testing.assert_array_equal(heat(image, 5 * s), out)
    assert (heat(image, s, peak=20.0)[16:32, 32:48] < out[16:32, 32:48]).any()
    with pytest.raises(ValueError, match="expected an image"):
        heat(image[:32], s)


def test_saliency_rows_share_one_scale_over_cameras():
    images = {"base": IMAGE, "wrist": IMAGE}
    s = np.concatenate([np.full(16, 0.01), np.full(16, 0.05)])
    shown = picture(saliency_figure(images, {"layer 0": s, "layer 1": s[::-1]}, 16, "title"))
    assert shown.mode == "RGB"
    left, right = np.array_split(np.asarray(shown).astype(int)[: shown.height // 2], 2, axis=1)
    red = lambda half: (half[..., 0] - half[..., 2] > 30).mean()  # the brightest colour is yellow
    assert red(right) > 0.3 > 0.05 > red(left)
    with pytest.raises(ValueError, match="32 slots"):
        saliency_figure(images, {"layer 0": s[:-1]}, 16)
    with pytest.raises(ValueError, match="got none"):
        saliency_figure(images, {}, 16)


# -------------------------------------------------------------------------------------------------------- film


def test_a_film_has_a_frame_per_call_and_moves(tmp_path):
    images = {"base": np.full((32, 32, 3), 120, np.uint8), "wrist": np.full((32, 32, 3), 60, np.uint8)}
    shots = [Shot(images, np.arange(32), 32, None, 61.0, True)]
    shots += [Shot(images, np.arange(n), 32, 0.95 - 0.01 * n, 51.0, False) for n in (6, 9)]
    frames = film(shots, 16, threshold=0.81, side=160)
    assert len(frames) == 3 and {frame.size for frame in frames} == {(336, 272)}
    lit = [np.asarray(frame)[:160].mean() for frame in frames]
    assert lit[0] > lit[2] > lit[1]  # as many patches as are kept
    path = tmp_path / "film.webp"
    save(frames, path)
    with Image.open(path) as read:
        assert read.n_frames == 3 and read.info["loop"] == 0
    with pytest.raises(ValueError, match="at least one call"):
        film([], 16, 0.8)


# ------------------------------------------------------------------------------------------------------- theme


def test_looks_of_a_figure_differ_and_a_legend_names_each_line_once():
    looks = [tuple(theme.look(number).items()) for number in range(14)]
    assert len(set(looks)) == 14
    figure, axes = theme.grid(3)
    for ax in axes:
        ax.plot([0, 1], [0, 1], **theme.look(0), label="one")
        ax.plot([0, 1], [1, 0], **theme.look(1), label="two")
    theme.legend(figure, axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    figure.canvas.draw()
    below = figure.legends[0].get_window_extent().y1
    assert all(below <= ax.get_tightbbox().y0 for ax in axes)  # it hides nothing
    assert not figure.axes[3].axison
