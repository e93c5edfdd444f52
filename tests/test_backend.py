"""Which backend serves a tensor, and what happens where the one asked for cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from triton_st import backend, info, ops


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_cpu_tensors_go_to_cpp_and_float64_to_the_reference() -> None:
    assert backend.select(torch.zeros(1)) == "cpp"
    assert backend.select(torch.zeros(1, dtype=torch.float64)) == "reference"


def test_use_forces_and_restores() -> None:
    with backend.use("reference"):
        assert backend.select(torch.zeros(1)) == "reference"
        with backend.use("cpp"):
            assert backend.select(torch.zeros(1)) == "cpp"
        assert backend.select(torch.zeros(1)) == "reference"
    assert backend.select(torch.zeros(1)) == "cpp"


def test_use_restores_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), backend.use("reference"):
        raise RuntimeError("inside")
    assert backend.select(torch.zeros(1)) == "cpp"


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_forced_backend_never_falls_back_in_silence(name: str) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    with backend.use(name), pytest.raises(backend.BackendUnavailableError, match=r"float64"):
        ops.cosine_similarity(x, x)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="triton, cpp, reference; got 'cuda'"), backend.use("cuda"):
        pass
    done = run("import triton_st.backend", TRITON_ST_BACKEND="fast")
    assert done.returncode != 0
    assert "TRITON_ST_BACKEND must be one of" in done.stderr


def test_environment_variable_forces() -> None:
    code = "import torch; from triton_st import backend; print(backend.select(torch.zeros(1)))"
    assert run(code, TRITON_ST_BACKEND="reference").stdout.strip() == "reference"


def test_triton_on_cpu_needs_the_interpreter() -> None:
    code = (
        "import torch; from triton_st import backend, ops\n"
        "with backend.use('triton'): ops.cosine_similarity(torch.zeros(1, 2), torch.zeros(1, 2))"
    )
    done = run(code, TRITON_INTERPRET="0")
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1" in done.stderr


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    done = run("import sys, triton_st; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_info_names_the_serving_backend_and_the_reason_against_the_other() -> None:
    report = info.report()
    assert "served by cpp" in report
    for package, version in info.versions().items():
        assert package in report
        assert version in report
