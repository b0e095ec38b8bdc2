"""Intervals against published values, and what the tables compare with what."""

import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_records import CONFIGURATION, FULL, group, record

from safe_pruner_jax.evaluation.figures import report_figures, short_names, success_by_flops, success_by_keep
from safe_pruner_jax.evaluation.report import (
    ALL,
    markdown,
    method_label,
    paired_difference,
    summarise,
    table_csv,
    typical_ms,
    wilson,
)
from safe_pruner_jax.evaluation.tables import beside, brief, by_share, effort, points
from safe_pruner_jax.figures.theme import QUIET
from safe_pruner_jax.pruners import safe

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(
    ("x", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_newcombes_table(x, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    e = wilson(x, n)
    assert (e.value, round(e.low, 4), round(e.high, 4)) == (x / n, low, high)
    mirrored = wilson(n - x, n)
    assert mirrored.low == pytest.approx(1 - e.high) and mirrored.high == pytest.approx(1 - e.low)


@pytest.mark.parametrize(("x", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses_counts_that_cannot_be(x, n):
    with pytest.raises(ValueError, match="0 ≤ successes ≤ n"):
        wilson(x, n)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998, Statistics in Medicine 17:2635, method 10
        ((54, 0, 0, 0), -0.0664, 0.0664),
        ((1, 1, 7, 12), -0.507, -0.026),  # Bentur et al. 2009, as in Fagerland et al. 2014
    ],
)
def test_paired_difference_against_published_values(table, low, high):
    e = paired_difference(*table)
    digits = 3 if abs(low) > 0.5 else 4
    assert (round(e.low, digits), round(e.high, digits)) == (low, high)
    both, first, second, neither = table
    swapped = paired_difference(both, second, first, neither)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-e.value, -e.high, -e.low))


def test_paired_difference_covers():
    """95 % of the intervals of correlated pairs contain the true difference, within what 2000 draws can tell."""
    rng, hits = np.random.default_rng(0), 0
    shares = np.array([0.7, 0.12, 0.08, 0.1])
    for counts in rng.multinomial(60, shares, size=2000):
        e = paired_difference(*map(int, counts))
        hits += e.low <= 0.04 <= e.high
    assert 0.94 <= hits / 2000 <= 0.985


def test_rows_pair_by_episode_and_leave_errors_out():
    base = group(FULL, 8, keyframes=22, kept=512.0, paper_flops=4e9, exact_flops=5e9, device="cpu")
    ours = group(CONFIGURATION, 6)
    ours[0] = record(0, "error")
    ours[9] = record(9, "error")
    first, second = summarise(ours + base)
    assert (first.method, first.keep, first.episodes, first.errors, first.difference) == ("full", 1.0, 10, 0, None)
    assert (second.keep, second.episodes, second.errors, second.pairs) == (0.2, 10, 2, 8)
    assert second.success == wilson(5, 8)
    assert second.difference == paired_difference(5, 0, 2, 1)  # 1-5 both, 6-7 the baseline alone, 8 neither
    assert second.paper_ratio == pytest.approx(0.25) and second.exact_ratio == pytest.approx(0.4)
    assert second.keyframes == pytest.approx(2 / 22) and second.kept == 139.5


def test_the_share_is_the_one_that_was_asked_for_and_not_the_first_cuts():
    several = {"cut": {"layer": 2, "keep": 0.47}, "later": [{"layer": 4, "keep": 0.3}]}
    share = lambda pruner, choices, plan=several: (
        summarise(
            group(FULL, 1) + group(dataclasses.replace(CONFIGURATION, pruner=pruner, choices=choices, plan=plan), 1)
        )[1].keep
    )
    assert share("sparsevlm", {"keep": 0.3}) == 0.3
    assert share("sparsevlm", {}) == 0.2
    assert share("of another package", {}) == 0.47
    assert share("divprune", {"keep": 64}, {"cut": {"layer": 0, "keep": 64}}) == 64 / 512


def test_labels_show_what_is_not_the_default():
    choices = {"keep": 0.5, "fuse": 0.0, "cut": 3, "late_layers": None, "every": 8}
    assert method_label({"pruner": "safe", "choices": choices}) == "safe fuse=0.0 every=8"
    assert method_label({"pruner": "specprune", "choices": {"translation": [0, 1, 2]}}) == "specprune"
    assert method_label({"pruner": "mine", "choices": {"a": 1}}) == "mine a=1"
    assert safe(keep=0.5).name == "safe"


def test_latency_ratio_needs_one_device():
    assert typical_ms(record()) == pytest.approx((2 * 20 + 20 * 10) / 22)
    assert typical_ms(record(infer_ms={"keyframe": None, "pruned": None})) is None
    assert typical_ms(record(calls=0, keyframes=0)) is None
    base = group(FULL, 8, keyframes=22)
    here, there = (summarise(base + group(CONFIGURATION, 6, device=d))[1].ms_ratio for d in ("cpu", "gpu"))
    assert here == pytest.approx((2 * 20 + 20 * 10) / 22 / 20) and there is None


def test_other_conditions_are_another_table():
    other = dataclasses.replace(CONFIGURATION, checkpoint="another")
    rows = summarise(group(FULL, 8) + group(CONFIGURATION, 6) + group(other, 6))
    assert [row.pairs for row in rows] == [0, 10, 0]
    text = markdown(rows)
    assert text.count("| method |") == 2 and "checkpoint another" in text
    assert len(report_figures(rows)) == 6
    with pytest.raises(ValueError, match="equal conditions"):
        success_by_keep(rows)


def test_suites_and_all_of_them():
    rows = summarise(group(FULL, 8) + group(FULL, 2, suite="libero_goal"))
    assert [(row.suite, row.episodes) for row in rows] == [("libero_goal", 10), ("libero_object", 10), (ALL, 20)]
    assert rows[-1].success == wilson(10, 20)


def test_suites_are_grouped_by_perturbation():
    suites = ("libero_object_temp_x0.1", "libero_object_swap", "libero_goal", "libero_object_lan", "libero_object")
    rows = summarise([r for suite in suites for r in group(CONFIGURATION, 6, suite=suite)])
    assert [(row.suite, row.episodes) for row in rows] == [
        ("libero_goal", 10),
        ("libero_object", 10),
        ("all: standard", 20),
        ("libero_object_lan", 10),
        ("libero_object_swap", 10),
        ("libero_object_temp_x0.1", 10),
        ("all: position", 20),
        (ALL, 50),
    ]


def test_baseline_by_label():
    records = group(CONFIGURATION, 6)
    assert summarise(records)[0].difference is None
    assert summarise(records + group(FULL, 8), "safe late_layers=[0, -1]")[1].difference is not None
    with pytest.raises(ValueError, match=r"baseline: expected one of safe late_layers=\[0, -1\], got 'fulll'"):
        summarise(records, "fulll")
    with pytest.raises(ValueError, match="no records"):
        summarise([])


def test_a_baseline_of_several_ratios_is_compared_at_the_same_ratio():
    half = dataclasses.replace(CONFIGURATION, plan={"cut": {"layer": 3, "keep": 0.5}}, choices={"keep": 0.5})
    fifth = dataclasses.replace(CONFIGURATION, choices={"keep": 0.2})
    peers = [dataclasses.replace(c, pruner="fastv") for c in (half, fifth)]
    played = group(FULL, 10) + group(half, 9) + group(fifth, 6) + group(peers[0], 8) + group(peers[1], 2)
    found = {(row.method, row.keep): row for row in summarise(played, "safe")}
    assert found["fastv", 0.5].difference == paired_difference(8, 0, 1, 1)
    assert found["fastv", 0.2].difference == paired_difference(2, 0, 4, 4)
    assert all(found["safe", keep].difference is None for keep in (0.5, 0.2))
    assert found["full", 1.0].difference is None and found["full", 1.0].pairs == 0


def test_a_pruners_name_is_a_baseline_unless_there_are_several_variants():
    variants = [dataclasses.replace(CONFIGURATION, choices={"keep": 0.2, "fuse": fuse}) for fuse in (0.0, 1.0)]
    rows = summarise(group(variants[0], 6) + group(FULL, 8), "safe")
    assert [row.difference is None for row in rows] == [True, False] and rows[0].method == "safe fuse=0.0"
    with pytest.raises(ValueError, match=r"expected one of safe fuse=0\.0, safe fuse=1\.0, got 'safe'"):
        summarise(group(variants[0], 6) + group(variants[1], 6), "safe")


def test_episodes_that_all_end_in_errors_have_no_rate():
    nothing = {"calls": 0, "keyframes": 0, "kept": None, "alive": None, "paper_flops": None, "exact_flops": None}
    nothing["infer_ms"] = {"keyframe": None, "pruned": None}
    rows = summarise([record(k, "error", **nothing) for k in range(3)] + group(FULL, 8))
    assert rows[1].success is None and rows[1].errors == rows[1].episodes == 3
    assert "| 3 | 3 | – | – | – |" in markdown(rows)
    report_figures(rows)


def test_markdown_and_csv_say_the_same():
    rows = summarise(group(FULL, 8, keyframes=22) + group(CONFIGURATION, 6))
    cells = [line.strip("| ").split(" | ") for line in markdown(rows).splitlines() if line.startswith("|")]
    assert len({len(line) for line in cells}) == 1
    assert cells[3][:6] == ["safe late_layers=[0, -1]", "20 %", "libero_object", "10", "0", "60.0 [31.3, 83.2] %"]
    assert cells[3][6].startswith("-20.0 [") and cells[3][7] == "10"
    read = list(csv.DictReader(io.StringIO(table_csv(rows))))
    assert read[1]["checkpoint"] == "0123456789ab" and float(read[1]["success"]) == 0.6
    assert float(read[1]["difference_low"]) == pytest.approx(rows[1].difference.low)


def test_a_method_that_hardly_prunes_is_pointed_out():
    told = lambda keyframes: markdown(
        summarise(group(FULL, 8, keyframes=22) + group(CONFIGURATION, 6, keyframes=keyframes))
    )
    assert "keep 0.2, libero_object: 91% of the calls were keyframes" in told(20)
    assert "calibrate" not in told(2)


def test_figures_show_every_method_with_its_interval():
    rows = summarise(group(FULL, 8) + group(CONFIGURATION, 6))
    for figure in (success_by_keep(rows), success_by_flops(rows), success_by_flops(rows, exact=False)):
        (ax,) = figure.axes
        names = ["full", "safe late_layers=[0, -1]"]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == names
        assert [line.get_label() for line in ax.get_lines()] == names and len(ax.collections) == 2
    with pytest.raises(ValueError, match="at least one"):
        success_by_keep([])


def test_many_methods_have_a_panel_each_with_the_others_behind():
    choices = [{"fuse": fuse} for fuse in (0.0, 0.25, 0.5, 0.75)]
    plain = CONFIGURATION.as_json()
    safes = [group(type(CONFIGURATION)(**plain | {"choices": plain["choices"] | own}), 6) for own in choices]
    figure = success_by_keep(summarise(sum(safes, group(FULL, 8))))
    shown = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title() for ax in shown] == ["full", *(f"safe fuse={own['fuse']}" for own in choices)]
    for ax in shown:
        *behind, own = ax.get_lines()
        assert len(behind) == 4 and {line.get_color() for line in behind} == {QUIET} and own.get_color() != QUIET


