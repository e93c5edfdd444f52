"""The trainer: what it computes step by step, its schedule, log, evaluation, best model and bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from serving import threads
from training_runs import (
    NO_DROPOUT,
    arguments,
    logged,
    same_weights,
    tiny_data,
    tiny_evaluator,
    tiny_model,
    trainer,
    weights,
)
from transformers import EarlyStoppingCallback, TrainerCallback

from triton_st import SentenceTransformer, losses
from triton_st.training import SentenceTransformerTrainer
from triton_st.training.log import history_table
from triton_st.training.optimization import create_optimizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a model this small two threads only wait for each other."""
    with threads(1):
        yield


# --- what a step computes ---------------------------------------------------------------------------------------------


def by_hand(model: SentenceTransformer, batches: list[list[int]], data: Dataset, **settings: Any) -> list[float]:
    """The same training, written down from the documentation of AdamW, clipping and the linear schedule."""
    loss = losses.MultipleNegativesRankingLoss(model)
    decayed = [p for name, p in model.named_parameters() if "bias" not in name and "LayerNorm" not in name]
    others = [p for name, p in model.named_parameters() if "bias" in name or "LayerNorm" in name]
    groups = [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"])
    steps, warmup, share = len(batches) // settings["accumulation"], settings["warmup"], settings["accumulation"]
    values = []
    model.train()
    for step in range(steps):
        factor = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * factor
        for rows in batches[step * share : (step + 1) * share]:
            value = loss([model.tokenize(data[rows][column]) for column in data.column_names])
            (value / share).backward()
            values.append(value.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
    return values


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_and_weights_are_those_of_a_loop_written_by_hand(tmp_path: Path, accumulation: int) -> None:
    model, twin = tiny_model(**NO_DROPOUT), tiny_model(**NO_DROPOUT)
    values: list[float] = []
    loss = losses.MultipleNegativesRankingLoss(model)
    loss.register_forward_hook(lambda *call: values.append(call[2].item()))
    run = trainer(
        tmp_path,
        model,
        loss=loss,
        weight_decay=0.1,
        max_grad_norm=0.5,
        gradient_accumulation_steps=accumulation,
        optim="adamw_torch",
    )
    result = run.train()
    batches = [rows for update in run._schedule.updates() for rows in update.batches]
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup": 2}
    expected = by_hand(twin, batches, tiny_data(), accumulation=accumulation, **settings)
    assert result.global_step == 12 // accumulation
    assert values == pytest.approx(expected, rel=1e-5)
    logged_by_hand = [sum(expected[i : i + accumulation]) / accumulation for i in range(0, 12, accumulation)]
    assert logged(run, "loss") == pytest.approx(logged_by_hand, rel=1e-5)
    assert result.training_loss == pytest.approx(sum(expected) / 12, rel=1e-5)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3, "lr_scheduler_type": "cosine", "weight_decay": 0.01},
        {"learning_rate_mapping": {"word_embeddings": 1e-2}, "optim": "adamw_torch", "max_grad_norm": 0.0},
    ],
)
def test_history_is_that_of_sentence_transformers_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    pytest.importorskip("accelerate", reason="sentence-transformers' trainer needs accelerate")
    st = pytest.importorskip("sentence_transformers")
    tiny_model(**NO_DROPOUT).save_pretrained(tmp_path / "model", create_model_card=False)
    common = {"warmup_steps": 0.1, "eval_strategy": "steps", "eval_steps": 4, "report_to": "none", **settings}
    data, evaluation_data = tiny_data(90), tiny_data(20)
    ours = trainer(
        tmp_path,
        SentenceTransformer(str(tmp_path / "model"), device="cpu"),
        train_dataset=data,
        eval_dataset=evaluation_data,
        **common,
    )
    ours.train()
    model = st.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    given = {name: getattr(ours.args, name) for name in ("learning_rate", "num_train_epochs", "logging_steps")}
    theirs = st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(
            str(tmp_path / "st"),
            batch_sampler="no_duplicates",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **{**given, **common},
        ),
        train_dataset=data,
        eval_dataset=evaluation_data,
        loss=st.sentence_transformer.losses.MultipleNegativesRankingLoss(model),
    )
    theirs.train()
    expected = theirs.state.log_history[:-1]  # without the summary
    history = [entry for entry in ours.state.log_history[:-1] if entry["step"] > 0]  # ST does not evaluate at step 0
    assert len(history) == len(expected) > 8
    for entry, reference in zip(history, expected, strict=True):
        assert entry == pytest.approx({name: reference[name] for name in entry}, rel=2e-5)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_model(**NO_DROPOUT), num_train_epochs=12, learning_rate=3e-3)
    run.train()
    values = logged(run, "loss")
    assert sum(values[-6:]) / 6 < sum(values[:6]) / 6 - 0.3


