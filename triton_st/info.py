"""What runs here: versions, devices, and which backend serves which tensors, with the reason where one does not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from triton_st import backend, extension


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Version of every package that results may depend on."""
    packages = ("triton_st", "torch", "triton", "transformers", "tokenizers", "datasets", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _device_lines(device: torch.device) -> list[str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    serving = backend.select(torch.empty(0, device=device))
    lines = [f"{device} ({name}): served by {serving}"]
    problems = {"triton": backend.triton_problem(device), "cpp": backend.cpp_problem(device)}
    return lines + [f"  not by {other}: {problem}" for other, problem in problems.items() if problem]


def report() -> str:
    """The text of `python -m triton_st info`."""
    lines = [f"{name:<14}{version}" for name, version in versions().items()]
    lines += ["", f"threads       {torch.get_num_threads()}", f"kernel cache  {extension.cache_root()}", ""]
    for device in _devices():
        lines += _device_lines(device)
    return "\n".join([*lines, "", "float64 tensors: served by reference everywhere"])
