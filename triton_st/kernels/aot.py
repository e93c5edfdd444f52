"""Proof without a GPU: compiles every kernel ahead of time and looks at the machine code.

    python -m triton_st.kernels.aot [--quick] [--arch sm_90 ...] [--jobs N]

The launchers themselves run, on meta tensors and with launching recorded, so what is compiled is what would be
launched: same block sizes, same options, same specialisation of arguments. Fails on a spilled register, on a matrix
product without tensor-core instructions (exact float32 products have none), on kernels without 128-bit accesses at
aligned shapes, and on more shared memory than the GPU has.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from triton_st import kernels
from triton_st.kernels.common import Call, Launch, recording


@dataclasses.dataclass(frozen=True)
class Arch:
    """A GPU family: how Triton names it, what a block may use, how its tensor-core instructions look."""

    name: str
    target: GPUTarget
    shared_bytes: int
    tensor_core: str


ARCHS = (
    # 99 KiB is what sm_86 and sm_89 have of it; sm_80 itself has 163 KiB.
    Arch("sm_80", GPUTarget("cuda", 80, 32), 101_376, r"\bHMMA\."),
    Arch("sm_90", GPUTarget("cuda", 90, 32), 232_448, r"\bHGMMA\.|\bHMMA\."),
    Arch("sm_100", GPUTarget("cuda", 100, 32), 232_448, r"\bUTC\w*MMA|\bHMMA\."),
    Arch("gfx942", GPUTarget("hip", "gfx942", 64), 65_536, r"\bv_mfma_\w+"),
)
TENSOR_CORES, WIDE_LOADS, WIDE_STORES = "tensor cores", "wide loads", "wide stores"
"""What a kernel's module may promise of it in `PROMISES`; a kernel that reads a few numbers promises nothing."""

_MODULES = [
    importlib.import_module(f"{kernels.__name__}.{found.name}")
    for found in pkgutil.iter_modules(kernels.__path__)
    if found.name != "aot"
]
PROMISES: dict[str, tuple[str, ...]] = {
    kernel: promises for module in _MODULES for kernel, promises in getattr(module, "PROMISES", {}).items()
}
"""Of each kernel by name: what its machine code must show (`PROMISES` of the module that it is in)."""

POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
PRECISIONS = {
    "fp16": (torch.float16, "highest"),
    "bf16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "fp32": (torch.float32, "highest"),
}
WIDTHS = {"fp16": (50, 384, 768, 1024), "bf16": (384,), "tf32": (384,), "fp32": (50, 384)}
"""Rows of 50 numbers are no multiples of 16 bytes; those of the others are."""
STREAMED = {("fp16", 50), ("fp16", 384), ("fp16", 768), ("fp32", 384)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel to compile: picklable, and hashable to find what several launches share."""

    module: str
    kernel: str
    precision: str
    d: int
    arch: Arch
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def shape(self) -> str:
        """The block sizes and flags, for the table."""
        flags = [k.lower() for k, v in self.constants if v is True]
        blocks = [str(v) for k, v in self.constants if k.startswith("BLOCK")]
        options = dict(self.options)
        stages = f"/{options['num_stages']}" if "num_stages" in options else ""
        return " ".join(["x".join(blocks), f"w{options['num_warps']}{stages}", *flags])


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a job."""

    job: Job
    registers: int
    spills: int
    shared_bytes: int
    tensor_core: str
    load_bits: int
    store_bits: int
    seconds: float

    def violations(self) -> list[str]:
        """The rules that this kernel breaks."""
        job, found = self.job, []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared_bytes > job.arch.shared_bytes:
            found.append(f"{self.shared_bytes} bytes of shared memory, {job.arch.name} has {job.arch.shared_bytes}")
        promises = PROMISES.get(job.kernel)
        if promises is None:
            return [*found, "promises nothing: list it in its module's PROMISES"]
        if TENSOR_CORES in promises and job.precision != "fp32" and not self.tensor_core:
            found.append("no tensor-core instruction")
        item = PRECISIONS[job.precision][0].itemsize
        aligned = job.d * item % 16 == 0
        if aligned and WIDE_LOADS in promises and self.load_bits < 128:
            found.append(f"loads of {self.load_bits} bits at most")
        if aligned and WIDE_STORES in promises and self.store_bits < 128:
            found.append(f"stores of {self.store_bits} bits at most")
        return found


def calls(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """Every launcher, at small sizes (small tiles, split sums) and at large ones: the modules' `examples`."""
    for module in _MODULES:
        if hasattr(module, "examples"):
            yield from module.examples(dtype, d)


def _job(launch: Launch, precision: str, d: int, arch: Arch) -> Job:
    """What Triton's own launcher would compile for these arguments."""
    kernel, _, arguments = launch
    signature, constants, divisible = [], [], []
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None:
            kind = "constexpr"
        elif isinstance(value, Tensor):
            kind = POINTERS[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            kind = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            kind = "constexpr"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, value))
        if aligned:
            divisible.append(i)
    options = {k: v for k, v in arguments.items() if k in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")}
    return Job(
        kernel.fn.__module__, kernel.fn.__name__, precision, d, arch,
        tuple(signature), tuple(constants), tuple(divisible), tuple(options.items()),
    )  # fmt: skip


def jobs(archs: list[Arch], widths: dict[str, tuple[int, ...]]) -> list[Job]:
    """The distinct kernels that the launchers launch for each precision at each width.

    Those that are no products know a width only by how far it is a multiple of 16 bytes: `STREAMED` suffice for them.
    """
    found: dict[tuple[Any, ...], Job] = {}
    for arch in archs:
        for precision, ds in widths.items():
            dtype, matmul_precision = PRECISIONS[precision]
            previous = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(matmul_precision)
            try:
                for d in ds:
                    with recording(arch.target.backend) as launches:
                        for launcher, arguments in calls(dtype, d):
                            launcher(*arguments)
                    for launch in launches:
                        job = _job(launch, precision, d, arch)
                        if TENSOR_CORES in PROMISES.get(job.kernel, ()) or (precision, d) in STREAMED:
                            same = (job.kernel, arch, job.signature, job.constants, job.divisible, job.options)
                            found.setdefault(same, job)
            finally:
                torch.set_float32_matmul_precision(previous)
    return list(found.values())


def fullest(todo: list[Job]) -> list[Job]:
    """Of each kernel and GPU one job, that with the most arguments given; of those, the last (the largest tile)."""
    found: dict[tuple[str, Arch], Job] = {}
    for job in sorted(todo, key=lambda j: sum(kind != "constexpr" for _, kind in j.signature)):
        found[job.kernel, job.arch] = job
    return list(found.values())


def _widest(sass: str, opcodes: str) -> int:
    """Bits moved by the widest of these instructions; one without a width in its name moves 32."""
    suffixes = set(re.findall(rf"\b(?:{opcodes})\b((?:\.\w+)*)", sass))
    widths = [re.search(r"\.(128|64|U16|S16|U8|S8)\b", suffix) for suffix in suffixes]
    return max((int(width[1].lstrip("US")) if width else 32 for width in widths), default=0)


def _nvidia(compiled: Any, job: Job) -> dict[str, Any]:
    """Reads the SASS: LDG / LDGSTS / STG carry their width as a suffix, spills are local loads and stores."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing of registers: {usage!r}")
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    registers, stack = map(int, found.groups())
    return {
        "registers": registers,
        "spills": spills or stack,
        "tensor_core": _instruction(sass, job.arch.tensor_core),
        "load_bits": _widest(sass, "LDG|LDGSTS"),
        "store_bits": _widest(sass, "STG"),
    }


def _amd(compiled: Any, job: Job) -> dict[str, Any]:
    """Reads the assembly and the metadata that LLVM appends to it."""
    code = compiled.asm["amdgcn"]
    counts = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", code)}
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}

    def widest(verb: str) -> int:
        found = re.findall(rf"\b(?:global|buffer|flat)_{verb}_(dwordx4|dwordx3|dwordx2|dword)\b", code)
        return max((widths[name] for name in found), default=0)

    return {
        "registers": counts["vgpr_count"],
        "spills": counts["vgpr_spill_count"],  # scalar registers spill into vector registers, not memory
        "tensor_core": _instruction(code, job.arch.tensor_core),
        "load_bits": widest("load"),
        "store_bits": widest("store"),
    }


def _instruction(code: str, pattern: str) -> str:
    """The most capable instruction found (wgmma before mma: the pattern's order) and how often it stands there."""
    for alternative in pattern.split("|"):
        if found := re.findall(alternative, code):
            return f"{found[0].strip('._').removeprefix('v_')} x{len(found)}"
    return ""


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inspect(job: Job) -> Report:
    """Compile one job and look at what came out."""
    started = time.perf_counter()
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    backend = make_backend(job.arch.target)
    attrs = {(i,): backend.parse_attr("D") for i in job.divisible}
    if job.arch.target.backend == "hip":  # tensors below 2 GiB, as the launcher tells it
        for i, (_, kind) in enumerate(job.signature):
            if kind.startswith("*"):
                attrs[(i,)] = backend.parse_attr("DS" if i in job.divisible else "S")
    source = ASTSource(kernel, dict(job.signature), dict(job.constants), attrs)
    compiled = triton.compile(source, target=job.arch.target, options=dict(job.options))
    read = _amd if job.arch.target.backend == "hip" else _nvidia
    seconds = time.perf_counter() - started
    return Report(job=job, shared_bytes=compiled.metadata.shared, seconds=seconds, **read(compiled, job))


def _print_table(reports: list[Report]) -> None:
    header = f"{'kernel':24}{'arch':8}{'type':6}{'D':>5}  {'blocks, warps/stages':34}{'regs':>5}{'spills':>7}"
    print(f"{header}{'shared':>8}  {'tensor cores':26}{'load':>5}{'store':>6}")
    for r in reports:
        j = r.job
        print(
            f"{j.kernel:24}{j.arch.name:8}{j.precision:6}{j.d:>5}  {j.shape:34}{r.registers:>5}{r.spills:>7}"
            f"{r.shared_bytes:>8}  {r.tensor_core or '-':26}{r.load_bits:>5}{r.store_bits:>6}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table; 1 if a rule is broken."""
    parser = argparse.ArgumentParser(prog="python -m triton_st.kernels.aot", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="of each kernel one form, fp16, two GPUs")
    parser.add_argument("--arch", nargs="+", choices=[a.name for a in ARCHS], help="only these")
    parser.add_argument("--kernel", nargs="+", help="only these kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("an interpreted kernel cannot be compiled: unset TRITON_INTERPRET")
    names = options.arch or (["sm_90", "gfx942"] if options.quick else [a.name for a in ARCHS])
    archs = [a for a in ARCHS if a.name in names]
    todo = fullest(jobs(archs, {"fp16": (384,)})) if options.quick else jobs(archs, WIDTHS)
    todo = [j for j in todo if options.kernel is None or j.kernel in options.kernel]
    started = time.perf_counter()
    reports = []
    with ProcessPoolExecutor(options.jobs) as pool:
        running = {pool.submit(inspect, job): job for job in todo}
        for done, future in enumerate(as_completed(running), 1):
            reports.append(future.result())
            if sys.stderr.isatty() or done % 50 == 0 or done == len(todo):
                end = "\r" if sys.stderr.isatty() and done < len(todo) else "\n"
                seconds = time.perf_counter() - started
                print(f"{done} of {len(todo)} kernels compiled, {seconds:.0f} s", end=end, file=sys.stderr, flush=True)
    order = {job: i for i, job in enumerate(todo)}
    reports.sort(key=lambda r: (r.job.kernel, order[r.job]))
    _print_table(reports)
    broken = [(r, violation) for r in reports for violation in r.violations()]
    for r, violation in broken:
        print(f"VIOLATION {r.job.kernel} {r.job.arch.name} {r.job.precision} D={r.job.d} {r.job.shape}: {violation}")
    print(f"{len(reports)} kernels, {len(broken)} violations")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
