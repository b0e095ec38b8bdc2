"""`openpi diagnose`: shares of attention by camera and region, against numbers made by hand and a trace."""

import numpy as np
import pytest
from tiny_policy import request

from safe_pruner_jax.analysis.diagnose import Row, figure, measure, ninths, table, verdict
from safe_pruner_jax.analysis.episodes import Call
from safe_pruner_jax.analysis.trace import Watch
from safe_pruner_jax.cli.main import main

pytestmark = pytest.mark.newest


def row(call, base, wrist):
    """A call that attends to one patch of each camera, upper left of the base and in the middle of the wrist."""
    grids = {"base": np.zeros((6, 6), np.float32), "wrist": np.zeros((6, 6), np.float32)}
    grids["base"][0, 0], grids["wrist"][3, 2] = base, wrist
    return Row(
        call=call,
        cameras={camera: float(grid.sum()) for camera, grid in grids.items()},
        regions={camera: ninths(grid) for camera, grid in grids.items()},
        grids=grids,
        images={camera: np.full((24, 24, 3), 90, np.uint8) for camera in grids},
        prompt="",
    )


def test_shares_are_those_of_a_trace(plain_policy):
    policy = plain_policy
    requests = [request(0, step) for step in range(2)]
    rows = measure(policy, requests, layers=(0, -1))
    late = Watch(policy)([Call(asked, -1.0) for asked in requests]).late("half", "all")[:, [0, 3]].mean(1)
    for told, seen in zip(rows, late, strict=True):
        np.testing.assert_allclose(list(told["cameras"].values()), seen.reshape(2, -1).sum(1), rtol=1e-4)
        for camera, share in told["cameras"].items():
            assert sum(told["regions"][camera]) == pytest.approx(share, rel=1e-5)
    with pytest.raises(ValueError, match=r"layers: expected some between -4 and 3 for 'action', got \(4,\)"):
        measure(policy, requests, layers=(4,))
    with pytest.raises(ValueError, match="expected at least one call"):
        measure(policy, [])


def test_the_table_and_what_it_says_in_words():
    told = table([row(0, 0.4, 0.1), row(1, 0.2, 0.3)])
    assert "| base | 60.0% | 40% – 80% | 30.0% | upper left, 100% |" in told
    assert "| wrist | 40.0% | 20% – 60% | 20.0% | middle, 100% |" in told
    assert "2 calls; 50.0% goes to the prompt and the actions." in told and "No camera is ignored" in told
    assert verdict([row(0, 0.5, 0.01)]).startswith("wrist is nearly ignored: 2.0% of the attention to pictures, 50%")


def test_the_figure_has_a_panel_for_time_regions_and_each_camera():
    drawing = figure([row(call, 0.4, 0.1) for call in range(4)])
    drawing.canvas.draw()
    titles = [ax.get_title() for ax in drawing.axes]
    assert titles[:2] == ["share of attention over the episode", "mean share by region"]
    assert titles[2:] == ["base, mean of 4 calls", "wrist, mean of 4 calls"]


def test_a_file_that_is_no_recording_is_one_line(tmp_path, capsys):
    (tmp_path / "other.episode").write_bytes(b"nothing")
    assert main(["diagnose", str(tmp_path / "other.episode")]) == 2
    assert "expected an episode as `openpi serve --record` writes it" in capsys.readouterr().err
