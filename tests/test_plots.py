"""The training curves: which lines are drawn from a log, and what happens with gaps, and without matplotlib."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from triton_st import plots
from triton_st.plots import plot_training

matplotlib = pytest.importorskip("matplotlib")


def log(steps: int = 60, every: int = 20) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            entries.append(
                {"loss": 5.0 - step / 50, "learning_rate": 1e-3, "grad_norm": 1.0, "epoch": 0.5, "step": step}
            )
        if step % every == 0:
            metrics = {f"eval_sts-{split}_{kind}_{fn}": step / 100 for split in ("dev", "test")
                       for kind in ("pearson", "spearman") for fn in ("cosine", "dot", "max")}  # fmt: skip
            entries.append({"eval_loss": 4.9, "eval_runtime": 1.0, **metrics, "epoch": 0.5, "step": step})
    return [*entries, {"train_runtime": 9.0, "train_loss": 4.5, "epoch": 1.0, "step": steps}]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, to look at their lines."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    original = Figure.savefig

    def savefig(self: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def lines(axes: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_curves_show_the_log(tmp_path: Path, figures: list[Any]) -> None:
    path = tmp_path / "training.png"
    assert plot_training(log(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    (figure,) = figures
    loss, spearman = figure.axes
    drawn = lines(loss)
    assert drawn["validation"] == [4.9] * 4
    assert drawn["training (mean of 5)"][-1] == pytest.approx(5.0 - 58 / 50)  # steps 56 to 60
    assert [5.0 - step / 50 for step in range(1, 61)] in list(drawn.values())
    # Cosine alone of each data set, with its last value.
    assert lines(spearman) == {
        "sts-dev (cosine): 0.600": [0, 0.2, 0.4, 0.6],
        "sts-test (cosine): 0.600": [0, 0.2, 0.4, 0.6],
    }
    assert spearman.get_xlabel() == "Step"
    assert (loss.get_title("left"), spearman.get_title("left")) == ("Loss", "STS Spearman")
    assert loss.get_legend() is not None


def test_short_logs_are_not_smoothed(tmp_path: Path, figures: list[Any]) -> None:
    assert plot_training([entry for entry in log(10) if "loss" in entry], tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert lines(axes) == {"training": pytest.approx([5.0 - step / 50 for step in range(1, 11)])}


def test_other_functions_stand_in_for_cosine(tmp_path: Path, figures: list[Any]) -> None:
    entries = [{"step": 1, "a_spearman_dot": 0.1, "a_spearman_max": 0.2}, {"step": 1, "b_spearman_dot": 0.3}]
    entries += [{"step": 1, "spearman_cosine": 0.4}]
    assert plot_training(entries, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert set(lines(axes)) == {"a (max): 0.200", "b (dot): 0.300", "cosine: 0.400"}


def test_values_that_are_not_finite_are_gaps_and_marked(tmp_path: Path, figures: list[Any]) -> None:
    entries = log()
    entries[3]["loss"] = math.nan
    entries[-2]["eval_sts-dev_spearman_cosine"] = math.inf
    assert plot_training(entries, tmp_path / "a.png")
    loss, spearman = figures[0].axes
    marks = [line for axes in (loss, spearman) for line in axes.lines if line.get_label() == "not finite"]
    assert [list(line.get_xdata()) for line in marks] == [[3], [60]]
    assert math.isnan(lines(loss)["training (mean of 5)"][2])
    assert math.isfinite(lines(loss)["training (mean of 5)"][3])


def test_a_log_of_nothing_but_nan_is_drawn(tmp_path: Path) -> None:
    assert plot_training([{"loss": math.nan, "step": step} for step in range(1, 80)], tmp_path / "a.png")
    assert plot_training([{"spearman_cosine": math.nan, "step": 0}], tmp_path / "b.png")


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["a$b$", "x^2_{", "_hidden", "日本", "a|b"])
def test_any_name_of_a_data_set_is_drawn(name: str, tmp_path: Path) -> None:
    assert plot_training([{f"eval_{name}_spearman_cosine": 0.5, "step": 3}], tmp_path / "a.png")


@pytest.mark.parametrize(
    "entries", [[], [{"train_runtime": 1.0, "step": 3}], [{"loss": 1.0}], [{"loss": None, "step": 1}]]
)
def test_a_log_with_nothing_to_draw_makes_no_file(entries: list[dict[str, Any]], tmp_path: Path) -> None:
    assert not plot_training(entries, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plot_training(log(), tmp_path / "missing" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plots, "_said_absent", False)
    with caplog.at_level(logging.INFO, logger="triton_st.plots"):
        assert not plot_training(log(), tmp_path / "a.png")
        assert not plot_training(log(), tmp_path / "a.png")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "triton_st[plots]" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_importing_does_not_import_matplotlib_and_drawing_leaves_no_state(tmp_path: Path) -> None:
    script = (
        "import sys; from triton_st.plots import plot_training; assert 'matplotlib' not in sys.modules;"
        f"assert plot_training([{{'loss': 1.0, 'step': 1}}], {str(tmp_path / 'a.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules;"
        "import matplotlib; assert matplotlib.rcParams['axes.grid'] is False"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
