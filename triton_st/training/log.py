"""What a training run shows and keeps: progress bar, JSONL file, history table; and how it takes Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm

from triton_st.models.files import replacing_file

LOG_NAME = "training_log.jsonl"
_HEADINGS = {"epoch": "epoch", "step": "step", "loss": "loss", "learning_rate": "lr", "eval_loss": "eval loss"}


class TrainingLog:
    """One JSON object a line: what `state.log_history` holds, with tokens/s and the loss scale beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def restart(self, history: Sequence[dict[str, Any]]) -> None:
        """Keep the lines of `history`, drop what a killed process logged after them. An empty history starts anew."""
        kept = self.path.read_bytes().splitlines()[: len(history)] if history and self.path.is_file() else []
        if len(kept) < len(history):
            kept = [_json_line(entry).encode() for entry in history]
        with replacing_file(self.path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line; it is in the file when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_json_line(entry) + "\n")


def _json_line(entry: dict[str, Any]) -> str:
    """Strict JSON, which has no NaN: null stands for a metric that is not defined."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()
    }
    return json.dumps(finite, allow_nan=False)


class Progress:
    """A progress bar with loss, learning rate and tokens/s; lines of text where the console is no terminal."""

    def __init__(self, total: int, done: int, *, quiet: bool) -> None:
        terminal = sys.stderr.isatty()
        self._print_lines = not quiet and not terminal
        self._bar = tqdm(total=total, initial=done, disable=quiet or not terminal, unit="step", dynamic_ncols=True)
        self._tokens, self._seconds = 0, 0.0  # since the last log entry

    def advance(self, loss: float, learning_rate: float, tokens: int, seconds: float) -> None:
        """Count a step of `tokens` tokens that took `seconds`."""
        self._tokens += tokens
        self._seconds += seconds
        self._bar.set_postfix_str(f"loss {loss:.4f}, lr {learning_rate:.2e}, {tokens / seconds:,.0f} tokens/s", False)
        self._bar.update()

    def tokens_per_second(self) -> float:
        """Return the rate since this was last asked for, evaluation and saving left out."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        self._tokens, self._seconds = 0, 0.0
        return round(rate, 1)

    def show(self, entry: dict[str, Any]) -> None:
        """Print a log entry where there is no bar."""
        if self._print_lines:
            names = [name for name in entry if name not in ("epoch", "step")]
            shown = names if len(names) <= 5 else [name for name in names if name.endswith("spearman_cosine")]
            values = "  ".join(f"{name} {_cell(name, entry[name])}" for name in shown)
            print(f"step {entry['step']}/{self._bar.total}  {values}", file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed."""

    requested: bool = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Note the first SIGINT instead of raising, so that a step is ended and saved; the second raises at once."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield interrupt
        return

    def note(_signal: int, _frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def history_table(log_history: Sequence[dict[str, Any]], metrics: Sequence[str] = ()) -> str:
    """Return the history as a text table, one row a step that was logged or evaluated.

    Args:
        log_history: entries as `trainer.state.log_history` has them.
        metrics: keys of evaluation metrics to show beside loss, learning rate and evaluation loss.
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        if "train_runtime" not in entry:
            rows.setdefault(entry["step"], {}).update(entry)
    columns = [name for name in (*_HEADINGS, *metrics) if any(name in row for row in rows.values())]
    table = [[_HEADINGS.get(name, name.removeprefix("eval_")) for name in columns]]
    table += [[_cell(name, row.get(name)) for name in columns] for row in rows.values()]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    return str(value) if name == "step" else f"{value:.2e}" if name == "learning_rate" else f"{value:.4f}"
