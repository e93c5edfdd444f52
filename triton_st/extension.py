"""Compiles and loads the C++ kernels of `csrc/`, once per machine, into a cache.

The cache key covers the sources, the flags, the compiler with the processor features it sees, and torch's version. A
build runs in a temporary directory under a file lock and is renamed into place, so several processes may start at once
and a killed build leaves nothing that a later one could trip over.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

NAME = "triton_st_cpp"
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # the same expression gives the same bits wherever it stands; csrc/vector.h fuses by name
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)


class BuildError(RuntimeError):
    """The C++ kernels could not be compiled; the message holds the first error."""


def sources() -> list[Path]:
    """The C++ files and headers, in the wheel beside this file or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if folder.is_dir():
            return sorted(p for p in folder.iterdir() if p.suffix in (".cpp", ".h"))
    raise BuildError(f"no csrc directory beside {here}")


def cache_root() -> Path:
    """`$TRITON_ST_CACHE`, else `$XDG_CACHE_HOME/triton_st`, else `~/.cache/triton_st`."""
    if override := os.environ.get("TRITON_ST_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triton_st"


def compiler() -> str:
    """The C++ compiler: `$CXX`, else g++."""
    return os.environ.get("CXX") or "g++"


@functools.cache
def _amx_permitted() -> bool:
    """Ask Linux to let this process, and those that it forks, use AMX's tiles; it kills whoever uses them unasked.

    From then on signal stacks have to hold the tiles: `sigaltstack` refuses smaller ones. Where a thread has such a one
    already Linux refuses, and the kernels are built without AMX.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    syscall = ctypes.CDLL(None).syscall
    syscall.restype = ctypes.c_long
    return syscall(ctypes.c_long(arch_prctl), ctypes.c_long(request_permission), ctypes.c_long(tile_data)) == 0


def flags() -> list[str]:
    """Compiler flags; `$TRITON_ST_CXXFLAGS` is appended (say, `-mno-avx512f` to build the AVX2 form)."""
    without = () if _amx_permitted() else ("-DTRITON_ST_NO_AMX",)
    return [*FLAGS, *without, *os.environ.get("TRITON_ST_CXXFLAGS", "").split()]


def _compiler_fingerprint() -> str:
    """Every macro the compiler predefines under our flags: its version and the features of this processor."""
    command = [compiler(), *flags(), "-dM", "-E", "-x", "c++", "/dev/null"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise BuildError(f"no C++ compiler: {compiler()!r} was not found (install g++, or set CXX)") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(_first_error(error.stderr)) from error
    return done.stdout


def cache_key() -> str:
    """Names the build: equal keys mean interchangeable libraries."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (" ".join(flags()), compiler(), _compiler_fingerprint(), torch.__version__):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    by_compiler = [line for line in lines if re.search(r"\berror:", line)]
    others = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return (by_compiler or others or lines[-1:] or ["the compiler said nothing"])[0]


@contextlib.contextmanager
def _build_environment() -> Iterator[None]:
    """ninja's own directory first on PATH: a virtual environment need not be activated for its ninja to be found."""
    path = os.environ.get("PATH", "")
    with contextlib.suppress(ImportError):
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, path])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _compile(target: Path) -> None:
    from torch.utils import cpp_extension

    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.building.", dir=target.parent))
    try:
        with _build_environment():
            cpp_extension.load(
                NAME,
                [str(p) for p in sources() if p.suffix == ".cpp"],
                extra_cflags=flags(),
                build_directory=str(scratch),
                is_python_module=False,
            )
        shutil.rmtree(target, ignore_errors=True)  # without a library, or we would not be here
        scratch.rename(target)  # the loaded library stays mapped: its file only gets a new name
    except RuntimeError as error:
        raise BuildError(_first_error(str(error))) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@functools.cache
def load() -> Path:
    """Compile the kernels unless the cache has them, load them as `torch.ops.triton_st_cpp`, return the library's path.

    Raises:
        BuildError: no compiler, no writable cache, or a failed build.
    """
    target = cache_root() / cache_key()
    library = target / f"{NAME}.so"
    if not library.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with (target.parent / f"{target.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not library.is_file():
                    _compile(target)
                    return library
        except OSError as error:
            raise BuildError(
                f"the kernel cache is not usable: {error} (set TRITON_ST_CACHE to a writable folder)"
            ) from error
    torch.ops.load_library(str(library))
    return library


@functools.cache
def problem() -> str | None:
    """Why the compiled kernels cannot be used; None if they can. Compiles at the first call."""
    try:
        load()
    except (BuildError, OSError) as error:
        return str(error)
    return None


@functools.cache
def available() -> bool:
    """Whether the compiled kernels are there; says once, in a warning, why not."""
    if reason := problem():
        warnings.warn(
            f"triton_st's C++ kernels could not be built; plain PyTorch serves instead. First error: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
