"""Building the C++ kernels: the cache and its key, many processes at once, every way to fail, every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lesser import lesser_forms

from triton_st import extension

USE = """
import sys, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from triton_st import backend, extension, ops
    {setup}
    x = torch.randn(5, 7)
    for _ in range(2):
        torch.testing.assert_close(ops.cosine_similarity(x, x), torch.cosine_similarity(x[:, None], x[None], dim=-1))
    ops.packed_mean_pool(x, torch.tensor([0, 5]))
    print(backend.select(x))
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning):
            print("WARNING", warning.message)
"""

# A library that compiles in a moment stands in for the kernels where only the building of it is tested.
SMALL_SOURCE = """
#include <torch/csrc/stable/library.h>
STABLE_TORCH_LIBRARY(triton_st_cpp, m) { m.def("answer() -> int"); }
"""
BUILD_SMALL = """
from pathlib import Path
from triton_st import extension
extension.sources = lambda: [Path({source!r})]
print(extension.load())
"""


def start(code: str, cache: Path | str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "TRITON_ST_CACHE": str(cache), **environment}
    env.pop("TRITON_ST_BACKEND", None)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=900)  # several builds at once may share two cores with other tests
    assert process.returncode == 0, err
    return out


# --- the key ---


def test_key_is_stable_and_names_what_the_library_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_ST_CXXFLAGS", raising=False)
    keys = [extension.cache_key()]
    assert extension.cache_key() == keys[0]

    monkeypatch.setenv("TRITON_ST_CXXFLAGS", "-DSOMETHING")
    keys.append(extension.cache_key())
    monkeypatch.setenv("TRITON_ST_CXXFLAGS", "-march=x86-64")  # other processor features
    keys.append(extension.cache_key())
    monkeypatch.delenv("TRITON_ST_CXXFLAGS")

    monkeypatch.setattr(torch, "__version__", "9.9.9")
    keys.append(extension.cache_key())
    monkeypatch.undo()

    changed = tmp_path / extension.sources()[0].name
    changed.write_bytes(extension.sources()[0].read_bytes() + b"\n")
    others = extension.sources()[1:]
    monkeypatch.setattr(extension, "sources", lambda: [changed, *others])
    keys.append(extension.cache_key())
    assert len(set(keys)) == len(keys)


def test_headers_are_part_of_the_key() -> None:
    names = {path.name for path in extension.sources()}
    assert {"gemm.h", "vector.h", "mean_pool.cpp", "cosine_similarity.cpp", "mnrl_rows.cpp"} <= names


def test_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_ST_CACHE", str(tmp_path / "own"))
    assert extension.cache_root() == tmp_path / "own"
    monkeypatch.delenv("TRITON_ST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert extension.cache_root() == tmp_path / "triton_st"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert extension.cache_root() == tmp_path / ".cache" / "triton_st"


# --- the build ---


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[str]]:
    """Code that builds or finds a small library, the cache it built into, and what three processes at once found."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "small.cpp"
    source.write_text(SMALL_SOURCE)
    code = BUILD_SMALL.format(source=str(source))
    found = [finish(process).strip() for process in [start(code, folder / "cache") for _ in range(3)]]
    return code, folder / "cache", found


def test_processes_that_start_at_once_share_one_build(built: tuple[str, Path, list[str]]) -> None:
    _, cache, found = built
    assert len(set(found)) == 1
    library = Path(found[0])
    assert library.is_file()
    assert [path for path in cache.iterdir() if path.is_dir()] == [library.parent]


def test_a_later_process_compiles_nothing(built: tuple[str, Path, list[str]]) -> None:
    code, cache, found = built
    forbid = "import torch.utils.cpp_extension as e\ndef load(*a, **k): raise AssertionError\ne.load = load\n"
    assert finish(start(forbid + code, cache)).strip() == found[0]


