"""gather_across_devices: two processes, with batches of different sizes, equal one process on the joined batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.small_model import WORDS, small_model
from triton_st import losses

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"directions": ALL, "hardness_mode": "all_negatives", "hardness_strength": 2.0},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction", "margin": 0.05},
    {"false_negatives": "mask_duplicates"},
    {"cached": True, "directions": ALL},
    {"matryoshka": True},
]

SPLITS = (3, 6)
"""How many of the seven rows are the first process'."""


def _columns(rows: slice) -> list[list[str]]:
    """Three columns of seven texts, two of them the same."""
    words = [WORDS[i % len(WORDS)] for i in range(100)]
    columns = [[" ".join(words[3 * row + 20 * column :][: 2 + row]) for row in range(7)] for column in range(3)]
    columns[0][5] = columns[0][1]
    return [column[rows] for column in columns]


def _step(settings: dict[str, Any], rows: slice) -> tuple[float, torch.Tensor]:
    """The loss of some rows, and the gradient of all parameters in one vector."""
    settings = dict(settings)
    model = small_model().eval()
    cached, matryoshka = settings.pop("cached", False), settings.pop("matryoshka", False)
    gathering = {"gather_across_devices": dist.is_initialized(), **settings}
    if cached:
        loss: Any = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2, **gathering)
    else:
        loss = losses.MultipleNegativesRankingLoss(model, **gathering)
    if matryoshka:
        loss = losses.MatryoshkaLoss(model, loss, [4, model.get_embedding_dimension()])
    value = loss([model.tokenize(column) for column in _columns(rows)])
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = []
    for split in SPLITS:
        rows = slice(0, split) if rank == 0 else slice(split, 7)
        results += [_step(settings, rows) for settings in SETTINGS]
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_process, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for settings, *both in zip(SETTINGS * len(SPLITS), *ranks, strict=True):
        value, gradient = _step(settings, slice(None))
        # as DistributedDataParallel averages
        assert sum(x for x, _ in both) / 2 == pytest.approx(value, rel=1e-5), settings
        error = (sum(x for _, x in both) / 2 - gradient).norm()
        assert error <= 1e-5 * gradient.norm(), settings


def test_gathering_alone_says_so_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model().eval()
    columns = [model.tokenize(column) for column in _columns(slice(None))]
    values = [losses.MultipleNegativesRankingLoss(model, gather_across_devices=x)(columns) for x in (False, True)]
    assert torch.equal(*values)
    assert "nothing to gather" in caplog.text
