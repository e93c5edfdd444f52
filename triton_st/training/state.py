"""The state of a training run between two steps, and how a checkpoint of it is written and restored."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState

from triton_st.models.files import replacing_folder
from triton_st.sentence_transformer import SentenceTransformer
from triton_st.training import checkpointing
from triton_st.training.checkpointing import CheckpointError
from triton_st.training.loss_scaling import LossScaler
from triton_st.training.optimization import create_optimizer, create_scheduler, resume_schedule
from triton_st.training_args import SentenceTransformerTrainingArguments


@dataclass
class RunningLoss:
    """Sums of the loss: since the last log entry, which was at `logged_step`, and up to it."""

    since_log: float = 0.0
    total: float = 0.0
    logged_step: int = 0
    diagnostics: dict[str, float] = field(default_factory=dict)
    """Sums of the loss' diagnostics since the last log entry."""


class Clock:
    """Seconds of a run, of which `evaluation` were spent evaluating; goes on from where a checkpoint left it."""

    def __init__(self, seconds: float = 0.0, evaluation: float = 0.0) -> None:
        self.evaluation = evaluation
        self._started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Seconds so far, evaluation included."""
        return time.perf_counter() - self._started


class RunState:
    """Optimizer, schedule, loss scale, counters and history of one run.

    Args:
        model: the model that is trained.
        loss: the loss module; the optimizer covers its parameters, the model's among them.
        args: the run's settings.
        num_updates: optimizer steps of the whole run.
        data: gives a digest of the training data; called once a checkpoint is written or read.
        callbacks: callbacks whose exportable state is kept too.

    Attributes:
        trainer: transformers' `TrainerState`.
        stopped_early: a callback had ended the run when the checkpoint was written.
        clock: seconds that the run has taken, in all its processes.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        loss: nn.Module,
        args: SentenceTransformerTrainingArguments,
        num_updates: int,
        data: Callable[[], str],
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.model, self.loss, self.args = model, loss, args
        self.parameters = [p for p in loss.parameters() if p.requires_grad]
        self.optimizer = create_optimizer(loss, args)
        self.scheduler = create_scheduler(self.optimizer, args, num_updates)
        self.scaler = LossScaler(enabled=args.fp16)
        self.running = RunningLoss()
        self.trainer = TrainerState()
        self.stopped_early = False
        self.clock = Clock()
        self._num_updates = num_updates
        self._callbacks = {type(c).__name__: c for c in callbacks if isinstance(c, ExportableState)}
        self._data, self._arguments = data, args.to_dict()
        self._set_totals()

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        return checkpointing.describe_run(self._data(), self._arguments)

    def _set_totals(self) -> None:
        self.trainer.max_steps = self._num_updates
        self.trainer.num_train_epochs = int(-(-self.args.num_train_epochs // 1))
        self.trainer.train_batch_size = self.args.train_batch_size
        self.trainer.compute_steps(self.args, self._num_updates)

    def save(self, output_dir: Path, *, stopping: bool) -> None:
        """Write `checkpoint-{step}` in `output_dir`, whole or not at all; delete the oldest beyond `save_total_limit`.

        Args:
            output_dir: the run's folder.
            stopping: a callback has asked for the end of the run.
        """
        trainer = self.trainer
        folder = output_dir / f"checkpoint-{trainer.global_step}"
        if trainer.best_global_step:
            best = output_dir / f"checkpoint-{trainer.best_global_step}"
            if best == folder or best.is_dir():
                trainer.best_model_checkpoint = str(best)
        exported: Any = {name: callback.state() for name, callback in self._callbacks.items()}
        trainer.stateful_callbacks = exported
        with replacing_folder(folder, whole=True) as temporary:
            self.model.save_pretrained(str(temporary), create_model_card=False)
            trainer.save_to_json(str(temporary / checkpointing.TRAINER_STATE))
            if not self.args.save_only_model:
                tensors = checkpointing.optimizer_tensors(self.optimizer, self.loss)
                tensors |= {f"loss.{name}": value for name, value in self._loss_weights().items()}
                tensors |= checkpointing.random_tensors(self.args.device)
                values = {
                    **self._description,
                    "schedule_step": self.scheduler.last_epoch,
                    "scaler": self.scaler.state_dict(),
                    "running_loss": asdict(self.running),
                    "clock": {"seconds": self.clock.seconds, "evaluation": self.clock.evaluation},
                    "stopped_early": stopping and trainer.global_step < trainer.max_steps,
                    "card": self.model.model_card_data.to_state(),
                }
                checkpointing.write_state(temporary, tensors, values)
        checkpointing.rotate_checkpoints(output_dir, self.args.save_total_limit, trainer.best_model_checkpoint)

    def restore(self, folder: Path) -> None:
        """Put everything, the model and torch's random numbers included, back where `save` wrote `folder`.

        Raises:
            CheckpointError: the folder is damaged, or of a run on other data, batches or weights.
        """
        tensors, saved = checkpointing.read_state(folder)
        try:
            checkpointing.check_same_run(folder, saved, self._description)
            checkpointing.load_model(self.model, folder)
            checkpointing.load_optimizer_tensors(self.optimizer, self.loss, tensors)
            for name, value in self._loss_weights().items():
                value.copy_(tensors[f"loss.{name}"])
            resume_schedule(self.scheduler, saved["schedule_step"])
            self.scaler.load_state_dict(saved["scaler"])
            self.running = RunningLoss(**saved["running_loss"])
            self.clock = Clock(**saved["clock"])
            self.stopped_early = saved["stopped_early"]
            self.trainer = TrainerState.load_from_json(str(folder / checkpointing.TRAINER_STATE))
            exported: Any = self.trainer.stateful_callbacks
            for name, callback in self._callbacks.items():
                vars(callback).update(exported.get(name, {"attributes": {}})["attributes"])
            card = self.model.model_card_data
            vars(card).update(vars(type(card).from_state(saved["card"])))
            checkpointing.load_random_tensors(tensors, self.args.device)
        except CheckpointError:
            raise
        except json.JSONDecodeError as error:
            raise CheckpointError(f"checkpoint {folder}: damaged ({error})") from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {folder}: does not fit this run ({error!r})") from error
        self._set_totals()

    def _loss_weights(self) -> dict[str, Tensor]:
        """Weights that the loss has beside the model's."""
        model_weights = {id(p) for p in self.model.parameters()}
        return {name: p.detach() for name, p in self.loss.named_parameters() if id(p) not in model_weights}