def test_a_trained_model_is_left_ready_to_encode(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    assert not any(module.training for module in run.model.modules())
    run.model.train()
    run.train()  # and it may be trained again
    assert not run.model.training


def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(tmp_path: Path) -> None:
    histories, states = [], []
    for seed in (1, 1, 2):
        run = trainer(tmp_path / str(len(states)), max_steps=4, seed=seed)
        run.train()
        histories.append(logged(run, "loss"))
        states.append(weights(run.model))
    assert histories[0] == histories[1] != histories[2]
    assert same_weights(run.model, states[2])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_batches_come_from_the_sampler_that_is_named(tmp_path: Path) -> None:
    seen: list[Any] = []

    def sampler(dataset: Dataset, **settings: Any) -> list[list[int]]:
        seen.append(settings)
        return [[0, 1], [2, 3]]

    run = trainer(tmp_path, batch_sampler=sampler, max_steps=3, dataloader_drop_last=True, data_seed=5)
    run.train()
    assert seen[0]["batch_size"] == 8
    assert (seen[0]["drop_last"], seen[0]["seed"]) == (True, 5)
    assert [update.batches for update in run._schedule.updates()] == [[[0, 1]], [[2, 3]], [[0, 1]]]
    assert run.state.epoch == 1.5


@pytest.mark.parametrize(("epochs", "steps"), [(1, 6), (2, 12), (1.5, 9), (0.1, 1)])
def test_epochs_may_be_fractions(tmp_path: Path, epochs: float, steps: int) -> None:
    run = trainer(tmp_path, num_train_epochs=epochs, learning_rate=0.0)
    assert run.train().global_step == steps
    assert run.state.epoch == pytest.approx(steps / 6)


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "cosine_with_restarts"]
)
def test_schedules_are_transformers(tmp_path: Path, schedule: str) -> None:
    from transformers import get_scheduler

    run = trainer(tmp_path, max_steps=5, lr_scheduler_type=schedule, warmup_steps=0.4)
    run.train()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    reference = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=5)
    expected = []
    for _ in range(5):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert logged(run, "learning_rate") == expected


def test_weight_decay_and_learning_rates_by_name(tmp_path: Path) -> None:
    loss = losses.MultipleNegativesRankingLoss(tiny_model())
    args = arguments(tmp_path, weight_decay=0.1, learning_rate_mapping={"word_embeddings": 0.5})
    names = {parameter: name for name, parameter in loss.named_parameters()}
    settings = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in create_optimizer(loss, args).param_groups
        for parameter in group["params"]
    }
    assert settings.keys() == set(names.values())
    assert settings["model.encoder.embeddings.word_embeddings.weight"] == (0.5, 0.1)
    assert settings["model.encoder.embeddings.position_embeddings.weight"] == (1e-3, 0.1)
    assert settings["model.encoder.embeddings.LayerNorm.weight"] == (1e-3, 0.0)
    assert settings["model.encoder.encoder.layer.0.attention.self.key.bias"] == (1e-3, 0.0)
    with pytest.raises(ValueError, match="no trainable parameter matches 'nothing'"):
        create_optimizer(loss, arguments(tmp_path, learning_rate_mapping={"nothing": 1.0}))


# --- log, evaluation, best model --------------------------------------------------------------------------------------


