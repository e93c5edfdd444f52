"""The record of a training run: a JSONL file that survives a kill, and the history as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
            kept = [json.dumps(entry).encode() for entry in history]
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(temporary, self.path)

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line; it is in the file when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


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
