"""Every Triton kernel compiles for GPUs that are not here, and the check that says so can fail."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from triton.backends.compiler import GPUTarget

from triton_st import kernels
from triton_st.kernels import aot

CHECK = [sys.executable, "-m", "triton_st.kernels.aot"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without the interpreter: an interpreted kernel cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def table() -> str:
    """What `--quick` prints, having found nothing wrong."""
    result = run(*CHECK, "--quick")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def rows(table: str, kernel: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith(kernel + " ")]


def test_every_kernel_compiles_for_nvidia_and_amd(table: str) -> None:
    for kernel in aot.PROMISES:
        archs = {row.split()[1] for row in rows(table, kernel)}
        assert archs == {"sm_90", "gfx942"}, f"{kernel} was compiled for {archs}"
    assert " 0 violations" in table


def test_promises_are_ones_that_are_checked() -> None:
    checked = {aot.TENSOR_CORES, aot.WIDE_LOADS, aot.WIDE_STORES}
    assert checked == {promise for promises in aot.PROMISES.values() for promise in promises}


def test_products_use_tensor_cores(table: str) -> None:
    for kernel in (name for name, promises in aot.PROMISES.items() if aot.TENSOR_CORES in promises):
        for row in rows(table, kernel):
            assert ("HGMMA" if "sm_90" in row else "mfma_f32") in row, row
            # of every kernel the largest tile is compiled; attention's end with the head size
            assert any(tile in row for tile in ("128x64x64", "128x128x64", "64x64x64", "64x32x64")), row


def test_no_launcher_is_missing_from_the_check() -> None:
    called = {
        launcher.__name__
        for launcher, _ in aot.calls(aot.PRECISIONS["fp16"][0], 384)  # names only, nothing is launched
    }
    assert called == set(kernels.__all__)


GOOD = aot.Report(
    job=aot.Job("module", "_similarity_kernel", "fp16", 384, aot.ARCHS[0], (), (), (), (("num_warps", 4),)),
    registers=128, spills=0, shared_bytes=65_536, tensor_core="HMMA x4", load_bits=128, store_bits=128, seconds=1.0,
)  # fmt: skip


def changed(**changes: object) -> list[str]:
    job = {k: changes.pop(k) for k in ("kernel", "precision", "d") if k in changes}
    return dataclasses.replace(GOOD, job=dataclasses.replace(GOOD.job, **job), **changes).violations()


def test_what_is_a_violation() -> None:
    assert changed() == []
    assert changed(spills=2) == ["2 spills"]
    assert changed(shared_bytes=110_000) == ["110000 bytes of shared memory, sm_80 has 101376"]
    assert changed(tensor_core="") == ["no tensor-core instruction"]
    assert changed(tensor_core="", precision="tf32") == ["no tensor-core instruction"]
    assert changed(tensor_core="", precision="fp32") == []  # exact products have none
    assert changed(load_bits=64) == ["loads of 64 bits at most"]
    assert changed(load_bits=32, d=50) == []  # rows of 100 bytes are not aligned
    assert changed(kernel="_spread_kernel", store_bits=16) == ["stores of 16 bits at most"]
    assert changed(kernel="_unheard_of") == ["promises nothing: list it in its module's PROMISES"]


def test_refuses_interpreted_kernels() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([*CHECK, "--quick"], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "unset TRITON_INTERPRET" in result.stderr


UNALIGNED = """
import dataclasses
from triton_st.kernels import aot
[arch] = [a for a in aot.ARCHS if a.name == "sm_80"]
job = next(j for j in aot.jobs([arch], {"fp16": (384,)}) if j.kernel == "_copy_kernel")
for aligned in (job, dataclasses.replace(job, divisible=())):
    report = aot.inspect(aligned)
    print(report.load_bits, [v for v in report.violations() if "loads" in v])
"""


def test_sees_narrow_loads_in_the_machine_code() -> None:
    """The same kernel, told nothing about alignment, loads 2 bytes at a time: the check must see the difference."""
    result = run(sys.executable, "-c", UNALIGNED)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == ["128 []", "16 ['loads of 16 bits at most']"]


def test_targets_are_the_ones_promised() -> None:
    assert [(a.name, a.target) for a in aot.ARCHS] == [
        ("sm_80", GPUTarget("cuda", 80, 32)),
        ("sm_90", GPUTarget("cuda", 90, 32)),
        ("sm_100", GPUTarget("cuda", 100, 32)),
        ("gfx942", GPUTarget("hip", "gfx942", 64)),
    ]
