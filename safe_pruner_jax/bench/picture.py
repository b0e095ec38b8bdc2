"""A report of `openpi bench` as a table and as stacked bars."""

from typing import Any

from matplotlib.figure import Figure

from safe_pruner_jax.bench.modes import PHASES
from safe_pruner_jax.figures.theme import form, markdown, panels

COLOURS = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#767d85", "#c9cdd2")


def table(report: dict[str, Any]) -> str:
    """Conditions, one row per mode, and where the time of each goes."""
    m, base = report["machine"], report["baseline"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    limits = report["limits"]
    head = (
        f"{report['model']}, {report['depth']} layers, {report['dtype']}, {report['views']} views, "
        f"{report['prompt_tokens']} prompt tokens in "
        f"{report['layout']['text']} slots, {report['num_steps']} denoise steps, "
        f"{report['rounds']} runs after warm-up; "
        f"{m['device']} ({m['cpu']}, {m['cores']} cores), python {m['python']}, {versions}; best product "
        f"{2 * limits['macs_per_s'] / 1e9:.0f} GFLOP/s, best copy {limits['bytes_per_s'] / 1e9:.1f} GB/s. "
        f"Baseline: {base}.\n\n"
    )
    lines = []
    for name, row in report["modes"].items():
        ms = row["ms"]
        ratios = [row[f"times_{to.replace(' ', '_')}"] for to in (base, "full")]
        lines.append(
            [
                name + (" *" if row["disturbed"] else ""),
                f"{ms['median']:.1f} ({ms['low']:.1f}–{ms['high']:.1f})",
                *(f"{r['median']:.2f}×" for r in ratios),
                form(row.get("robots_per_s"), "{:.2f}"),
                form(row["macs"]["total"] / 1e9 if "macs" in row else None, "{:.4g}"),
                form(row.get("roofline_share"), "{:.0%}"),
                form(row["peak_bytes"] / report["weights_bytes"] if row.get("peak_bytes") else None, "{:.2f}×"),
            ]
        )
    columns = ["mode", "ms, median (quartiles)", f"faster than {base}", "than full", "robots/s", "10⁹ multiply-adds"]
    text = head + markdown([*columns, "of the roofline", "peak memory / weights"], lines)
    phased = {name: row["phases_ms"] for name, row in report["modes"].items() if row.get("phases_ms")}
    if phased:
        rows = [[name, *(f"{phases[p]['median']:.1f}" for p in PHASES)] for name, phases in phased.items()]
        text += "\n" + markdown(["mode, ms", *PHASES], rows)
    return text


def bars(report: dict[str, Any]) -> Figure:
    """One horizontal bar per mode, stacked by phase; modes without phases are plain."""
    modes = list(report["modes"].items())
    figure, axes = panels(1, width=8.0, height=0.9 + 0.42 * len(modes))
    ax, drawn = axes[0, 0], set()
    for place, (_, row) in enumerate(modes):
        phases, left = row.get("phases_ms") or {}, 0.0
        total = row["ms"]["median"]
        for phase, colour in zip(PHASES, COLOURS, strict=True):
            if phase in phases and (width := max(phases[phase]["median"], 0.0)):
                ax.barh(place, width, left=left, color=colour, height=0.7, label=None if phase in drawn else phase)
                drawn.add(phase)
                left += width
        if not phases:
            ax.barh(place, total, color="#b8bdc4", height=0.7)
        ratio = row[f"times_{report['baseline'].replace(' ', '_')}"]["median"]
        ax.text(max(total, left), place, f" {total:.0f} ms, {ratio:.2f}×", va="center", fontsize=8)
    ax.set_yticks(range(len(modes)), [name for name, _ in modes], fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.18)
    ax.set(xlabel=f"ms per control step; × faster than {report['baseline']}")
    if drawn:
        figure.legend(fontsize=8, frameon=False, ncols=len(drawn), loc="outside lower center")
    return figure
