"""Training arguments: ST's fields, defaults and meanings; what is ignored says so, what is refused says why."""

from __future__ import annotations

import dataclasses
import math
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_st import BatchSamplers, SentenceTransformerTrainingArguments
from triton_st.training_args import ACCEPTED_WITHOUT_EFFECT, REFUSED

# A value of each argument without effect that is not its default, where str "x" would not do.
OTHER_VALUES: dict[str, Any] = {"include_for_metrics": ["loss"], "accelerator_config": {"split_batches": True}}


def default_of(field: dataclasses.Field) -> Any:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    return value.value if isinstance(value, Enum) else value


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def test_every_field_of_st_is_covered_with_its_default() -> None:
    st = pytest.importorskip("sentence_transformers")
    theirs = fields_of(st.SentenceTransformerTrainingArguments)
    ours = fields_of(SentenceTransformerTrainingArguments)
    assert ours.keys() == theirs.keys()
    assert {name: default_of(f) for name, f in ours.items()} == {name: default_of(f) for name, f in theirs.items()}


def test_every_field_is_documented_and_of_one_class() -> None:
    ours = fields_of(SentenceTransformerTrainingArguments)
    assert all(field.metadata["help"].endswith((".", ")")) for field in ours.values())
    assert not ACCEPTED_WITHOUT_EFFECT.keys() & REFUSED.keys()
    implemented = ours.keys() - ACCEPTED_WITHOUT_EFFECT.keys() - REFUSED.keys()
    assert {"learning_rate", "fp16", "save_total_limit", "batch_sampler", "prompts"} <= implemented
    assert len(implemented) > 45


def test_defaults_and_st_s_own_forms_of_them_do_not_warn(tmp_path: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SentenceTransformerTrainingArguments(str(tmp_path), report_to="none")
        SentenceTransformerTrainingArguments(str(tmp_path), report_to=[], prediction_loss_only=True, debug=[])
        SentenceTransformerTrainingArguments(str(tmp_path), multi_dataset_batch_sampler="proportional")


def test_one_warning_names_all_that_has_no_effect() -> None:
    with pytest.warns(UserWarning, match="without effect") as caught:
        args = SentenceTransformerTrainingArguments(report_to="wandb", dataloader_num_workers=4, push_to_hub=True)
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in ("report_to", "dataloader_num_workers", "push_to_hub"))
    assert args.dataloader_num_workers == 4


@pytest.mark.parametrize("name", ACCEPTED_WITHOUT_EFFECT)
def test_each_argument_without_effect_is_taken_and_named(name: str) -> None:
    default = ACCEPTED_WITHOUT_EFFECT[name][0]
    value = OTHER_VALUES.get(name, (not default) if isinstance(default, bool) else "x" if default is None else 7)
    if name in ("prediction_loss_only", "ddp_broadcast_buffers"):
        value = {"prediction_loss_only": "x"}.get(name, True)  # ST itself sets these to the other bool
    with pytest.warns(UserWarning, match=f"without effect here: {name} "):
        assert getattr(SentenceTransformerTrainingArguments(**{name: value}), name) == value


@pytest.mark.parametrize("name", REFUSED)
def test_each_refused_argument_says_why(name: str) -> None:
    value: Any = {"router_mapping": {"anchor": "query"}, "local_rank": 0, "label_smoothing_factor": 0.1}.get(name, "x")
    with pytest.raises(ValueError, match=f"`{name}=.*` is not served: .{{15,}}"):
        SentenceTransformerTrainingArguments(**{name: value})


def test_a_name_that_st_lacks_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        SentenceTransformerTrainingArguments(learning_rat=1e-3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"warmup_steps": 0.1}, 8), ({"warmup_steps": 5}, 5), ({"warmup_steps": 0}, 0), ({"warmup_ratio": 0.1}, 8)],
)
def test_warmup_below_one_is_a_share_rounded_up(settings: dict[str, float], expected: int) -> None:
    args = SentenceTransformerTrainingArguments(**settings)
    assert args.get_warmup_steps(79) == expected
    assert args.warmup_ratio is None


def test_older_name_of_eval_strategy_is_taken() -> None:
    with pytest.warns(FutureWarning, match="eval_strategy"):
        args = SentenceTransformerTrainingArguments(evaluation_strategy="epoch")
    assert args.eval_strategy == "epoch"
    assert args.do_eval


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_has_two_names(name: str) -> None:
    for value in (True, False, None):
        args = SentenceTransformerTrainingArguments(**{name: value})
        assert args.activation_checkpointing is args.gradient_checkpointing is bool(value)


