"""Half precision, loss scaling, and the error that stops a run once a number is not finite."""

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
from training_runs import NO_DROPOUT, logged, same_weights, tiny_data, tiny_evaluator, tiny_model, trainer, weights
from transformers import TrainerCallback

from triton_st.training.divergence import TrainingDiverged
from triton_st.training.loss_scaling import LossScaler


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a model this small two threads only wait for each other."""
    with threads(1):
        yield


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_follows_float32_and_keeps_float32_weights(tmp_path: Path, precision: str) -> None:
    full = trainer(tmp_path / "full", tiny_model(**NO_DROPOUT))
    half = trainer(tmp_path / "half", tiny_model(**NO_DROPOUT), **{precision: True})
    full.train()
    half.train()
    tolerance = {"fp16": 2e-3, "bf16": 3e-2}[precision]
    assert logged(half, "loss") == pytest.approx(logged(full, "loss"), rel=tolerance)
    assert logged(half, "loss") != logged(full, "loss")  # it did compute in half
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert half.model.encoder.activation_dtype == torch.float32  # put back


def test_an_overflowing_loss_scale_backs_off_and_trains_on(tmp_path: Path) -> None:
    run = trainer(tmp_path, num_train_epochs=8, fp16=True)

    class HugeScale(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            run._run.scaler.scale = 2.0**40

    run.add_callback(HugeScale)
    before = weights(run.model)
    run.train()
    scaler = run._run.scaler
    lines = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert 1 <= scaler.skipped < 48
    assert scaler.scale == 2.0 ** (40 - scaler.skipped)
    assert scaler.skipped_in_a_row == 0
    assert all(math.isfinite(value) for value in logged(run, "loss"))
    assert len(logged(run, "grad_norm")) == 48 - scaler.skipped  # a skipped step has none
    assert run._run.scheduler.last_epoch == 48 - scaler.skipped  # the schedule waits while steps are skipped
    assert lines[0]["loss_scale"] == 2.0**39
    assert not same_weights(run.model, before)


def test_loss_scaler_grows_and_unscales_exactly() -> None:
    scaler = LossScaler(scale=1000.0, growth_interval=2)
    assert scaler.scale == 512.0
    gradient = torch.tensor([0.1, 3.0]) * scaler.scale
    scaler.unscale_([gradient])
    assert torch.equal(gradient, torch.tensor([0.1, 3.0]))
    for _ in range(2):
        scaler.update(overflow=False)
    assert scaler.scale == 1024.0
    scaler.update(overflow=True)
    assert (scaler.scale, scaler.skipped, scaler.good_steps) == (512.0, 1, 0)
    restored = LossScaler()
    restored.load_state_dict(scaler.state_dict())
    assert restored.state_dict() == scaler.state_dict()
    off = LossScaler(enabled=False)
    off.update(overflow=True)
    assert off.scale == 1.0


# --- when training must stop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"bf16": True}])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_weight_that_is_not_finite_stops_training(tmp_path: Path, precision: dict[str, bool], value: float) -> None:
    run = trainer(tmp_path, **precision)
    name = "encoder.encoder.layer.1.output.dense.weight"
    run.model.get_parameter(name).data[3, 5] = value
    with pytest.raises(
        TrainingDiverged, match=r"step 1:.*layer\.1\.output\.dense\.weight \(1 of 2048 values\)"
    ) as caught:
        run.train()
    assert caught.value.step == 1
    assert len(caught.value.rows) == 8
    assert isinstance(caught.value, FloatingPointError)


def test_a_weight_that_breaks_midway_stops_training_before_it_spreads(tmp_path: Path) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                model.encoder.embeddings.LayerNorm.bias.data[0] = math.nan

    run = trainer(tmp_path, callbacks=[Break])
    with pytest.raises(TrainingDiverged, match=r"step 4: the loss is nan.*embeddings\.LayerNorm\.bias") as caught:
        run.train()
    assert caught.value.step == 4
    others = [value for name, value in run.model.state_dict().items() if not name.endswith("embeddings.LayerNorm.bias")]
    assert all(value.isfinite().all() for value in others)
    assert len(logged(run, "loss")) == 3
    run.model.encoder.embeddings.LayerNorm.bias.data[0] = 0.0  # mended, it trains again, without the stale gradients
    run.callbacks.remove_callback(Break)
    run.train()
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_an_activation_that_is_not_finite_is_named_with_its_rows(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    batch = next(iter(trainer(tmp_path)._tokenized(tiny_data(), "x").batch([0])))  # type: ignore[union-attr]
    poison = int(batch["input_ids"][1])

    def hook(_module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where((inputs[0] == poison)[:, None], torch.inf, output)

    run.model.encoder.embeddings.register_forward_hook(hook)
    with pytest.raises(TrainingDiverged, match=r"the loss is nan.*output of encoder\.embeddings .*column") as e:
        run.train()
    assert 1 <= len(e.value.rows) <= 8


class ExplodingGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.full_like(grads[0], torch.inf)


@pytest.mark.parametrize(("precision", "skipped"), [({}, 0), ({"fp16": True}, 17)])
def test_gradients_that_are_never_finite_stop_training(
    tmp_path: Path, precision: dict[str, bool], skipped: int
) -> None:
    run = trainer(tmp_path, num_train_epochs=5, **precision)
    run.loss.register_forward_hook(lambda *call: ExplodingGradient.apply(call[2]))
    before = weights(run.model)
    message = "gradients overflow at every loss scale" if precision else "the norm of the gradients is"
    with pytest.raises(TrainingDiverged, match=rf"{message}.*gradient of model\.encoder") as caught:
        run.train()
    assert caught.value.step == max(skipped, 1)
    assert same_weights(run.model, before)


@pytest.mark.filterwarnings("ignore:.*collapsed")
@pytest.mark.parametrize(("weight", "bias"), [(0.0, 0.0), (0.0, 1.0), (0.0, 6e4), (2e4, 0.0), (1e-7, 0.0)])
@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"bf16": True}])
def test_extreme_embeddings_train_to_finite_numbers(
    tmp_path: Path, precision: dict[str, bool], weight: float, bias: float
) -> None:
    """Zero vectors, constant vectors, activations at 6e4 and close to float16's smallest."""
    model = tiny_model()
    layer_norm = model.encoder.encoder.layer[-1].output.LayerNorm
    layer_norm.weight.data.fill_(weight)
    layer_norm.bias.data.fill_(bias)
    run = trainer(tmp_path, model, evaluator=tiny_evaluator(20), eval_strategy="epoch", max_steps=4, **precision)
    run.train()
    assert all(math.isfinite(value) for value in logged(run, "loss"))
    assert len(logged(run, "loss")) == 4
    for line in (tmp_path / "training_log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # strict JSON, whatever the metrics are
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_extreme_inputs_train_to_finite_numbers(tmp_path: Path) -> None:
    words = ["", " ", "a", "\U0001f600" * 40, "नमस्ते दुनिया", "word " * 5000, "\x00\ud800"[:1], "é"]
    data = Dataset.from_dict({"anchor": words, "positive": ["same"] * 8, "negative": [""] * 8})
    run = trainer(tmp_path, train_dataset=data, batch_sampler="batch_sampler", fp16=True, learning_rate=1e-2)
    run.train()
    assert all(math.isfinite(value) for value in logged(run, "loss"))
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