def test_a_legend_says_what_the_variants_of_a_method_differ_in():
    names = ["full", "safe pool=1.5 fuse=0.0", "safe pool=1.5", "safe pool=1.5 every=10", "fastv cut=2"]
    assert list(short_names(names).values()) == ["full", "safe fuse=0.0", "safe", "safe every=10", "fastv cut=2"]
    layers = ["safe late_layers=[0, -1] pool=2", "safe late_layers=[1, -1] pool=2", "safe pool=2 rtc"]
    assert list(short_names(layers).values()) == ["safe late_layers=[0, -1]", "safe late_layers=[1, -1]", "safe rtc"]


def test_a_page_has_methods_beside_each_other(tmp_path):
    """Solved of what was played, differences over the episodes that both have, costs over all calls."""
    suites = {"usual": tmp_path / "usual", "swapped": tmp_path / "swapped"}
    cheap = {"exact_flops": 1.5e9, "kept": 26.0}
    for folder, wins in (("usual", 2), ("swapped", 4)):
        (tmp_path / folder).mkdir()
        methods = {"full": group(FULL, 8, suite=folder), "safe": group(CONFIGURATION, wins, suite=folder, **cheap)}
        methods |= {"few": group(CONFIGURATION, 1, 1, suite=folder)} if folder == "swapped" else {}
        for name, records in methods.items():
            lines = [json.dumps(dataclasses.asdict(r)) + "\n" for r in records]
            (tmp_path / folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    text = beside({"full": "`full`", "safe": "ours", "few": "other"}, suites, against="safe")
    full, ours, few = (re.split(r" \| ", line.strip("| ")) for line in text.splitlines()[2:])
    assert full[:5] == ["`full`", "8/10", "–", "8/10", "–"]
    low = paired_difference(2, 0, 6, 2)
    assert ours[:3] == ["ours", "2/10", points(low)] and ours[3] == "4/10" and low.value == -0.6
    assert ours[5:] == ["–", "–", "0.75"] and full[5:] == [points(paired_difference(6, 10, 0, 4)), "0.002", "1.00"]
    assert few[1:4] == ["–", "–", "1/1"] and few[5].startswith("0 [") and few[6] == "1"
    assert brief({"safe": "ours", "few": "other"}, suites).splitlines()[-1].startswith("| other | – | 1/1, 0 [")
    spent = effort({"full": "`full`", "safe": "ours"}, suites).splitlines()[-1]
    assert re.split(r" \| ", spent.strip("| ")) == ["ours", "26", "9%", "110", "–", "1.00", "0.75"]
    (tmp_path / "usual" / "safe.jsonl").rename(tmp_path / "usual" / "safe-keep0.2.jsonl")
    shares = by_share({"safe": "ours"}, tmp_path / "usual", (0.2, 0.05)).splitlines()
    assert [re.split(r" \| ", line.strip("| ")) for line in (shares[0], shares[2])] == [
        ["method", "20%", "5%"],
        ["ours", "2/10 (0.75)", "–"],
    ]
    with pytest.raises(ValueError, match=r"expected other-keep0\.2\.jsonl or another share, got none"):
        by_share({"other": "theirs"}, tmp_path / "usual", (0.2, 0.05))
    with pytest.raises(ValueError, match=r"expected none\.jsonl in one of the folders"):
        beside({"none": "nobody"}, suites, against="safe")
    with pytest.raises(ValueError, match=r"expected full\.jsonl in each, got none for new"):
        beside({"safe": "ours"}, suites | {"new": tmp_path / "new"}, against="safe")


def test_the_pages_have_the_tables_of_the_records():
    """README and docs/results.md say what benchmarks/results says; scripts/make_tables.py writes them."""
    script = Path(__file__).parents[1] / "scripts" / "make_tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
