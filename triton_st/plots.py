"""`training.png`: how loss and Spearman correlation went over the steps. Needs matplotlib, the `plots` extra."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_st.models.files import replacing_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

INK, MUTED, GRID = "#222222", "#6b7280", "#e5e7eb"
TRAINING, VALIDATION, MISSING = "#2563eb", "#0f766e", "#dc2626"
METRIC_COLORS = ["#b45309", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569"]
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
# Panels are no lower than this: noise drawn large looks like news.
LOSS_SPAN, METRIC_SPAN = 0.2, 0.1
SMOOTHED_FROM = 40  # fewer points than this are read well enough as they are
_said_absent = False

Points = list[tuple[float, float]]


def plot_training(log_history: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> bool:
    """Draw the losses (above) and the Spearman correlations (below) of a trainer's log, and save them as an image.

    Values that are not finite leave a gap in their line and a mark at the foot of the panel. The file is written
    beside its name first and then renamed, so that a viewer never meets half a picture.

    Args:
        log_history: Entries as transformers' trainer keeps them: `{"loss", "step", ...}` for training, `{"eval_loss",
            "eval_<name>_spearman_<fn>", "step", ...}` (with or without `eval_`) for evaluation.
        path: Where to save, with the suffix of an image format: `training.png`.

    Returns:
        Whether there is a picture: not without matplotlib (said once, at INFO), and not for a log with nothing to draw.
    """
    global _said_absent
    losses, metrics = _series(log_history)
    if not losses and not metrics:
        return False
    try:
        # The objects alone, never pyplot: it would pick a window system and keep figures in global state.
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        if not _said_absent:
            _said_absent = True
            logger.info("matplotlib is not installed, so no training curves are drawn: pip install 'triton_st[plots]'")
        return False

    path = Path(path)
    with matplotlib.rc_context(STYLE):
        panels = int(bool(losses)) + int(bool(metrics))
        figure = Figure(figsize=(8, 1.2 + 2.6 * panels), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        if losses:
            _draw_losses(axes[0], losses)
        if metrics:
            _draw_metrics(axes[-1], metrics)
        axes[-1].set_xlabel("Step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        steps = {step for points in (*losses.values(), *metrics.values()) for step, _ in points}
        if len(steps) == 1:
            axes[-1].set_xlim(min(steps) - 1, min(steps) + 1)
        with replacing_file(path) as temporary:
            figure.savefig(temporary, format=path.suffix.removeprefix("."), facecolor="white")
    return True


def _series(log_history: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Points], dict[str, Points]]:
    """(step, value) points by name, ordered by step: losses, and Spearman correlations. A step's last entry counts."""
    values: dict[str, dict[float, float]] = {}
    for entry in log_history:
        if entry.get("step") is None:
            continue
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            known = key in ("loss", "eval_loss") or "spearman_" in key
            if known and isinstance(value, (int, float)):
                values.setdefault(key if name == "loss" else name, {})[entry["step"]] = float(value)
    points = {name: sorted(by_step.items()) for name, by_step in values.items()}
    losses: dict[str, Points] = {name: points.pop(name) for name in ("loss", "eval_loss") if name in points}
    return losses, _chosen(points)


def _chosen(metrics: dict[str, Points]) -> dict[str, Points]:
    """One correlation per data set, for ten would be a thicket: of the cosine, else of the maximum, else the first.

    matplotlib hides labels that begin with an underscore, so names are stripped of them.
    """
    by_dataset: dict[str, dict[str, Points]] = {}
    for name, points in metrics.items():
        dataset, _, function = name.rpartition("spearman_")
        by_dataset.setdefault(dataset.strip("_"), {})[function] = points
    chosen = {}
    for dataset, functions in by_dataset.items():
        function = next((each for each in ("cosine", "max") if each in functions), next(iter(functions)))
        chosen[f"{dataset} ({function})" if dataset else function] = functions[function]
    return chosen


def _draw_losses(axes: Axes, losses: dict[str, Points]) -> None:
    axes.set_title("Loss", loc="left", fontsize=11, fontweight="bold")
    axes.margins(x=0.02)
    if "loss" in losses:
        steps, values = zip(*losses["loss"], strict=True)
        if len(values) < SMOOTHED_FROM:
            marker = "o" if len(values) == 1 else None
            axes.plot(steps, values, color=TRAINING, linewidth=1.6, marker=marker, label="training")
        else:
            width = max(5, len(values) // 20)
            axes.plot(steps, values, color=TRAINING, linewidth=1.0, alpha=0.35)
            means = _rolling_mean(values, width)
            axes.plot(steps, means, color=TRAINING, linewidth=1.8, label=f"training (mean of {width})")
    if "eval_loss" in losses:
        steps, values = zip(*losses["eval_loss"], strict=True)
        axes.plot(steps, values, color=VALIDATION, linewidth=1.4, marker="o", markersize=4, label="validation")
    _finish(axes, losses, LOSS_SPAN)


def _draw_metrics(axes: Axes, metrics: dict[str, Points]) -> None:
    axes.set_title("STS Spearman", loc="left", fontsize=11, fontweight="bold")
    axes.margins(x=0.02, y=0.1)
    for position, (name, points) in enumerate(metrics.items()):
        steps, values = zip(*points, strict=True)
        color = METRIC_COLORS[position % len(METRIC_COLORS)]
        # The last value stands in the legend: beside the point it would cover another line's.
        label = f"{name}: {values[-1]:.3f}"
        axes.plot(steps, values, color=color, linewidth=1.6, marker="o", markersize=4, label=label)
    _finish(axes, metrics, METRIC_SPAN)


def _finish(axes: Axes, series: dict[str, Points], span: float) -> None:
    """Widen the panel to `span`, mark the steps whose values are not finite, and add the legend."""
    low, high = axes.get_ylim()
    if high - low < span:
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)
    missing = sorted({step for points in series.values() for step, value in points if not math.isfinite(value)})
    if missing:
        # x in steps, y as a share of the panel: such a mark has no value to stand at.
        transform = axes.get_xaxis_transform()
        feet = [0.03] * len(missing)
        axes.plot(
            missing, feet, "x", color=MISSING, markersize=5, transform=transform, clip_on=False, label="not finite"
        )
    entries = len(axes.get_legend_handles_labels()[0])
    columns = entries if entries <= 3 else 2
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, borderaxespad=0.2)


def _rolling_mean(values: tuple[float, ...], width: int) -> list[float]:
    """Mean of the last `width` finite values; NaN where the value itself is not finite."""
    means: list[float] = []
    window: list[float] = []
    for value in values:
        if math.isfinite(value):
            window = [*window, value][-width:]
        means.append(sum(window) / len(window) if math.isfinite(value) else math.nan)
    return means
