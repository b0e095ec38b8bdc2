"""Analyses: measures agree with slow loops, laws at their limits, rows that survive interruptions."""

import dataclasses
import json

import numpy as np
import pytest
from demonstrations import demo
from tiny_policy import moving_scene
from toy_traces import synthetic

from safe_pruner_jax.analysis import attention, calibrate, cost, forecast, kappa, measures, recall
from safe_pruner_jax.analysis.rows import Rows, RowsError, read_rows
from safe_pruner_jax.analysis.trace import Watch
from safe_pruner_jax.cli import analyze
from safe_pruner_jax.cli import main as cli
from safe_pruner_jax.engine.flops import paper_flops
from safe_pruner_jax.figures.theme import markdown
from safe_pruner_jax.libero.demonstrations import write_demos
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import PRUNERS

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def policy(plain_policy):
    return plain_policy


@pytest.fixture(scope="module")
def watched(policy):
    return Watch(policy)(moving_scene())


# ------------------------------------------------------------------------------------------------------------ measures


def test_top_is_a_sort_with_ties_to_the_lower_index():
    rng = np.random.default_rng(1)
    s, alive = rng.integers(0, 4, (3, 12)).astype(float), rng.random(12) < 0.7
    for share in (0.1, 0.5, 1.0):
        k = max(1, round(share * int(alive.sum())))
        for row, chosen in zip(s, measures.top(s, alive, share), strict=True):
            order = sorted(np.flatnonzero(alive), key=lambda v: (-row[v], v))[:k]
            assert sorted(np.flatnonzero(chosen)) == sorted(order)


def test_loss_rate_counts_core_tokens_that_are_dropped():
    core = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    assert measures.loss_rate(core, np.array([1, 0, 1, 1], bool)).tolist() == [0.5, 0.0]


def test_divergence_and_cosine_against_loops():
    rng = np.random.default_rng(2)
    p, q = rng.random(9), rng.random(9)
    p[3] = 0
    a, b = p / p.sum(), q / q.sum()
    assert measures.divergence(p, q) == pytest.approx(sum(x * np.log(x / y) for x, y in zip(a, b, strict=True) if x))
    assert measures.divergence(q, 3 * q) == pytest.approx(0, abs=1e-12)
    assert np.isfinite(measures.divergence(q, p))
    assert measures.cosine(p, q) == pytest.approx(p @ q / np.linalg.norm(p) / np.linalg.norm(q))
    assert np.isnan(measures.cosine(p, np.zeros(9)))


def test_separation_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(3)
    within, across = rng.integers(0, 6, 30), rng.integers(0, 6, 20)
    slow = np.mean([(a < w) + 0.5 * (a == w) for a in across for w in within])
    assert measures.separation(within, across) == pytest.approx(slow)
    assert measures.separation(np.array([0.9, 1.0]), np.array([0.1])) == 1
    assert measures.separation(np.array([]), across) is None


def test_a_forecast_follows_tokens_that_move():
    trace = synthetic(still=True, shift=3)
    match = measures.Matches(trace)
    for t in range(1, len(trace)):
        np.testing.assert_array_equal(match(t, 0), (np.arange(16) - 3 * t) % 16)
        np.testing.assert_allclose(match.forecast(trace.text[0, 1], t, 0), trace.text[t, 1])


# -------------------------------------------------------------------------------------------------- recall (Fig. 2b)


