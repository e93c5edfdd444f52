"""AdamW and its schedule, set up as sentence-transformers' trainer sets them up."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from triton_st.training_args import SentenceTransformerTrainingArguments

# Parameters without weight decay, by lower-case name; transformers' rule.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def create_optimizer(loss: nn.Module, args: SentenceTransformerTrainingArguments) -> torch.optim.AdamW:
    """Return AdamW over all trainable parameters of `loss` (the model's and its own).

    Biases and normalisation weights get no weight decay; parameters that match a pattern of `learning_rate_mapping`
    get that learning rate.

    Raises:
        ValueError: no trainable parameter, or a pattern that matches none.
    """
    trainable = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("`model`: expected at least one parameter with requires_grad, got none")
    in_norm = {id(p) for module in loss.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    assert isinstance(args.learning_rate_mapping, dict)
    rates = dict.fromkeys(trainable, args.learning_rate)
    for pattern, rate in args.learning_rate_mapping.items():
        matching = [name for name in trainable if re.search(pattern, name)]
        if not matching:
            raise ValueError(f"`learning_rate_mapping`: no trainable parameter matches {pattern!r}")
        rates.update(dict.fromkeys(matching, rate))

    groups: dict[tuple[float, float], list[nn.Parameter]] = {(args.learning_rate, args.weight_decay): []}
    groups.setdefault((args.learning_rate, 0.0), [])
    for name, parameter in trainable.items():
        decays = id(parameter) not in in_norm and not _NO_DECAY.search(name.lower())
        groups.setdefault((rates[name], args.weight_decay if decays else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items() if params],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=args.optim == "adamw_torch_fused",
    )


def create_scheduler(
    optimizer: torch.optim.Optimizer, args: SentenceTransformerTrainingArguments, max_steps: int
) -> LambdaLR:
    """Return transformers' schedule of the name in `args.lr_scheduler_type` over `max_steps` steps."""
    assert not isinstance(args.lr_scheduler_kwargs, str)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(max_steps),
        num_training_steps=max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    assert isinstance(scheduler, LambdaLR)  # all that are not refused in the arguments
    return scheduler


def resume_schedule(scheduler: LambdaLR, step: int) -> None:
    """Put a fresh schedule and its optimizer's learning rates where they are after `step` steps."""
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(
        {**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    )
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