def test_what_a_killed_build_left_behind_does_no_harm(built: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    code, _, found = built
    key = Path(found[0]).parent.name
    for abandoned in (tmp_path / key, tmp_path / f"{key}.building.killed"):
        abandoned.mkdir()
        (abandoned / "lock").touch()  # on which torch's own loader would wait for ever
    (tmp_path / f"{key}.lock").touch()
    assert Path(finish(start(code, tmp_path)).strip()).is_file()


# --- failures: plain PyTorch serves, and one warning says why ---


def falls_back(cache: Path | str, setup: str = "", **environment: str) -> str:
    """The one warning of a process in which the kernels cannot be had."""
    served, *warnings = finish(start(USE.format(setup=setup), cache, **environment)).splitlines()
    assert served == "reference"
    assert len(warnings) == 1, warnings
    assert "plain PyTorch serves instead" in warnings[0]
    return warnings[0]


def test_no_compiler(tmp_path: Path) -> None:
    assert "no C++ compiler: 'no-such-g++'" in falls_back(tmp_path, CXX="no-such-g++")


def test_failing_build_shows_the_compiler_s_first_error(tmp_path: Path) -> None:
    source = tmp_path / "small.cpp"
    source.write_text(SMALL_SOURCE + "int first = does_not_exist;\nint second = nor_does_this;\n")
    setup = f"from pathlib import Path; extension.sources = lambda: [Path({str(source)!r})]"
    warning = falls_back(tmp_path / "cache", setup)
    assert "small.cpp:4" in warning
    assert "error:" in warning
    assert "does_not_exist" in warning
    assert "nor_does_this" not in warning
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]  # nothing half-built stays


def test_flags_that_the_compiler_refuses(tmp_path: Path) -> None:
    assert "unrecognized" in falls_back(tmp_path, TRITON_ST_CXXFLAGS="-fno-such-flag")


def test_home_that_cannot_be_written(tmp_path: Path) -> None:
    # A file where the folder should be: unlike permissions, this also stops the superuser.
    (tmp_path / "file").touch()
    warning = falls_back("", HOME=str(tmp_path / "file"), XDG_CACHE_HOME="")
    assert "set TRITON_ST_CACHE to a writable folder" in warning


def test_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / extension.cache_key() / f"{extension.NAME}.so"
    broken.parent.mkdir()
    broken.write_bytes(b"no library")
    assert str(broken) in falls_back(tmp_path)


# --- instruction sets ---

PARITY = """
import sys
from functools import partial
sys.path.insert(0, {tests!r})
import torch
from tolerance import assert_matches_reference
from triton_st import backend, ops, reference

def cpu(*shape):
    return 1 + torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

with backend.use("cpp"):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for d in (1, 7, 50, 64):
            a, b, tokens = cpu(9, d).to(dtype), cpu(18, d).to(dtype), cpu(140, d).to(dtype)
            cu_seqlens = torch.tensor([0, 1, 1, 6, 140])
            heads, sums = cpu(140, 3, 2, d).to(dtype), (tokens, tokens.flip(0), cpu(d), cpu(1, d)[0])
            attention = heads, cu_seqlens, 134, 0.1, torch.tensor(7)
            mask = torch.rand(4, 35, generator=torch.Generator().manual_seed(d)) > 0.5
            for op, plain, inputs, magnitude in (
                (ops.packed_mean_pool, reference.packed_mean_pool, (tokens, cu_seqlens), 0),
                (ops.masked_mean_pool, reference.masked_mean_pool, (tokens.view(4, 35, d), mask), 0),
                (ops.cosine_similarity, reference.cosine_similarity, (a, b), 0),
                (ops.cosine_similarity, reference.cosine_similarity, (a.float().mul(1e30).to(dtype), b), 0),
                (ops.mnrl_loss, reference.mnrl_loss, (a, b, 5.0), 5.0),
                (ops.packed_attention, reference.packed_attention, attention, 0),
                (*(partial(m.packed_attention, relative_bias=cpu(2, 267)) for m in (ops, reference)), attention, 0),
                (ops.dropout_add_layer_norm, reference.dropout_add_layer_norm, (*sums, 1e-5), 0),
                (ops.layer_norm_mean_pool, reference.layer_norm_mean_pool, (*sums, 1e-5, cu_seqlens), 0),
                (ops.bias_gelu, reference.bias_gelu, (tokens, cpu(d)), 0),
            ):
                if not inputs[0].isinf().any():
                    assert_matches_reference(op, plain, inputs, magnitude=magnitude)
    for bad in (float("nan"), float("inf")):
        a = cpu(4, 50)
        a[1, 3] = bad
        assert ops.cosine_similarity(a, a)[1].isnan().all() and ops.mnrl_loss(a, a).isnan()
    zero = torch.zeros(3, 50, requires_grad=True)
    ops.mnrl_loss(zero, cpu(3, 50)).backward()
    assert not zero.grad.any()
"""


def test_forms_for_lesser_processors(tmp_path: Path) -> None:
    """The processor that tests run on has one instruction set; the forms for lesser ones are built and run as well."""
    code = PARITY.format(tests=str(Path(__file__).parent))
    forms = lesser_forms("x86-64-v3", "x86-64")
    for process in [start(code, tmp_path, TRITON_ST_CXXFLAGS=flags) for flags in forms]:
        finish(process)
