"""Training checkpoints: folders that exist whole or not at all, and what is in them beside the model.

A checkpoint folder `checkpoint-{step}` holds the model as `save_pretrained` writes it, transformers'
`trainer_state.json`, `optimizer.safetensors` (AdamW's moments by parameter name, further loss weights, random number
generators) and `resume.json` (schedule, loss scale, what the data and arguments were).
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triton_st.models.files import delete_folder, remove_leftovers, replacing_file

TENSORS = "optimizer.safetensors"
RESUME = "resume.json"
TRAINER_STATE = "trainer_state.json"
# Arguments that choose the batches or the arithmetic: a resumed run must have the same.
FIXED_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
    "batch_sampler",
    "seed",
    "data_seed",
    "fp16",
    "bf16",
    "learning_rate_mapping",
)
# Arguments that change what comes after the checkpoint; someone may mean to.
OTHER_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "logging_strategy",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; the message names the folder and says why."""


def forget_evaluations(folder: Path, step: int) -> None:
    """Cut off what evaluators wrote into the CSV files in `folder` after `step`, so that a resumed run writes it once.

    Rows are those of the last run in a file: from its end back to the first that is no later than `step`.
    """
    remove_leftovers(folder)
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        headers = [i for i, row in enumerate(rows) if row[:2] == ["epoch", "steps"]]
        kept = len(rows)
        while headers and kept - 1 > headers[-1] and _is_later(rows[kept - 1], len(rows[headers[-1]]), step):
            kept -= 1
        if kept < len(rows):
            with replacing_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows[:kept])


def _is_later(row: list[str], columns: int, step: int) -> bool:
    torn = len(row) != columns or not row[1].removeprefix("-").isdigit()  # cut off while it was written
    return torn or int(row[1]) > step


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders in `output_dir`, by step."""
    found = [(int(match[1]), path) for path in output_dir.glob("*") if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def rotate_checkpoints(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; the one at `keep`, the best so far, and the newest stay."""
    checkpoints = list_checkpoints(output_dir)
    surplus = len(checkpoints) - limit if limit is not None else 0
    deletable = [path for path in checkpoints[:-1] if keep is None or path.name != Path(keep).name]
    for path in deletable[: max(surplus, 0)]:
        delete_folder(path)


def find_checkpoint(resume: str | os.PathLike[str] | bool, output_dir: Path) -> Path:
    """Return the folder to resume from: the one given, or for True the last one in `output_dir`.

    Raises:
        ValueError: True, and there is none.
        CheckpointError: the folder is not there, or lacks a file.
    """
    if isinstance(resume, bool):
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise ValueError(f"No valid checkpoint found in output directory ({output_dir})")
        folder = checkpoints[-1]
    else:
        folder = Path(resume)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder}: no such folder")
    missing = [name for name in (TRAINER_STATE, RESUME, TENSORS) if not (folder / name).is_file()]
    if missing:
        why = " (save_only_model leaves nothing to resume from)" if len(missing) > 1 else ""
        raise CheckpointError(f"checkpoint {folder}: incomplete, {', '.join(missing)} is missing{why}")
    return folder


def describe_run(data: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return what `check_same_run` compares, from the data's digest and all training arguments."""
    return {
        "data": data,
        "fixed": {name: args.get(name) for name in FIXED_ARGUMENTS},
        "arguments": {name: args.get(name) for name in OTHER_ARGUMENTS},
    }


def check_same_run(folder: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compare what the checkpoint's run was made of with the run that is to go on.

    Args:
        folder: the checkpoint, for messages.
        saved: `describe_run` as saved.
        current: `describe_run` of this run.

    Raises:
        CheckpointError: other data or other `FIXED_ARGUMENTS`. Changed `OTHER_ARGUMENTS` only warn.
    """
    if saved["data"] != current["data"]:
        raise CheckpointError(
            f"checkpoint {folder}: was trained on other data (texts, their order, prompts or tokenizer differ)"
        )
    if changed := _changed(saved["fixed"], current["fixed"]):
        raise CheckpointError(f"checkpoint {folder}: cannot go on with other batches or another precision: {changed}")
    if changed := _changed(saved["arguments"], current["arguments"]):
        warnings.warn(
            f"resuming from {folder} with changed arguments, which apply from here on: {changed}", stacklevel=2
        )


def _changed(saved: dict[str, Any], current: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} was {saved.get(name)!r}, now {value!r}" for name, value in current.items() if saved.get(name) != value
    )


def write_state(folder: Path, tensors: dict[str, Tensor], resume: dict[str, Any]) -> None:
    """Write the tensors and the plain values that resuming needs."""
    save_file({name: value.detach().contiguous().cpu() for name, value in tensors.items()}, folder / TENSORS)
    (folder / RESUME).write_text(json.dumps(resume, indent=1), encoding="utf-8")


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_state` wrote.

    Raises:
        CheckpointError: a file is damaged.
    """
    try:
        resume = json.loads((folder / RESUME).read_text(encoding="utf-8"))
        return load_file(folder / TENSORS), resume
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint {folder}: damaged ({error})") from error


def load_model(model: nn.Module, folder: Path) -> None:
    """Load a saved model's weights into `model`, in place.

    Raises:
        CheckpointError: there is no model in `folder`, or one of another shape.
    """
    try:
        weights = type(model)(str(folder), device="cpu").state_dict()
        model.load_state_dict(weights)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder}: its model cannot be loaded ({error})") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, loss: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state, by parameter name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in loss.named_parameters()}
    return {
        f"optimizer.{names[parameter]}:{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, loss: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back; parameters are found by name.

    Raises:
        KeyError: a parameter that `loss` does not have.
    """
    parameters = dict(loss.named_parameters())
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {parameter: i for i, parameter in enumerate(order)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        kind, _, rest = full_name.partition(".")
        if kind == "optimizer":
            name, _, key = rest.rpartition(":")
            state.setdefault(index[parameters[name]], {})[key] = value
    # load_state_dict knows where each value belongs: moments beside their weight, step counters as the variant needs.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """Return the states of Python's, NumPy's and torch's global random number generators."""
    python = random.getstate()
    numpy = np.random.get_state(legacy=True)
    assert isinstance(numpy, tuple)
    tensors = {
        "random.python": torch.tensor(python[1], dtype=torch.int64),
        "random.numpy": torch.tensor([*numpy[1].tolist(), numpy[2]], dtype=torch.int64),
        "random.cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def load_random_tensors(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put `random_tensors` back."""
    random.setstate((3, tuple(tensors["random.python"].tolist()), None))
    *key, position = tensors["random.numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, 0, 0.0))
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
