"""Shared by the encoder's tests: transformers' states of a packed batch, and the rule for a model's gradients."""

from __future__ import annotations

import torch


def padded(features: dict, values: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch (or other values per token) padded with zeros, and its attention mask."""
    flat = features["input_ids"] if values is None else values
    lengths = features["cu_seqlens"].diff().tolist()
    laid = torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)
    mask = torch.arange(laid.shape[1]) < torch.tensor(lengths)[:, None]
    return laid, mask


def transformers_states(model: torch.nn.Module, features: dict) -> torch.Tensor:
    """transformers' last hidden states, packed [T, D]."""
    ids, mask = padded(features)
    padding_id = model.config.pad_token_id
    arguments = {"input_ids": ids.masked_fill(~mask, padding_id), "attention_mask": mask.long()}
    if features.get("token_type_ids") is not None:
        arguments["token_type_ids"] = padded(features, features["token_type_ids"])[0]
    return model(**arguments).last_hidden_state[mask]


def assert_gradients(ours: torch.nn.Module, exact: torch.nn.Module, bound: float = 1e-4, floor: float = 1e-3) -> None:
    """The whole-model rule: the error of each parameter's gradient against the exact one.

    It is at most `bound` times that one's norm, or times `floor` of the largest norm where that is more.
    """
    wanted = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    largest = max(grad.norm() for grad in wanted.values())
    seen = set()
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            continue
        seen.add(name)
        error = (parameter.grad.double() - wanted[name].double()).norm()
        assert error <= bound * max(wanted[name].norm(), floor * largest), f"{name}: {error:.3e}"
    assert seen == set(wanted)