def test_recall_against_a_loop():
    trace, keep = synthetic(calls=9, seed=4), 0.25
    rows = recall.measure(trace, cut=2, late_layers=(0, -1), keeps=(keep,), fuses=(0.0, 0.5), core=0.2, every=3)
    late, reference = trace.late(), measures.references(trace.subtask, 3)
    best = lambda s, k: set(sorted(range(16), key=lambda v: (-s[v], v))[:k])
    losses = []
    for t in range(9):
        tau = int(reference[t])
        if tau == t:
            continue
        unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
        pi = (unit(trace.visual[t]) @ unit(trace.visual[tau]).T).argmax(-1)
        score = 0.5 * trace.text[t, 1] + 0.5 * (late[tau, 0][pi] + late[tau, -1][pi]) / 2
        losses += [len(best(late[t, l], 3) - best(score, 4)) / 3 for l in (2, 3, 4)]
    (row,) = [r for r in rows if (r["score"], r["queries"], r["fuse"]) == ("fused", "text", 0.5)]
    assert row["loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert row["calls"] == len(losses) // 3 and np.mean(row["loss_by_layer"]) == pytest.approx(row["loss"], abs=1e-5)
    (row,) = [r for r in rows if r["score"] == "random"]
    assert row["loss"] == 1 - 4 / 16


def test_recall_at_its_limits():
    trace = synthetic(still=True, shift=2)
    rows = recall.measure(trace, cut=1, keeps=(0.1, 0.5, 1.0))
    by = {(r["score"], r["queries"], r["fuse"], r["keep"]): r["loss"] for r in rows}
    assert all(loss == 0 for (*_, keep), loss in by.items() if keep == 1.0)
    for *name, _ in by:
        assert by[*name, 0.1] >= by[*name, 0.5]
    # where nothing changes but places, the forecast is the truth
    assert by["fused", "text", 1.0, 0.5] == by["truth", None, None, 0.5] < by["same slot", None, None, 0.5]
    with pytest.raises(ValueError, match="cut: expected a layer index from 1 to 4"):
        recall.measure(trace, cut=5)


# ----------------------------------------------------------------------------------------- forecast and κ (Fig. A, 3)


def test_forecasts_of_a_moving_still_life_are_exact_and_of_noise_are_not():
    for row in forecast.measure(synthetic(still=True, shift=1), cut=2):
        if row["quantity"] == forecast.UNMATCHED:
            assert max(row["cosine"]) < 0.99
            continue
        assert row["cosine"] == pytest.approx([1.0] * row["pairs"]) and row["kl"] == pytest.approx([0.0] * row["pairs"])
    noise = forecast.measure(synthetic(), cut=2, ages=4)
    assert max(c for row in noise for c in row["cosine"]) < 0.999
    pairs = sum(row["pairs"] for row in noise if row["quantity"] == forecast.LATE)
    assert pairs == sum(min(t, 4) for t in range(12))
    within = sum(row["pairs"] for row in noise if row["quantity"] == forecast.LATE and row["within"])
    assert within == 2 * sum(min(t, 4) for t in range(6))  # two subtasks of six calls
    first = forecast.measure(synthetic(), cut=2, ages=4, references="first")
    assert [(r["age"], r["pairs"]) for r in first if r["quantity"] == forecast.LATE] == [(a, 1) for a in (1, 2, 3, 4)]


def test_a_soft_forecast_is_between_the_matched_token_and_the_mean():
    trace = synthetic(still=True, shift=1)
    rows = lambda soft, of: {
        (r["age"], r["within"]): r["cosine"] for r in forecast.measure(trace, cut=2, soft=soft) if r["quantity"] == of
    }
    cold, warm, hard = rows(1e-3, forecast.LATE), rows(0.3, forecast.LATE), rows(0.3, forecast.HARD)
    assert cold.keys() == warm.keys() == hard.keys() and not rows(0, forecast.HARD)
    for pair, values in cold.items():
        assert values == pytest.approx([1.0] * len(values), abs=1e-4) and max(warm[pair]) < 0.999
        assert hard[pair] == pytest.approx(values, abs=1e-4)
    s, mean = trace.late()[0], trace.late()[0].mean(-1, keepdims=True)
    np.testing.assert_allclose(measures.Matches(trace, soft=1e6).forecast(s, 3, 0), mean.repeat(16, -1), rtol=1e-4)
    lost = lambda soft: [r["loss"] for r in recall.measure(trace, cut=1, keeps=(0.3,), soft=soft)]
    assert lost(1e-3) == lost(0) != lost(0.3)
    with pytest.raises(ValueError, match=r"soft: expected a temperature of at least 0, got -0\.1"):
        forecast.measure(trace, cut=2, soft=-0.1)


def test_attention_is_counted_in_tokens():
    uniform, one = np.ones(8) / 8, np.eye(8)[2]
    np.testing.assert_allclose(attention.effective(np.stack([uniform, one, np.repeat([0.5, 0], [2, 6])])), [8, 1, 2])
    np.testing.assert_allclose(attention.effective(3 * uniform), 8)  # whatever it sums to
    trace = synthetic()
    narrow = np.zeros_like(trace.text)
    narrow[..., 0] = 1.0  # one token of the first camera has it all
    rows = [{"part": "a"} | row for row in attention.measure(dataclasses.replace(trace, text=narrow))]
    prompt = attention.medians(rows, "prompt")
    assert all(share == pytest.approx(1 / trace.alive[0].sum()) and outside == 1 for share, outside in prompt.values())
    action = attention.medians(rows, "action")
    assert all(0.5 < share < 1 for share, _ in action.values()) and len(action) == len(prompt) + 1
    assert "| 4 | – | – | – |" in attention.table(rows)  # the last layer of the language model has no rows
    assert attention.figure(rows).axes[0].get_lines()[0].get_ydata()[0] == prompt[0][0]


def test_kappa_rows_tell_keyframes_references_and_boundaries(watched):
    rows = kappa.measure(watched, cut=2, threshold=-1.0)
    free = [r["kappa"] for r in rows if r["queries"] == "text"]
    gamma = (min(free[1:]) + max(free[1:])) / 2
    rows = [r for r in kappa.measure(watched, cut=2, threshold=gamma) if r["queries"] == "text"]
    assert [r["call"] for r in rows] == list(range(len(watched)))
    assert rows[0]["kappa"] is None and rows[0]["keyframe"] and rows[0]["reference"] is None
    last = 0
    for row in rows[1:]:
        assert row["keyframe"] == (row["kappa"] < gamma) and row["reference"] == last
        last = row["call"] if row["keyframe"] else last
    assert [r["call"] for r in rows if r["boundary"]] == [5] and rows[5]["keyframe"]
    own = [{"part": "a"} | r for r in rows]
    assert kappa.caught(own) == (1, 1)
    assert kappa.caught([r | {"keyframe": r["keyframe"] and r["call"] != 5} for r in own], slack=0) == (0, 1)


# ----------------------------------------------------------------------------------------------------------- calibrate


def test_calibration_takes_the_lowest_loss_and_the_quantile():
    rng = np.random.default_rng(5)
    losses = {("action", 0.0): 0.4, ("text", 0.0): 0.3, ("text", 0.5): 0.1, ("last", 0.5): 0.2}
    recalls = [
        {"part": "a", "score": "fused", "queries": q, "fuse": f, "keep": 0.2, "calls": 5, "loss": loss}
        for (q, f), loss in losses.items()
    ]
    within = {q: rng.uniform(0.8, 1, 200).tolist() for q in recall.QUERIES}
    side = lambda q, inside, values: {"quantity": f"shallow {q}", "age": 1, "within": inside, "cosine": values}
    forecasts = [side(q, True, v) for q, v in within.items()] + [side(q, False, [0.5, 0.99]) for q in within]
    proposal = calibrate.propose(recalls, forecasts, keep=0.2, share=0.1)
    choices = proposal["choices"]
    assert (choices["queries"], choices["fuse"]) == ("text", 0.5)
    assert np.mean(np.array(within["text"]) < choices["threshold"]) == pytest.approx(0.1, abs=0.01)
    assert proposal["candidates"][0]["caught"] == 0.5
    assert PRUNERS["safe"](**choices).name == "safe"
    assert "--pruner.queries text --pruner.fuse 0.5" in calibrate.table(proposal)
    with pytest.raises(ValueError, match="one of the measured"):
        calibrate.propose(recalls, forecasts, keep=0.3)
    with pytest.raises(ValueError, match="share: expected"):
        calibrate.gammas(forecasts, 1.5)


def test_equal_losses_are_decided_by_what_kappa_knows():
    base = {"part": "a", "score": "fused", "fuse": 1.0, "keep": 0.2, "calls": 5, "loss": 0.3}
    recalls = [base | {"queries": q} for q in recall.QUERIES]
    side = lambda q, inside, v: {"quantity": f"shallow {q}", "age": 1, "within": inside, "cosine": v}
    forecasts = [side(q, True, [0.9, 0.95]) for q in recall.QUERIES]
    forecasts += [side("action", False, [0.96]), side("text", False, [0.93]), side("last", False, [0.1])]
    assert calibrate.propose(recalls, forecasts)["choices"]["queries"] == "last"


# ---------------------------------------------------------------------------------------------------------------- cost


def test_cost_is_the_papers_form_and_a_ratio_of_interleaved_times(policy):
    config = policy.engine.config
    example, _ = policy.transform.prepare(moving_scene()[0].request)
    now, durations = [0.0], []

    def clock() -> float:  # every second call ends a step: the full one takes 4 s, the pruned one 2 s
        durations.append(None)
        if len(durations) % 2 == 0:
            now[0] += 4.0 if len(durations) % 4 == 2 else 2.0
        return now[0]

    weights = policy.engine.weights
    (row,) = cost.measure(weights, config, example, keeps=(0.25,), cut=2, rounds=3, clock=clock)
    assert (row["speedup"], row["low"], row["high"], row["ms"], row["full_ms"]) == (2, 2, 2, 2000, 4000)
    assert (row["kept"], row["alive"]) == (8, 32)
    text = 16
    c = config.prefix
    paper = paper_flops([32 + text] * 2 + [8 + text] * 2, c.width, c.mlp_dim)
    assert row["paper"] == paper and row["paper_speedup"] == paper_flops([48] * 4, c.width, c.mlp_dim) / paper
    assert len(durations) == 2 * 2 * (cost.WARM_UP + 3)


# ---------------------------------------------------------------------------------------------------- rows, commands


def test_rows_go_on_after_a_torn_line_and_refuse_other_conditions(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    with Rows(path, {"cut": 3, "layers": (0, -1)}) as rows:
        rows.add("a", [{"x": 1}, {"x": 2}])
        rows.add("b", [{"x": 3}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])  # b is torn
    with Rows(path, {"cut": 3, "layers": [0, -1]}) as rows:
        assert rows.finished == {"a"}
        rows.add("b", [{"x": 3}])
    assert path.read_bytes() == whole
    assert read_rows(path) == [{"part": "a", "x": 1}, {"part": "a", "x": 2}, {"part": "b", "x": 3}]
    with pytest.raises(RowsError, match="the same cut"):
        Rows(path, {"cut": 2, "layers": [0, -1]})
    path.write_text('{"suite": "libero_object"}\n')
    with pytest.raises(RowsError, match="expected rows of an analysis"):
        Rows(path, {"cut": 3})
    assert markdown(["a", "b"], [["x", None]]) == "| a | b |\n| --- | ---: |\n| x | – |\n"


def test_every_analysis_of_episodes_leaves_rows_table_and_figure_and_resumes(policy, tmp_path, capsys, monkeypatch):
    write_demos(tmp_path / "butter_demo.hdf5", [demo(seed=s, steps=14, side=56, every=2) for s in range(2)])
    own = {"data": (str(tmp_path / "butter_demo.hdf5"),), "out": tmp_path / "out", "cut": 2, "soft": 0.1}
    loads = []

    def load() -> Policy:
        loads.append(1)
        return policy

    about = {"policy": "tiny"}
    monkeypatch.setattr(analyze, "Watch", lambda _: shared)
    shared = Watch(policy)
    analyze.run_calibrate(analyze.Calibrate(**own), load, about)
    assert loads == [1]
    written = json.loads((tmp_path / "out" / "calibrate.json").read_text())
    assert written["episodes"] == 2
    assert (written["choices"]["cut"], written["choices"]["soft"]) == (2, 0.1), "what γ and λ were measured with"
    assert "late_layers" not in written["choices"], "those are the defaults of `safe`"
    analyze.run_recall(analyze.Recall(**own), load, about)
    analyze.run_forecast(analyze.Forecast(**own), load, about)
    assert loads == [1]  # calibrate had measured both
    analyze.run_kappa(analyze.Kappa(**own, limit=1), load, about)
    assert loads == [1, 1]
    for name in ("recall", "forecast", "kappa", "calibrate"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / "out" / f"{name}.md").read_text().startswith("| ")
    assert {r["part"] for r in read_rows(tmp_path / "out" / "kappa.jsonl")} == {f"{tmp_path.name}/butter_demo#0"}
    text = capsys.readouterr().out
    assert "Proposed: `--pruner=safe --pruner.queries" in text
    with pytest.raises(RowsError, match="core"):
        analyze.run_recall(analyze.Recall(**own, core=0.2), load, about)
    twice = dataclasses.replace(analyze.Kappa(**own), data=own["data"] * 2)
    with pytest.raises(ValueError, match="every episode once"):
        analyze.run_kappa(twice, load, about)


def test_the_command_line_counts_cost_and_says_what_is_wrong(tmp_path, capsys):
    out = ["--out", str(tmp_path), "policy:embedded"]
    assert cli.main(["analyze", "cost", "--rounds", "0", "--cuts", "0", "1", "3", "99", *out]) == 0
    text = capsys.readouterr().out
    assert text.count("| 0 |") == text.count("| 1 |") == text.count("| 3 |") == 4 and "| 99 |" not in text
    assert (tmp_path / "cost.png").exists()
    for argv, word in {
        ("kappa", "--data", str(tmp_path / "none.hdf5"), *out): "none.hdf5",
        ("recall", "--data", "libero:nowhere", *out): "expected libero:SUITE",
    }.items():
        assert cli.main(["analyze", *argv]) == 2
        assert word in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["analyze"]) == 2 and cli.main(["analyze", "recal"]) == 2