def test_history_and_log_file_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(
        tmp_path,
        evaluator=tiny_evaluator(),
        eval_dataset=tiny_data(20),
        eval_strategy="steps",
        eval_steps=5,
        logging_steps=4,
        disable_tqdm=False,
        include_num_input_tokens_seen=True,
    )
    result = run.train()
    history = run.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 5, 10, 12]
    assert [entry["step"] for entry in history if "loss" in entry] == [4, 8, 12]
    assert set(history[-1]) >= {"train_loss", "train_runtime", "train_samples_per_second", "epoch", "step"}
    assert history[-1]["num_input_tokens_seen"] > 12 * 8 * 3 * 3
    assert result.metrics["train_loss"] == result.training_loss == pytest.approx(sum(logged(run, "loss")) / 3)
    lines = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in entry} for line, entry in zip(lines, history, strict=True)] == history
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line)
    printed = capsys.readouterr()
    assert "spearman_cosine" in printed.out
    assert printed.out.count("\n") == 7  # header, steps 0, 4, 5, 8, 10, 12
    assert "step 4/12  loss " in printed.err


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_strategy": "epoch"}, [6, 12]),
        ({"logging_strategy": "no"}, []),
        ({"logging_steps": 5, "logging_first_step": True}, [1, 5, 10]),
        ({"logging_steps": 0.25}, [3, 6, 9, 12]),
    ],
)
def test_logging_strategies(tmp_path: Path, settings: dict[str, Any], steps: list[int]) -> None:
    run = trainer(tmp_path, learning_rate=0.0, **settings)
    run.train()
    assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == steps


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "no", "eval_on_start": True}, [0]),
        ({"eval_strategy": "epoch"}, [0, 6, 12]),
        ({"eval_strategy": "steps", "eval_steps": 0.5}, [0, 6, 12]),
        ({"eval_strategy": "steps", "eval_steps": 5, "eval_delay": 6}, [10, 12]),
        ({"eval_strategy": "epoch", "max_steps": 8}, [0, 6, 8]),
    ],
)
def test_evaluation_strategies(tmp_path: Path, settings: dict[str, Any], steps: list[int]) -> None:
    run = trainer(tmp_path, learning_rate=0.0, eval_dataset=tiny_data(10), **settings)
    run.train()
    assert [entry["step"] for entry in run.state.log_history if "eval_loss" in entry] == steps


def test_evaluation_is_in_float32_without_dropout_and_disturbs_nothing(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", fp16=True)
    watched = trainer(
        tmp_path / "b",
        fp16=True,
        evaluator=[tiny_evaluator(), tiny_evaluator(20)],
        eval_dataset=tiny_data(20),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=20,
    )
    plain.train()
    watched.train()
    assert logged(plain, "loss") == logged(watched, "loss")
    assert same_weights(watched.model, weights(plain.model))
    model, data = watched.model.eval(), tiny_data(20)
    loss = losses.MultipleNegativesRankingLoss(model)
    with torch.no_grad():
        expected = loss([model.tokenize(data[column][:]) for column in data.column_names]).item()
    assert logged(watched, "eval_loss")[-1] == pytest.approx(expected, rel=1e-5)
    assert watched.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "b" / "eval").is_dir()


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    class Worsen(TrainerCallback):
        """Makes the evaluation loss grow after step 4, so that step 4 is the best."""

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 4:
                kept.update(weights(model))
                for parameter in model.parameters():
                    parameter.data.zero_()

    kept: dict[str, torch.Tensor] = {}
    run = trainer(
        tmp_path,
        callbacks=[Worsen],
        eval_dataset=tiny_data(16),
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        save_total_limit=1,
        learning_rate=1e-2,
        load_best_model_at_end=True,
        save_only_model=True,
    )
    run.train()
    assert run.state.best_global_step == 4
    assert run.state.best_metric == logged(run, "eval_loss")[1]
    assert same_weights(run.model, kept)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-4"]


def test_best_strategy_saves_only_what_is_better(tmp_path: Path) -> None:
    class Metric:
        primary_metric = "score"
        values = iter([9.0, 1.0, 3.0, math.nan, 2.0])

        def __call__(self, model: Any, output_path: Any = None, epoch: float = -1, steps: int = -1) -> dict[str, float]:
            return {"score": next(self.values)}

    run = trainer(
        tmp_path,
        max_steps=8,
        evaluator=Metric(),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        metric_for_best_model="score",
    )
    run.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert run.state.best_metric == 3.0
    with pytest.raises(ValueError, match="eval_nothing was not computed; there are eval_loss"):
        trainer(
            tmp_path,
            eval_dataset=tiny_data(8),
            eval_strategy="epoch",
            metric_for_best_model="nothing",
            load_best_model_at_end=True,
            save_strategy="epoch",
        ).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2  # it failed before the first step


def test_callbacks_may_stop_training(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_dataset=tiny_data(8),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        learning_rate=0.0,  # so that the loss never gets better than at the first evaluation
        load_best_model_at_end=True,
    )
    assert run.train().global_step == 3


