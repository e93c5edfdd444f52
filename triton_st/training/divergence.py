"""What stops training when a number is no longer finite, and the search for the tensor it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SHOWN_ROWS = 10
_READ = (nn.Linear, nn.LayerNorm, nn.Embedding)


class TrainingDiverged(FloatingPointError):
    """Training stopped because a weight, the loss or a gradient was not finite; nothing was trained on it.

    Attributes:
        step: the optimizer step, from 1, that was not taken.
        tensor: the first tensor found not to be finite.
        rows: rows of the training data set in the batch; those to blame where that can be told.
    """

    def __init__(self, what: str, *, step: int, tensor: str, rows: Sequence[int]) -> None:
        self.step, self.tensor, self.rows = step, tensor, list(rows)
        shown = ", ".join(str(row) for row in self.rows[:SHOWN_ROWS])
        more = f" and {len(self.rows) - SHOWN_ROWS} more" if len(self.rows) > SHOWN_ROWS else ""
        super().__init__(
            f"training stopped at step {step}: {what}. First tensor that is not finite: {tensor}. "
            f"Rows of the batch: {shown}{more}. The weights are those after step {step - 1}."
        )


def check_parameters(module: nn.Module, *, step: int, rows: Sequence[int]) -> None:
    """Raise `TrainingDiverged` if a parameter of `module` holds a value that is not finite."""
    if tensor := _first_parameter(module):
        raise TrainingDiverged("a weight is not finite", step=step, tensor=tensor, rows=rows)


def diverged(
    what: str, *, model: nn.Module, loss: nn.Module, features: list[dict[str, Any]], step: int, rows: Sequence[int]
) -> TrainingDiverged:
    """Find where a value that is not finite came from: parameters, then activations column by column, then gradients.

    Args:
        what: what was noticed, for the message.
        model: the encoder; called on each column of the batch.
        loss: the loss module, which holds the model.
        features: the batch, packed features by column.
        step: the optimizer step, from 1, that is not taken.
        rows: the batch's rows in the data set.

    Returns:
        The error to raise.
    """
    tensor = _first_parameter(loss)
    if not tensor:
        tensor, culprits = _first_activation(model, features)
        rows = [rows[i] for i in culprits] or rows
    if not tensor:
        named = ((name, parameter.grad) for name, parameter in loss.named_parameters())
        tensor = next((f"gradient of {_described(name, grad)}" for name, grad in named if _bad(grad)), "")
    return TrainingDiverged(what, step=step, tensor=tensor or "none but the result itself", rows=rows)


def _first_parameter(module: nn.Module) -> str:
    named = module.named_parameters()
    return next((f"parameter {_described(name, value.detach())}" for name, value in named if _bad(value)), "")


def _first_activation(model: nn.Module, features: list[dict[str, Any]]) -> tuple[str, list[int]]:
    """Run each column through the model; return the first bad output in order of execution, and the bad rows."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for key, value in _tensors(output):
                if not found and _bad(value):
                    found.append(f"output {key}of {_described(name or type(model).__name__, value)}")

        return hook

    # The encoder reads the parameters of the smallest modules without calling them, and refuses any that have hooks.
    called = [(name, module) for name, module in model.named_modules() if not isinstance(module, _READ)]
    handles = [module.register_forward_hook(watch(name)) for name, module in called]
    try:
        with torch.no_grad():
            for column, batch in enumerate(features):
                embeddings = model(batch)["sentence_embedding"]
                if found:
                    bad_rows = (~embeddings.isfinite()).any(dim=1).nonzero().flatten().tolist()
                    return f"{found[0]}, column {column}", bad_rows
    finally:
        for handle in handles:
            handle.remove()
    return "", []


def _tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield "", output
    elif isinstance(output, dict):
        yield from ((f"{key!r} ", value) for key, value in output.items() if isinstance(value, Tensor))
    elif isinstance(output, (tuple, list)):
        yield from (("", value) for value in output if isinstance(value, Tensor))


def _bad(value: Tensor | None) -> bool:
    return value is not None and value.is_floating_point() and not bool(value.isfinite().all())


def _described(name: str, value: Tensor | None) -> str:
    if value is None:
        return name
    return f"{name} ({int((~value.isfinite()).sum())} of {value.numel()} values)"
