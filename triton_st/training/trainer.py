"""`SentenceTransformerTrainer`: a training loop under sentence-transformers' names that fits on a few screens.

Every batch is cut from texts tokenised ahead, beside the training, and rides through the encoder as one packed forward;
evaluation runs in float32. A value that is not finite stops training, and a killed run goes on from its last checkpoint
bit for bit.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput

from triton_st import losses, plots
from triton_st.evaluation import SequentialEvaluator
from triton_st.models.files import remove_leftovers
from triton_st.models.packing import to_device
from triton_st.sentence_transformer import SentenceTransformer
from triton_st.training import checkpointing
from triton_st.training.batching import BatchSchedule, Update, batch_sampler
from triton_st.training.divergence import TrainingDiverged, check_parameters, diverged
from triton_st.training.log import LOG_NAME, Interrupt, Progress, TrainingLog, deferred_interrupt, history_table
from triton_st.training.state import Clock, RunningLoss, RunState
from triton_st.training.tokenized import TokenizedDataset
from triton_st.training_args import SentenceTransformerTrainingArguments

logger = logging.getLogger(__name__)

EVALUATIONS = "eval"
"""Folder in `output_dir` that evaluators write into."""


class SentenceTransformerTrainer:
    """Trains a `SentenceTransformer` as sentence-transformers' trainer of this name does, on packed batches.

    Args:
        model: the model; it is moved to `args.device` and trained in place.
        args: settings; ST's defaults if None.
        train_dataset: a `datasets.Dataset` of text columns (anchor, positive[, negative, ...]) and at most one label.
        eval_dataset: the same, for the evaluation loss.
        loss: a loss module that holds `model`, or a function model -> such a module;
            `MultipleNegativesRankingLoss(model)` if None (ST would take CoSENTLoss, which wants scores).
        evaluator: an evaluator, or a list of them, to be called one after the other.
        callbacks: `transformers.TrainerCallback`s. They may set `should_log`, `should_evaluate`, `should_save` and
            `should_training_stop` of the control.

    Attributes:
        state: transformers' `TrainerState`: `global_step`, `log_history`, `best_metric` and so on.

    Raises:
        TypeError: an argument of another type.
        ValueError: arguments that do not go together, or data as in `TokenizedDataset`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        args: SentenceTransformerTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        loss: nn.Module | Callable[[SentenceTransformer], nn.Module] | None = None,
        evaluator: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    ) -> None:
        if not isinstance(model, SentenceTransformer):
            raise TypeError(f"`model`: expected a triton_st.SentenceTransformer, got {type(model).__name__}")
        args = SentenceTransformerTrainingArguments() if args is None else args
        if not isinstance(args, SentenceTransformerTrainingArguments):
            raise TypeError(
                "`args`: expected triton_st.SentenceTransformerTrainingArguments, "
                f"got {type(args).__module__}.{type(args).__name__}"
            )
        if args.eval_strategy != IntervalStrategy.NO and eval_dataset is None and evaluator is None:
            strategy = IntervalStrategy(args.eval_strategy).value
            raise ValueError(f"`eval_strategy={strategy!r}` needs an eval_dataset or an evaluator")
        self.args = args
        self.model = model.to(args.device)
        if args.activation_checkpointing:
            model.gradient_checkpointing_enable()
        self.loss = self._prepare_loss(loss)
        self.evaluator = SequentialEvaluator(list(evaluator)) if isinstance(evaluator, (list, tuple)) else evaluator
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._train_data = self._tokenized(train_dataset, "train_dataset")
        self._eval_data = self._tokenized(eval_dataset, "eval_dataset")
        self.output_dir = Path(str(args.output_dir))
        self.state, self.control = TrainerState(), TrainerControl()
        self._training_log: TrainingLog | None = None
        self._progress: Progress | None = None
        self._clock = Clock()
        self.callbacks = CallbackHandler([DefaultFlowCallback, *callbacks], self.model, None, None, None)
        self.control = self.callbacks.on_init_end(args, self.state, self.control)

    def _prepare_loss(self, loss: nn.Module | Callable[[SentenceTransformer], nn.Module] | None) -> nn.Module:
        if loss is None:
            loss = losses.MultipleNegativesRankingLoss(self.model)
        elif not isinstance(loss, nn.Module) and callable(loss):
            loss = loss(self.model)
        if not isinstance(loss, nn.Module):
            raise TypeError(f"`loss`: expected a loss module or a function that makes one, got {type(loss).__name__}")
        if getattr(loss, "model", self.model) is not self.model:
            raise ValueError("`loss`: holds another model than the one to be trained")
        return loss.to(self.args.device)

    def _tokenized(self, dataset: Any, name: str) -> TokenizedDataset | None:
        if dataset is None:
            return None
        prompts = self.args.prompts
        if isinstance(prompts, dict) and name == "eval_dataset":  # which may have other columns
            prompts = {column: prompt for column, prompt in prompts.items() if column in dataset.column_names}
        text_ids = getattr(self.loss, "wants_text_ids", False)
        return TokenizedDataset(dataset, self.model.tokenize, prompts, name, text_ids=text_ids)

    def _on_device(self, data: TokenizedDataset, rows: list[int]) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Cut a batch: packed features by column, and labels if there are any."""
        labels = data.labels(rows)
        features = [to_device(column, self.args.device) for column in data.batch(rows)]
        return features, None if labels is None else labels.to(self.args.device)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback; see `callbacks` above."""
        self.callbacks.add_callback(callback)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None) -> TrainOutput:
        """Train, evaluate, log and write checkpoints as `args` says.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last one in `output_dir`. The run ends as if
                it had never been stopped: same weights, same history, bit for bit (on the same device and threads).

        Returns:
            `TrainOutput(global_step, training_loss, metrics)`. The model is left in evaluation mode, ready to encode.

        Raises:
            TrainingDiverged: a weight, the loss or a gradient is not finite, or gradients overflow at every loss scale.
            CheckpointError, ValueError: nothing to resume from, or a run on other data or other batches.
            KeyboardInterrupt: on SIGINT, after the step at hand and a checkpoint (unless save_strategy is no).
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with deferred_interrupt() as interrupt, _torch_settings(self.args):
            self._prepare_run(checkpointing.find_checkpoint(resume, self.output_dir) if resume else None)
            assert self._progress is not None
            started, first_step = time.perf_counter(), self.state.global_step
            with closing(self._progress), self._tokenizing():
                self._loop(interrupt)
            self.model.eval()
            return self._finish(time.perf_counter() - started, self.state.global_step - first_step)

    def _loop(self, interrupt: Interrupt) -> None:
        args, state, run, progress = self.args, self.state, self._run, self._progress
        assert progress is not None
        self.control = self.callbacks.on_train_begin(args, state, self.control)
        self.control.should_training_stop |= run.stopped_early
        evaluates = args.eval_on_start or (args.eval_strategy != IntervalStrategy.NO and args.eval_delay <= 0)
        if state.global_step == 0 and evaluates:
            self._best_model_metric(self.evaluate())  # a name that is not there fails now, not hours later

        for update in self._schedule.updates(done=state.global_step):
            if self.control.should_training_stop:
                return
            if update.starts_epoch:
                self.control = self.callbacks.on_epoch_begin(args, state, self.control)
            self.control = self.callbacks.on_step_begin(args, state, self.control)
            begun, tokens_before = time.perf_counter(), state.num_input_tokens_seen
            learning_rate = float(run.scheduler.get_last_lr()[0])
            loss, grad_norm = self._step(update)
            state.global_step += 1
            state.epoch = update.progress
            tokens = state.num_input_tokens_seen - tokens_before
            progress.advance(loss, learning_rate, tokens, time.perf_counter() - begun)
            self.control = self.callbacks.on_step_end(args, state, self.control)
            if update.ends_epoch or self.control.should_training_stop:
                self.control = self.callbacks.on_epoch_end(args, state, self.control)
            saved = self._log_evaluate_save(grad_norm, learning_rate)
            if interrupt.requested:
                if not saved and args.save_strategy != SaveStrategy.NO:
                    self._run.save(self.output_dir, stopping=self.control.should_training_stop)
                raise KeyboardInterrupt

    def _step(self, update: Update) -> tuple[float, float]:
        """Accumulate the gradients of an update's batches and step; return the mean loss and the gradient norm."""
        assert self._train_data is not None
        run = self._run
        self.model.train()
        values: list[Tensor] = []
        diagnostics: list[dict[str, Tensor]] = []
        for rows in update.batches:
            features, labels = self._on_device(self._train_data, rows)
            self.state.num_input_tokens_seen += sum(column["input_ids"].numel() for column in features)
            with self.model.activations_in(self.args.activation_dtype):
                loss = self.loss(features, labels)
            (loss / len(update.batches) * run.scaler.scale).backward()
            values.append(loss.detach().float())
            diagnostics.append(getattr(self.loss, "last_diagnostics", {}))

        gradients = [p.grad for p in run.parameters if p.grad is not None]
        run.scaler.unscale_(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        facts = [value for batch in diagnostics for value in batch.values()]
        read = torch.stack([*values, norm, *facts]).tolist()  # the one synchronisation of a step
        loss_values, grad_norm, read_facts = read[: len(values)], read[len(values)], read[len(values) + 1 :]
        for value, rows in zip(loss_values, update.batches, strict=True):
            if not math.isfinite(value):
                raise self._diverged(f"the loss is {value}", rows)
        overflow = not math.isfinite(grad_norm)
        if overflow and not run.scaler.enabled:
            raise self._diverged(f"the norm of the gradients is {grad_norm}", update.batches[-1])
        run.scaler.update(overflow=overflow)
        if run.scaler.exhausted:
            skipped = run.scaler.skipped_in_a_row
            raise self._diverged(
                f"gradients overflow at every loss scale ({skipped} steps skipped)", update.batches[-1]
            )
        if not overflow:
            if self.args.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(run.parameters, self.args.max_grad_norm, norm)
            run.optimizer.step()
            run.scheduler.step()
        run.optimizer.zero_grad()
        mean = sum(loss_values) / len(loss_values)
        run.running.since_log += mean
        names = [name for batch in diagnostics for name in batch]
        for name, value in zip(names, read_facts, strict=True):
            sums = run.running.diagnostics
            sums[name] = sums.get(name, 0.0) + value / len(update.batches)
        return mean, grad_norm

    def _diverged(self, what: str, rows: list[int]) -> TrainingDiverged:
        assert self._train_data is not None
        features, _ = self._on_device(self._train_data, rows)
        with self.model.activations_in(self.args.activation_dtype):
            step = self.state.global_step + 1
            return diverged(what, model=self.model, loss=self.loss, features=features, step=step, rows=rows)

    def _log_evaluate_save(self, grad_norm: float, learning_rate: float) -> bool:
        """Do what the callbacks asked for after a step; return whether a checkpoint was written."""
        state, run, running = self.state, self._run, self._run.running
        if self.control.should_log and state.global_step > running.logged_step:
            steps = state.global_step - running.logged_step
            entry = {"loss": running.since_log / steps}
            entry |= {name: total / steps for name, total in running.diagnostics.items()}
            if math.isfinite(grad_norm):  # a skipped step has none
                entry["grad_norm"] = grad_norm
            entry["learning_rate"] = learning_rate
            run.running = RunningLoss(0.0, running.total + running.since_log, state.global_step)
            assert self._progress is not None
            extra: dict[str, float] = {"tokens_per_second": self._progress.tokens_per_second()}
            if run.scaler.enabled:
                extra |= {"loss_scale": run.scaler.scale, "skipped_steps": run.scaler.skipped}
            self._log(entry, extra)
        if self.control.should_evaluate:
            is_best = self._note_best(self.evaluate())
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
        if not self.control.should_save:
            return False
        self._run.save(self.output_dir, stopping=self.control.should_training_stop)
        self.control = self.callbacks.on_save(self.args, state, self.control)
        return True

    def _log(self, values: dict[str, float], extra: dict[str, float] | None = None) -> None:
        """Add an entry to the history and, with `extra`, to the log file. The history holds no wall-clock times."""
        entry: dict[str, Any] = {**values, "epoch": self.state.epoch}
        if self.args.include_num_input_tokens_seen != "no":
            entry["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        entry["step"] = self.state.global_step
        self.state.log_history.append(entry)
        if self._training_log is not None and self._progress is not None:
            self._training_log.append({**entry, **(extra or {})})
            self._progress.show(entry)
        self.control = self.callbacks.on_log(self.args, self.state, self.control, values)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Compute the evaluation loss and call the evaluator, in float32 without dropout; log and return the metrics.

        Returns:
            `eval_loss` and the loss' diagnostics (means over rows) if there is an `eval_dataset`; the evaluator's
            metrics as `eval_<name>`.
        """
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        training = self.model.training
        self.model.eval()
        try:
            if self._eval_data is not None:
                metrics |= self._evaluation_loss(self._eval_data)
            if self.evaluator is not None:
                folder = self.output_dir / EVALUATIONS
                folder.mkdir(parents=True, exist_ok=True)
                found = self.evaluator(
                    self.model, output_path=str(folder), epoch=self.state.epoch, steps=self.state.global_step
                )
                found = found if isinstance(found, dict) else {"evaluator": found}
                metrics |= {f"eval_{name.removeprefix('eval_')}": float(value) for name, value in found.items()}
        finally:
            self.model.train(training)
        self._clock.evaluation += time.perf_counter() - started
        self._log(metrics)
        self.control = self.callbacks.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _evaluation_loss(self, data: TokenizedDataset) -> dict[str, float]:
        """Return the mean over rows of the loss, and of its diagnostics if it has any."""
        totals: dict[str, float] = {"eval_loss": 0.0}
        count = 0
        for rows in batch_sampler(self.eval_dataset, self.args, self.args.eval_batch_size):
            found = {"eval_loss": self.loss(*self._on_device(data, rows))}
            found |= {f"eval_{name}": value for name, value in getattr(self.loss, "last_diagnostics", {}).items()}
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value.item() * len(rows)
            count += len(rows)
        return {name: total / max(count, 1) for name, total in totals.items()}

    def _best_model_metric(self, metrics: dict[str, float]) -> float | None:
        """The value of `metric_for_best_model`, None if there is no such argument."""
        if self.args.metric_for_best_model is None:
            return None
        name = f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"
        if name not in metrics:
            raise ValueError(
                f"`metric_for_best_model`: {name} was not computed; there are {', '.join(sorted(metrics))}"
            )
        return metrics[name]

    def _note_best(self, metrics: dict[str, float]) -> bool:
        """Remember the metric if it is the best so far; NaN never is."""
        value, state = self._best_model_metric(metrics), self.state
        if value is None:
            return False
        sign = 1.0 if self.args.greater_is_better else -1.0
        is_best = sign * value > (-math.inf if state.best_metric is None else sign * state.best_metric)
        if is_best:
            state.best_metric, state.best_global_step = value, state.global_step
        return is_best

    # --- the run's beginning and end, its checkpoints -----------------------------------------------------------------

    def _prepare_run(self, checkpoint: Path | None) -> None:
        """Set up batches, run state and log, anew or from a checkpoint."""
        if self._train_data is None:
            raise ValueError("`train_dataset`: training needs one, got None")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.output_dir)
        torch.manual_seed(self.args.seed)
        self.loss.zero_grad()  # of a run that was stopped midway
        self._schedule = BatchSchedule(self.train_dataset, self.args)
        self._run = RunState(
            self.model,
            self.loss,
            self.args,
            self._schedule.num_updates,
            self._train_data.digest,
            self.callbacks.callbacks,
        )
        if checkpoint is not None:
            self._run.restore(checkpoint)
            checkpointing.forget_evaluations(self.output_dir / EVALUATIONS, self._run.trainer.global_step)
        elif earlier := checkpointing.list_checkpoints(self.output_dir):
            logger.warning("%s already holds %s of an earlier run", self.output_dir, earlier[-1].name)
        self.state, self.control, self._clock = self._run.trainer, TrainerControl(), self._run.clock
        self.callbacks.optimizer, self.callbacks.lr_scheduler = self._run.optimizer, self._run.scheduler
        self._training_log = TrainingLog(self.output_dir / LOG_NAME)
        self._training_log.restart(self.state.log_history)
        for update in itertools.islice(self._schedule.updates(self.state.global_step), 1):
            check_parameters(self.loss, step=self.state.global_step + 1, rows=update.batches[0])
        self._progress = Progress(self.state.max_steps, self.state.global_step, quiet=bool(self.args.disable_tqdm))

    @contextmanager
    def _tokenizing(self) -> Iterator[None]:
        """Tokenise beside the training inside the block, in the order of the next epoch's batches."""
        assert self._train_data is not None
        self._train_data.start(self._schedule.rows(self.state.global_step))
        try:
            yield
        finally:
            for data in (self._train_data, self._eval_data):
                if data is not None:
                    data.stop()

    def _finish(self, seconds: float, steps: int) -> TrainOutput:
        """Load the best model if asked to, log the summary, fill the model card, draw the curves."""
        args, state, run = self.args, self.state, self._run
        train_loss = (run.running.total + run.running.since_log) / max(state.global_step, 1)
        metrics = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(self._rows_per_update() * steps / seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3),
            "train_loss": train_loss,
        }
        self._log(metrics)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            checkpointing.load_model(self.model, self.output_dir / Path(state.best_model_checkpoint).name)
            self.model.model_card_data.set_best_model_step(state.best_global_step or 0)
        self._fill_card()
        plots.plot_training(state.log_history, self.output_dir / "training.png")
        if not args.disable_tqdm:
            print(history_table(state.log_history, self._headline_metrics()))
        self.control = self.callbacks.on_train_end(args, state, self.control)
        return TrainOutput(state.global_step, train_loss, metrics)

    def _rows_per_update(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps

    def _headline_metrics(self) -> list[str]:
        """The metrics worth a column in the table: Spearman of cosine, and what the evaluator calls primary."""
        names = dict.fromkeys(name for entry in self.state.log_history for name in entry if name.startswith("eval_"))
        primary = f"eval_{getattr(self.evaluator, 'primary_metric', None)}"
        return [name for name in names if name == primary or name.endswith("spearman_cosine")]

    def _fill_card(self) -> None:
        self.model.model_card_data.set_training_run(
            args=self.args,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            loss=self.loss,
            log_history=self.state.log_history,
            training_time=self._clock.seconds,
            evaluation_time=self._clock.evaluation,
        )

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Save the model with its card, by default into `args.output_dir`; it loads in sentence-transformers too."""
        self.model.save_pretrained(str(self.output_dir if output_dir is None else output_dir))


@contextmanager
def _torch_settings(args: SentenceTransformerTrainingArguments) -> Iterator[None]:
    """Apply `full_determinism` and `tf32` while training and put torch's settings back afterwards."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    if args.full_determinism:
        torch.use_deterministic_algorithms(True)
    if args.tf32 is not None and args.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)
