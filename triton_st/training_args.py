"""`SentenceTransformerTrainingArguments`: the trainer's settings under the names of sentence-transformers."""
# ruff: noqa: RUF009  (`_field` is a call of dataclasses.field)

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass, make_dataclass
from enum import Enum
from typing import Any

import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.utils.generic import ExplicitEnum


class BatchSamplers(ExplicitEnum):
    """How rows are grouped into training batches (ST's enum of this name)."""

    BATCH_SAMPLER = "batch_sampler"
    NO_DUPLICATES = "no_duplicates"
    NO_DUPLICATES_HASHED = "no_duplicates_hashed"
    GROUP_BY_LABEL = "group_by_label"


class MultiDatasetBatchSamplers(ExplicitEnum):
    """How batches of several datasets are mixed (ST's enum of this name); training on several is not served."""

    ROUND_ROBIN = "round_robin"
    PROPORTIONAL = "proportional"


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# The other two schedules of transformers follow a metric, not the step.
METRIC_SCHEDULES = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)

_TRACKERS = "no experiment tracker is attached; training_log.jsonl and training.png are written instead"
_LOADER = "texts are tokenised once, ahead, and batches are cut from memory: there is no data loader"
_HUB = "nothing is uploaded; the saved folder can be pushed with huggingface_hub"
_CONSOLE = "logging is the standard library's: use logging.getLogger('triton_st').setLevel(...)"
_EVALUATION = "evaluation runs in float32 and keeps no logits"
_DISTRIBUTED = "one process trains on one device"
_CHECKPOINTS = "every layer is checkpointed"
_COMPILE = "the operators are compiled already"
_FOLLOWS_HUB = "hub settings need push_to_hub"