def test_eval_steps_fall_back_to_logging_steps() -> None:
    assert SentenceTransformerTrainingArguments(eval_strategy="steps", logging_steps=30).eval_steps == 30


def test_dictionaries_may_be_json_text() -> None:
    args = SentenceTransformerTrainingArguments(prompts='{"anchor": "query: "}', learning_rate_mapping='{"word": 0.1}')
    assert args.prompts == {"anchor": "query: "}
    assert args.learning_rate_mapping == {"word": 0.1}
    assert SentenceTransformerTrainingArguments(prompts="query: ").prompts == "query: "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, "`learning_rate`: expected a finite number at least 0"),
        ({"learning_rate": math.nan}, "`learning_rate`"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size`: expected at least 1"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps`"),
        ({"num_train_epochs": 0}, "`num_train_epochs`"),
        ({"max_steps": 0}, "`max_steps`"),
        ({"adam_beta1": 1.0}, "`adam_beta1`.*below 1"),
        ({"warmup_steps": -1}, "`warmup_steps`"),
        ({"warmup_ratio": 1.5}, "`warmup_ratio`"),
        ({"seed": -1}, "`seed`"),
        ({"save_total_limit": 0}, "`save_total_limit`"),
        ({"fp16": True, "bf16": True}, "exclude each other"),
        ({"eval_strategy": "sometimes"}, "`eval_strategy`: expected one of no, steps, epoch"),
        ({"save_strategy": "sometimes"}, "`save_strategy`: expected one of no, steps, epoch, best"),
        ({"lr_scheduler_type": "sawtooth"}, "`lr_scheduler_type`: expected one of linear"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "follows a metric"),
        ({"optim": "sgd"}, "`optim`: expected one of adamw_torch"),
        ({"batch_sampler": "alphabetical"}, "`batch_sampler`: expected one of"),
        ({"batch_sampler": "group_by_label"}, "not served"),
        ({"logging_steps": 1.5}, "`logging_steps`: expected whole steps"),
        ({"logging_steps": 0}, "`logging_steps`"),
        ({"eval_strategy": "steps", "eval_steps": -1}, "`eval_steps`"),
        ({"save_strategy": "best"}, "metric_for_best_model"),
        ({"load_best_model_at_end": True}, "same eval_strategy and save_strategy"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 6},
            "multiple of `eval_steps`",
        ),
        ({"prompts": {"anchor": {"a": "b"}}}, "`prompts`"),
        ({"prompts": "{broken"}, "`prompts`"),
        ({"learning_rate_mapping": {"word": -1.0}}, "`learning_rate_mapping"),
        ({"lr_scheduler_kwargs": "x"}, "`lr_scheduler_kwargs`"),
        ({"include_num_input_tokens_seen": "some"}, "`include_num_input_tokens_seen`"),
    ],
)
def test_bad_values_name_the_argument(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SentenceTransformerTrainingArguments(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": "fast"}, {"per_device_train_batch_size": 8.0}, {"fp16": "yes"}, {"seed": True}, {"seed": 1.0}],
)
def test_wrong_types_name_the_argument(settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(settings))):
        SentenceTransformerTrainingArguments(**settings)


def test_to_dict_is_plain_and_masks_the_token() -> None:
    with pytest.warns(UserWarning, match="hub_token"):
        args = SentenceTransformerTrainingArguments("out", hub_token="secret", batch_sampler="no_duplicates")
    values = args.to_dict()
    assert values["batch_sampler"] == "no_duplicates"
    assert values["lr_scheduler_type"] == "linear"
    assert values["save_strategy"] == "steps"
    assert "secret" not in args.to_json_string()
    assert "batch_sampler" not in SentenceTransformerTrainingArguments(batch_sampler=lambda *a, **k: None).to_dict()


def test_properties(tmp_path: Any) -> None:
    args = SentenceTransformerTrainingArguments(str(tmp_path), use_cpu=True, bf16=True, per_device_eval_batch_size=4)
    assert args.device == torch.device("cpu")
    assert args.activation_dtype == torch.bfloat16
    assert (args.train_batch_size, args.eval_batch_size) == (8, 4)
    assert SentenceTransformerTrainingArguments("~/x").output_dir == str(Path.home() / "x")
    assert dataclasses.replace(args, seed=7).seed == 7


def test_batch_samplers_are_st_s() -> None:
    theirs = pytest.importorskip("sentence_transformers.base.sampler").BatchSamplers
    assert {s.value for s in BatchSamplers} == {s.value for s in theirs}
    args = SentenceTransformerTrainingArguments(batch_sampler=theirs.NO_DUPLICATES)
    assert args.batch_sampler is BatchSamplers.NO_DUPLICATES
