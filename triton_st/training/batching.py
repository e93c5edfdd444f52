"""Which rows every optimizer step of a run trains on, from its first step or from any later one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from triton_st.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler
from triton_st.training_args import BatchSamplers, SentenceTransformerTrainingArguments


def batch_sampler(dataset: Any, args: SentenceTransformerTrainingArguments, batch_size: int) -> Any:
    """Return the sampler that `args.batch_sampler` names; a class or function is called as ST calls it."""
    seed = args.seed if args.data_seed is None else args.data_seed
    settings: dict[str, Any] = {"batch_size": batch_size, "drop_last": args.dataloader_drop_last, "seed": seed}
    if isinstance(args.batch_sampler, BatchSamplers):
        plain = args.batch_sampler == BatchSamplers.BATCH_SAMPLER
        return (DefaultBatchSampler if plain else NoDuplicatesBatchSampler)(dataset, **settings)
    assert callable(args.batch_sampler)
    generator = torch.Generator().manual_seed(seed)
    return args.batch_sampler(dataset, valid_label_columns=None, generator=generator, **settings)


@dataclass(frozen=True)
class Update:
    """One optimizer step's share of the data."""

    batches: list[list[int]]  # rows of each batch; several with gradient accumulation
    progress: float  # epochs done after this step
    starts_epoch: bool
    ends_epoch: bool


class BatchSchedule:
    """The batches of a run, grouped into updates.

    Args:
        dataset: the training rows.
        args: batch size, sampler, seeds, gradient accumulation, `max_steps` and `num_train_epochs`.

    Raises:
        ValueError: an epoch holds no batch.
    """

    def __init__(self, dataset: Any, args: SentenceTransformerTrainingArguments) -> None:
        self.sampler = batch_sampler(dataset, args, args.train_batch_size)
        self.batches_per_update = args.gradient_accumulation_steps
        if self._updates_in(0) == 0:
            raise ValueError(
                f"`dataloader_drop_last`: {len(dataset)} rows do not fill one batch of {args.train_batch_size}"
            )
        self.num_updates = args.max_steps
        if args.max_steps < 0:
            part, whole = math.modf(args.num_train_epochs)
            self.num_updates = sum(self._updates_in(epoch) for epoch in range(int(whole)))
            self.num_updates += math.ceil(part * self._updates_in(int(whole))) if part else 0

    def updates(self, done: int = 0) -> Iterator[Update]:
        """Give the run's updates after the first `done` ones."""
        before = 0  # updates of the epochs gone by
        for epoch in itertools.count():
            count = self._updates_in(epoch)
            if done < before + count:
                self._set_epoch(epoch)
                batches = list(self.sampler)
                for number in range(max(done - before, 0), min(count, self.num_updates - before)):
                    end = min((number + 1) * self.batches_per_update, len(batches))
                    yield Update(
                        batches[number * self.batches_per_update : end],
                        progress=epoch + end / len(batches),
                        starts_epoch=number == 0,
                        ends_epoch=number == count - 1,
                    )
            before += count
            if before >= self.num_updates:
                return

    def rows(self, done: int = 0) -> list[int]:
        """Rows of the epoch that the update after the first `done` ones belongs to, from there on, in their order."""
        rows: list[int] = []
        for update in self.updates(done):
            rows += itertools.chain.from_iterable(update.batches)
            if update.ends_epoch:
                break
        return rows

    def _updates_in(self, epoch: int) -> int:
        if hasattr(self.sampler, "num_batches"):  # ours: exact, and different from epoch to epoch
            batches = self.sampler.num_batches(epoch)
        else:
            self._set_epoch(epoch)
            batches = len(self.sampler)
        return math.ceil(batches / self.batches_per_update)

    def _set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