# ST's other arguments that change speed, reports or memory but no number of the result: name -> (ST's default, why it
# has no effect here). A value other than the default is named in one warning.
ACCEPTED_WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "optim_args": (None, "AdamW takes its settings from adam_beta1, adam_beta2 and adam_epsilon"),
    "average_tokens_across_devices": (True, _DISTRIBUTED),
    "bf16_full_eval": (False, _EVALUATION),
    "fp16_full_eval": (False, _EVALUATION),
    "activation_checkpointing_kwargs": (None, _CHECKPOINTS),
    "gradient_checkpointing_kwargs": (None, _CHECKPOINTS),
    "torch_compile": (False, _COMPILE),
    "torch_compile_backend": (None, _COMPILE),
    "torch_compile_mode": (None, _COMPILE),
    "use_liger_kernel": (False, "the encoder runs on this package's kernels"),
    "liger_kernel_config": (None, "the encoder runs on this package's kernels"),
    "use_cache": (False, "an encoder has no key-value cache"),
    "torch_empty_cache_steps": (None, "the allocator's cache is left alone"),
    "auto_find_batch_size": (False, "a batch that does not fit stops with torch's out-of-memory error"),
    "log_on_each_node": (True, _DISTRIBUTED),
    "logging_nan_inf_filter": (True, "a loss that is not finite stops training, it is never filtered"),
    "log_level": ("passive", _CONSOLE),
    "log_level_replica": ("warning", _CONSOLE),
    "report_to": ("none", _TRACKERS),
    "run_name": (None, _TRACKERS),
    "project": ("huggingface", _TRACKERS),
    "trackio_space_id": (None, _TRACKERS),
    "trackio_bucket_id": (None, _TRACKERS),
    "trackio_static_space_id": (None, _TRACKERS),
    "prediction_loss_only": (False, _EVALUATION),
    "eval_do_concat_batches": (True, _EVALUATION),
    "eval_use_gather_object": (False, _EVALUATION),
    "eval_accumulation_steps": (None, _EVALUATION),
    "include_for_metrics": ([], _EVALUATION),
    "batch_eval_metrics": (False, _EVALUATION),
    "save_on_each_node": (False, _DISTRIBUTED),
    "enable_jit_checkpoint": (False, "save_steps says when checkpoints are written; SIGINT writes one too"),
    "push_to_hub": (False, _HUB),
    "hub_token": (None, _FOLLOWS_HUB),
    "hub_private_repo": (None, _FOLLOWS_HUB),
    "hub_model_id": (None, _FOLLOWS_HUB),
    "hub_strategy": ("every_save", _FOLLOWS_HUB),
    "hub_always_push": (False, _FOLLOWS_HUB),
    "hub_revision": (None, _FOLLOWS_HUB),
    "ignore_data_skip": (False, "a resumed run always goes on with the batch after the checkpoint"),
    "restore_callback_states_from_checkpoint": (False, "a resumed run always restores its callbacks"),
    "accelerator_config": (None, _DISTRIBUTED),
    "dataloader_num_workers": (0, _LOADER),
    "dataloader_pin_memory": (True, _LOADER),
    "dataloader_persistent_workers": (False, _LOADER),
    "dataloader_prefetch_factor": (None, _LOADER),
    "dataloader_multiprocessing_context": (None, _LOADER),
    "dataloader_in_order": (True, _LOADER),
    "remove_unused_columns": (True, "every text column is used, in order"),
    "label_names": (None, "a column named label, labels, score or scores holds the labels"),
    "train_sampling_strategy": ("random", "batch_sampler decides, as in ST"),
    "length_column_name": ("length", "nothing is padded, so nothing is grouped by length"),
    "ddp_find_unused_parameters": (None, _DISTRIBUTED),
    "ddp_bucket_cap_mb": (None, _DISTRIBUTED),
    "ddp_broadcast_buffers": (None, _DISTRIBUTED),
    "ddp_static_graph": (None, _DISTRIBUTED),
    "ddp_backend": (None, _DISTRIBUTED),
    "ddp_timeout": (1800, _DISTRIBUTED),
    "debug": ("", "a value that is not finite always stops training with the tensor's name"),
    "skip_memory_metrics": (True, "memory is not tracked"),
    "multi_dataset_batch_sampler": (MultiDatasetBatchSamplers.PROPORTIONAL, "one dataset is trained on"),
}
# Values beside the default that ask for nothing either: what ST itself turns the default into.
_SAME_AS_DEFAULT: dict[str, tuple[Any, ...]] = {
    "report_to": (None, [], ["none"]),
    "debug": (None, []),
    "include_for_metrics": (None,),
    "prediction_loss_only": (True,),
    "ddp_broadcast_buffers": (False,),
    "multi_dataset_batch_sampler": (MultiDatasetBatchSamplers.PROPORTIONAL.value,),
}

# ST's arguments that ask for another run than the one this trainer would make: name -> (ST's default, why refused).
REFUSED: dict[str, tuple[Any, str]] = {
    "deepspeed": (None, "training runs in one process on one device, without DeepSpeed"),
    "fsdp": (None, "training runs in one process on one device, without FSDP"),
    "fsdp_config": (None, "training runs in one process on one device, without FSDP"),
    "parallelism_config": (None, "training runs in one process on one device, without accelerate"),
    "local_rank": (-1, "training runs in one process on one device"),
    "optim_target_modules": (None, "it belongs to optimizers other than AdamW (GaLore, APOLLO)"),
    "label_smoothing_factor": (0.0, "MultipleNegativesRankingLoss has no smoothed labels"),
    "neftune_noise_alpha": (None, "noise on the embeddings is not implemented"),
    "router_mapping": ({}, "there is no Router module to route columns through"),
}
_NOT_REFUSED: dict[str, tuple[Any, ...]] = {"fsdp": ("", []), "router_mapping": (None,), "fsdp_config": ({},)}


def _field(default: Any, doc: str) -> Any:
    """Return a dataclass field that carries its documentation (`field.metadata["help"]`, as in transformers)."""
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=default.copy, metadata={"help": doc})
    return dataclasses.field(default=default, metadata={"help": doc})


