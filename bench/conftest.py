"""Shared by the benchmarks: ours and its peers take turns, and what came of it goes into pytest-benchmark's JSON."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from typing_extensions import Unpack

Run = Callable[[], object]
Limit = tuple[str, Unpack[tuple[Run, ...]]]
"""What is done, and one or more ways of doing it."""
SECONDS_PER_CASE = 0.6
LEAST_ROUND = 2e-4  # seconds; shorter functions run several times a round
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """float16 for torch.float16."""
    return str(dtype).removeprefix("torch.")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The CPU, or the GPU with TRITON_ST_TEST_DEVICE=cuda (as `make gpu` sets it)."""
    return torch.device(os.environ.get("TRITON_ST_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session", autouse=True)
def few_recompilations() -> None:
    """Each compiled peer is a function for all shapes and dtypes; let torch keep a version for each."""
    torch._dynamo.config.recompile_limit = 64


def _time(run: Run, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls


class Interleaved(Protocol):
    """The type of the fixture below."""

    def __call__(self, ours: Run, peers: Mapping[str, Run], *, limit: Limit | None = None, **info: Any) -> None:
        """Time `ours`, each peer and the limit in turns."""


@pytest.fixture
def interleaved(benchmark: BenchmarkFixture) -> Interleaved:
    """Time functions in turns of changing order, so that what else the machine does, and what each leaves in the
    caches, meets them all; record medians in extra_info.

    `limit` is a name and functions that do the least that the work needs (move its bytes, multiply its matrices): ours
    takes at best as long as the quickest of them. Parity is the caller's to assert beforehand. `info` is recorded as
    it is.
    """

    def measure(ours: Run, peers: Mapping[str, Run], *, limit: Limit | None = None, **info: Any) -> None:
        runs: dict[str, Run] = {"triton_st": ours, **peers}
        limits = [f"limit {i}" for i in range(len(limit) - 1)] if limit else []
        runs.update(zip(limits, limit[1:] if limit else (), strict=True))
        for run in runs.values():  # compilation, first touch of memory
            run()
        once = {name: max(_time(run, 1), 1e-7) for name, run in runs.items()}
        calls = {name: max(1, round(LEAST_ROUND / seconds)) for name, seconds in once.items()}
        a_round = sum(once[name] * calls[name] for name in runs)
        rounds = min(max(round(SECONDS_PER_CASE / a_round), 3), 40)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        order = random.Random(0)  # who comes next finds in the caches what the one before left there
        for _ in range(rounds):
            for name, run in order.sample(list(runs.items()), len(runs)):
                samples[name].append(_time(run, calls[name]))
        medians = {name: statistics.median(each) for name, each in samples.items()}
        limit_seconds = min((medians.pop(name) for name in limits), default=None)
        benchmark.extra_info |= {
            **info,
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "medians": medians,
            "ratios": {name: medians[name] / medians["triton_st"] for name in peers},
        }
        if limit is not None and limit_seconds is not None:
            share = limit_seconds / medians["triton_st"]
            benchmark.extra_info |= {"limit": limit[0], "limit_seconds": limit_seconds, "share_of_limit": share}
        benchmark.pedantic(ours, rounds=3, iterations=calls["triton_st"])

    return measure


def training(function: Callable[..., Tensor], *leaves: Tensor) -> Run:
    """Forward and backward of `function` with a gradient of ones, for leaves that want one."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)

    def run() -> tuple[Tensor, ...]:
        result = function(*leaves)
        return torch.autograd.grad(result, leaves, torch.ones_like(result))

    return run


def backward(function: Callable[..., Tensor], *leaves: Tensor) -> Run:
    """Backward of `function` alone, again and again through one graph, with a gradient of ones."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    result = function(*leaves)
    ones = torch.ones_like(result)
    return lambda: torch.autograd.grad(result, leaves, ones, retain_graph=True)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of actual's dtype: parity, before anything is timed."""
    tolerance = 8 * torch.finfo(actual.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=tolerance)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keep what decides speed; leave out what only names this machine."""
    for name in ("node", "release"):
        machine_info.pop(name, None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Keep the statistics, not every sample."""
    output_json["commit_info"].pop("branch", None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