def test_saved_model_has_a_card_and_loads(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", evaluator=tiny_evaluator(), eval_strategy="epoch")
    run.train()
    run.save_model(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "MultipleNegativesRankingLoss" in card
    assert "per_device_train_batch_size" in card
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert same_weights(loaded, weights(run.model))


def test_history_table_has_a_row_a_step() -> None:
    history = [
        {"eval_loss": 2.0, "eval_dev_spearman_cosine": 0.25, "epoch": 0, "step": 0},
        {"loss": 1.5, "learning_rate": 1e-3, "grad_norm": 1.0, "epoch": 0.5, "step": 5},
        {"eval_loss": 1.0, "eval_dev_spearman_cosine": 0.5, "epoch": 0.5, "step": 5},
        {"train_runtime": 3.0, "train_loss": 1.5, "epoch": 0.5, "step": 5},
    ]
    lines = history_table(history, ["eval_dev_spearman_cosine"]).splitlines()
    assert lines[0].split() == ["epoch", "step", "loss", "lr", "eval", "loss", "dev_spearman_cosine"]
    assert lines[1].split() == ["0.0000", "0", "2.0000", "0.2500"]
    assert lines[2].split() == ["0.5000", "5", "1.5000", "1.00e-03", "1.0000", "0.5000"]
    assert len(lines) == 3


# --- data and bad input -----------------------------------------------------------------------------------------------


def test_prompts_change_what_is_trained_on(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / str(i), max_steps=1, prompts=prompts) for i, prompts in enumerate([None, "a: "])]
    for run in runs:
        run.train()
    assert runs[0].state.num_input_tokens_seen < runs[1].state.num_input_tokens_seen


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (["a", "b"], TypeError, "`train_dataset`: expected one datasets.Dataset, got list"),
        ({"a": tiny_data(2)}, TypeError, "got dict"),
        (Dataset.from_dict({"anchor": [], "positive": []}), ValueError, "has no rows"),
        (Dataset.from_dict({"label": [1]}), ValueError, "expected text columns"),
        (Dataset.from_dict({"a": ["x"], "label": [1], "score": [1]}), ValueError, "at most one of"),
        (
            Dataset.from_dict({"a": ["x", "y"], "b": ["x", None]}),
            TypeError,
            "column 'b', row 1: expected a string, got No",
        ),
        (
            Dataset.from_dict({"a": ["x"], "label": ["y"]}),
            TypeError,
            "column 'label', row 0: expected a number, got 'y'",
        ),
        (Dataset.from_dict({"a": ["x"], "b": [1]}), TypeError, "column 'b', row 0: expected a string, got 1"),
    ],
)
def test_bad_training_data_names_the_cell(tmp_path: Path, data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path, train_dataset=data)


def test_bad_trainer_arguments(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(TypeError, match=r"`model`: expected a triton_st\.SentenceTransformer, got str"):
        SentenceTransformerTrainer(model="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`args`: expected triton_st.SentenceTransformerTrainingArguments, got .*dict"):
        SentenceTransformerTrainer(model=model, args={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`loss`: expected a loss module"):
        trainer(tmp_path, model, loss="mnrl")
    with pytest.raises(ValueError, match="another model"):
        trainer(tmp_path, model, loss=losses.MultipleNegativesRankingLoss(tiny_model()))
    with pytest.raises(ValueError, match="eval_strategy='steps'` needs an eval_dataset or an evaluator"):
        trainer(tmp_path, model, eval_strategy="steps")
    with pytest.raises(ValueError, match="`train_dataset`: training needs one"):
        trainer(tmp_path, model, train_dataset=None).train()
    with pytest.raises(ValueError, match="4 rows do not fill one batch of 8"):
        trainer(tmp_path, model, train_dataset=tiny_data(4), dataloader_drop_last=True).train()
    with pytest.raises(ValueError, match="no column nothing"):
        trainer(tmp_path, model, prompts={"nothing": "x"})
    made = trainer(tmp_path, model, loss=losses.MultipleNegativesRankingLoss)
    assert isinstance(made.loss, losses.MultipleNegativesRankingLoss)


def test_an_output_folder_that_cannot_be_written_fails_before_training(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OSError, match="file"):
        trainer(blocker / "run").train()