_OtherArguments: Any = make_dataclass(
    "_OtherArguments",
    [(name, Any, _field(default, f"No effect: {why}.")) for name, (default, why) in ACCEPTED_WITHOUT_EFFECT.items()]
    + [(name, Any, _field(default, f"Refused: {why}.")) for name, (default, why) in REFUSED.items()],
    kw_only=True,
)


@dataclass
class SentenceTransformerTrainingArguments(_OtherArguments):
    """Settings of `SentenceTransformerTrainer`, with the names and defaults of sentence-transformers 6.2.

    The fields written out below are implemented; `field.metadata["help"]` documents each. ST's remaining arguments are
    taken too: those of `ACCEPTED_WITHOUT_EFFECT` are named in one warning when they are set, those of `REFUSED` raise.
    Source: https://sbert.net/docs/package_reference/sentence_transformer/training_args.html

    Raises:
        TypeError: A name that ST does not have, or a value of the wrong type.
        ValueError: A refused argument, a value out of range, or values that exclude each other.
    """

    output_dir: str | None = _field(None, "Folder for checkpoints, log and evaluation results (trainer_output).")
    _: KW_ONLY
    per_device_train_batch_size: int = _field(8, "Rows of a training batch.")
    per_device_eval_batch_size: int = _field(8, "Rows of a batch of the evaluation loss.")
    num_train_epochs: float = _field(3.0, "Passes over the training rows; a fraction ends within a pass.")
    max_steps: int = _field(-1, "Optimizer steps; above 0 it overrides num_train_epochs.")
    gradient_accumulation_steps: int = _field(1, "Batches whose gradients are averaged in one optimizer step.")

    learning_rate: float = _field(5e-5, "Peak learning rate of AdamW.")
    learning_rate_mapping: dict[str, float] | str | None = _field(
        {}, "Regular expression of parameter names -> learning rate of their own."
    )
    lr_scheduler_type: SchedulerType | str = _field("linear", "Schedule, by transformers.get_scheduler's names.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = _field(None, "Further arguments of the schedule.")
    warmup_steps: float = _field(0, "Steps of linear warm-up; below 1, their share of all steps, rounded up.")
    warmup_ratio: float | None = _field(None, "Older name of a warmup_steps below 1.")
    optim: str = _field("adamw_torch_fused", "adamw_torch or adamw_torch_fused.")
    weight_decay: float = _field(0.0, "Decoupled weight decay; biases and LayerNorm weights have none.")
    adam_beta1: float = _field(0.9, "AdamW's decay of the first moment.")
    adam_beta2: float = _field(0.999, "AdamW's decay of the second moment.")
    adam_epsilon: float = _field(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _field(1.0, "Gradients are scaled down to this global norm; 0 leaves them.")

    fp16: bool = _field(False, "Half activations, float32 weights and loss, dynamic loss scaling; also on CPU.")
    bf16: bool = _field(False, "bfloat16 activations, float32 weights and loss; also on CPU.")
    tf32: bool | None = _field(None, "TF32 matrix products on CUDA while training; None leaves torch's setting.")
    activation_checkpointing: bool | None = _field(
        None, "Keep each layer's input alone and compute the layer again in backward: less memory, the same bits."
    )
    gradient_checkpointing: bool | None = _field(None, "Older name of activation_checkpointing.")
    use_cpu: bool = _field(False, "Train on the CPU although an accelerator is there.")

    seed: int = _field(42, "Seed of dropout, and of the batches unless data_seed is given.")
    data_seed: int | None = _field(None, "Seed of the batches.")
    full_determinism: bool = _field(
        False, "torch.use_deterministic_algorithms while training; this package's operators always repeat bit for bit."
    )
    batch_sampler: BatchSamplers | str | Callable[..., Any] = _field(
        BatchSamplers.BATCH_SAMPLER, "batch_sampler (a plain shuffle), no_duplicates, or a callable as in ST."
    )
    dataloader_drop_last: bool = _field(False, "Leave out the last batch where it is incomplete.")
    prompts: dict[str, str] | str | None = _field(None, "Text put before every text, or column name -> such a text.")

    logging_strategy: IntervalStrategy | str = _field("steps", "When the loss is logged: no, steps or epoch.")
    logging_steps: float = _field(500, "Steps between two log entries; below 1, a share of all steps.")
    logging_first_step: bool = _field(False, "Log step 1 too.")
    include_num_input_tokens_seen: str | bool = _field("no", "Log num_input_tokens_seen: no, all or non_padding.")
    disable_tqdm: bool | None = _field(None, "No progress bar, no log lines and no table on the console.")

    eval_strategy: IntervalStrategy | str = _field(
        "no", "When to evaluate: no, steps or epoch; other than no, also before the first step and after the last."
    )
    eval_steps: float | None = _field(None, "Steps between two evaluations (logging_steps); below 1, a share.")
    eval_delay: float = _field(0, "Steps (or epochs) before the first evaluation.")
    eval_on_start: bool = _field(False, "Evaluate before the first step although eval_strategy is no.")
    do_train: bool = _field(False, "For scripts; the trainer does not read it, as in transformers.")
    do_eval: bool = _field(False, "For scripts; true when eval_strategy is not no.")
    do_predict: bool = _field(False, "For scripts; the trainer does not read it, as in transformers.")

    save_strategy: SaveStrategy | str = _field("steps", "When to write a checkpoint: no, steps, epoch or best.")
    save_steps: float = _field(500, "Steps between two checkpoints; below 1, a share of all steps.")
    save_total_limit: int | None = _field(None, "Checkpoints kept; the best one is never deleted.")
    save_only_model: bool = _field(False, "Checkpoints hold the model alone and cannot be resumed from.")
    load_best_model_at_end: bool = _field(False, "After training, load the checkpoint with the best metric.")
    metric_for_best_model: str | None = _field(None, "Metric of the best model, with or without eval_ (loss).")
    greater_is_better: bool | None = _field(None, "Whether more is better; by default unless it ends with loss.")
    resume_from_checkpoint: str | bool | None = _field(None, "Used by train() when it is given no other.")

    evaluation_strategy: InitVar[str | None] = None  # transformers before 4.46

    def __post_init__(self, evaluation_strategy: str | None) -> None:
        if evaluation_strategy is not None:
            warnings.warn("`evaluation_strategy` is now `eval_strategy`", FutureWarning, stacklevel=3)
            self.eval_strategy = evaluation_strategy
        self._refuse_or_warn()
        self.output_dir = os.path.expanduser("trainer_output" if self.output_dir is None else self.output_dir)
        for name in ("prompts", "learning_rate_mapping", "lr_scheduler_kwargs"):
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                setattr(self, name, _parse_dict(name, value))
        if self.learning_rate_mapping is None:
            self.learning_rate_mapping = {}
        if self.warmup_ratio is not None:
            if self.warmup_steps == 0:
                _check_number("warmup_ratio", self.warmup_ratio, 0.0, 1.0)
                self.warmup_steps = self.warmup_ratio
            self.warmup_ratio = None
        self.eval_strategy = _enum("eval_strategy", self.eval_strategy, IntervalStrategy)
        self.logging_strategy = _enum("logging_strategy", self.logging_strategy, IntervalStrategy)
        self.save_strategy = _enum("save_strategy", self.save_strategy, SaveStrategy)
        self.lr_scheduler_type = _enum("lr_scheduler_type", self.lr_scheduler_type, SchedulerType)
        if not callable(self.batch_sampler):
            self.batch_sampler = _enum("batch_sampler", self.batch_sampler, BatchSamplers)
        if isinstance(self.include_num_input_tokens_seen, bool):
            self.include_num_input_tokens_seen = "all" if self.include_num_input_tokens_seen else "no"
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        self.gradient_checkpointing = self.activation_checkpointing
        self.disable_tqdm = bool(self.disable_tqdm)
        self.do_eval = self.do_eval or self.eval_strategy != IntervalStrategy.NO
        if self.eval_strategy == IntervalStrategy.STEPS and not self.eval_steps:
            self.eval_steps = self.logging_steps
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        self._validate()

    def _refuse_or_warn(self) -> None:
        for name, (default, why) in REFUSED.items():
            value = getattr(self, name)
            if value != default and value not in _NOT_REFUSED.get(name, ()):
                raise ValueError(f"`{name}={value!r}` is not served: {why}")
        ignored = [
            f"{name} ({why})"
            for name, (default, why) in ACCEPTED_WITHOUT_EFFECT.items()
            if getattr(self, name) != default and getattr(self, name) not in _SAME_AS_DEFAULT.get(name, ())
        ]
        if self.tf32 and self.device.type != "cuda":
            ignored.append("tf32 (there is no CUDA device)")
        if ignored:
            warnings.warn(f"training arguments without effect here: {'; '.join(ignored)}", stacklevel=4)

    def _validate(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _check_integer(name, getattr(self, name), 1)
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay"):
            _check_number(name, getattr(self, name), 0.0)
        _check_number("num_train_epochs", self.num_train_epochs, 0.0, above=True)
        for name in ("adam_beta1", "adam_beta2"):
            _check_number(name, getattr(self, name), 0.0, 1.0, below=True)
        for name in ("seed", "data_seed"):
            if name == "seed" or self.data_seed is not None:
                _check_integer(name, getattr(self, name), 0, 2**32 - 1)
        if _check_integer("max_steps", self.max_steps, -1) == 0:
            raise ValueError("`max_steps`: expected at least 1, or -1 to train for num_train_epochs; got 0")
        if self.save_total_limit is not None:
            _check_integer("save_total_limit", self.save_total_limit, 1)
        for flag in ("fp16", "bf16", "use_cpu", "load_best_model_at_end", "save_only_model", "dataloader_drop_last"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"`{flag}`: expected a bool, got {getattr(self, flag)!r}")
        if self.fp16 and self.bf16:
            raise ValueError("`fp16` and `bf16` exclude each other: set at most one of them")
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"`optim`: expected one of {', '.join(OPTIMIZERS)}; got {self.optim!r}")
        if self.lr_scheduler_type in METRIC_SCHEDULES:
            schedule = SchedulerType(self.lr_scheduler_type).value
            raise ValueError(f"`lr_scheduler_type={schedule!r}` is not served: it follows a metric, not the step")
        if self.batch_sampler == BatchSamplers.GROUP_BY_LABEL:
            raise ValueError("`batch_sampler='group_by_label'` is not served: no loss here trains on labels")
        if self.include_num_input_tokens_seen not in ("no", "all", "non_padding"):
            raise ValueError(
                "`include_num_input_tokens_seen`: expected no, all or non_padding; "
                f"got {self.include_num_input_tokens_seen!r}"
            )
        self._validate_mappings()
        for kind in ("logging", "eval", "save"):
            if getattr(self, f"{kind}_strategy") == "steps":
                steps = _check_number(f"{kind}_steps", getattr(self, f"{kind}_steps"), 0.0, above=True)
                if steps >= 1 and steps != int(steps):
                    raise ValueError(f"`{kind}_steps`: expected whole steps, or a share below 1; got {steps}")
                setattr(self, f"{kind}_steps", int(steps) if steps >= 1 else steps)
        if self.save_strategy == SaveStrategy.BEST and self.metric_for_best_model is None:
            raise ValueError("`save_strategy='best'` needs `metric_for_best_model`")
        if self.load_best_model_at_end and self.save_strategy != SaveStrategy.BEST:
            self._validate_best_model()

    def _validate_mappings(self) -> None:
        if not isinstance(self.learning_rate_mapping, dict):
            raise ValueError(
                "`learning_rate_mapping`: expected a dictionary of regular expression -> learning rate, "
                f"got {self.learning_rate_mapping!r}"
            )
        for pattern, rate in self.learning_rate_mapping.items():
            _check_number(f"learning_rate_mapping[{pattern!r}]", rate, 0.0)
        if self.lr_scheduler_kwargs is not None and not isinstance(self.lr_scheduler_kwargs, dict):
            raise ValueError(f"`lr_scheduler_kwargs`: expected a dictionary, got {self.lr_scheduler_kwargs!r}")
        texts = self.prompts.values() if isinstance(self.prompts, dict) else [self.prompts or ""]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                "`prompts`: expected a text or a dictionary of column name -> text (one dataset is trained on), "
                f"got {self.prompts!r}"
            )

    def _validate_best_model(self) -> None:
        """Every checkpoint must coincide with an evaluation, or the best model could be one that was never saved."""
        if self.eval_strategy != self.save_strategy:
            raise ValueError(
                "`load_best_model_at_end` needs the same eval_strategy and save_strategy (or save_strategy='best'); "
                f"got {IntervalStrategy(self.eval_strategy).value} and {SaveStrategy(self.save_strategy).value}"
            )
        if self.eval_strategy == IntervalStrategy.STEPS:
            assert self.eval_steps is not None
            if (self.eval_steps < 1) != (self.save_steps < 1) or not math.isclose(
                self.save_steps / self.eval_steps, round(self.save_steps / self.eval_steps), rel_tol=1e-6
            ):
                raise ValueError(
                    "`load_best_model_at_end` needs a `save_steps` that is a multiple of `eval_steps`; "
                    f"got {self.save_steps} and {self.eval_steps}"
                )

    @property
    def device(self) -> torch.device:
        """Where training runs: the accelerator when there is one, unless `use_cpu`."""
        accelerator = None if self.use_cpu else torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator

    @property
    def train_batch_size(self) -> int:
        """Rows of a training batch; one device trains, so the same as per device."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Rows of a batch of the evaluation loss."""
        return self.per_device_eval_batch_size

    @property
    def activation_dtype(self) -> torch.dtype:
        """Dtype in which training stores activations."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else torch.float32

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the warm-up in steps: `warmup_steps`, or its share of `num_training_steps` rounded up."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(num_training_steps * self.warmup_steps)

    def to_dict(self) -> dict[str, Any]:
        """Return all arguments as JSON can hold them: enums by value, the token masked, no callables (as ST)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
        if values["hub_token"] is not None:
            values["hub_token"] = "<HUB_TOKEN>"
        return {name: value for name, value in values.items() if not callable(value)}

    def to_json_string(self) -> str:
        """Return `to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, default=str)


def _parse_dict(name: str, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}`: expected a dictionary or JSON text of one, got {text!r} ({error})") from error


def _enum(name: str, value: Any, kind: type[ExplicitEnum]) -> Any:
    if isinstance(value, bool):  # transformers took False for "no" once
        value = "no" if not value else "steps"
    try:
        return kind(value)
    except ValueError as error:
        names = ", ".join(str(member.value) for member in kind)
        raise ValueError(f"`{name}`: expected one of {names}; got {value!r}") from error


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}`: expected an int, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"`{name}`: expected {bounds}, got {value}")
    return value


def _check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}`: expected a number, got {value!r}")
    outside = value < low or value > high or (above and value == low) or (below and value == high)
    if outside or not math.isfinite(value):
        bounds = f"{'above' if above else 'at least'} {low:g}"
        if high != math.inf:
            bounds += f" and {'below' if below else 'at most'} {high:g}"
        raise ValueError(f"`{name}`: expected a finite number {bounds}, got {value!r}")
    return value
