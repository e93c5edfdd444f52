"""The wheel by itself, outside the checkout: it builds its kernels, trains and encodes."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys, numpy as np, torch, triton_st
from pathlib import Path
assert Path(triton_st.__file__).is_relative_to(sys.argv[1]), triton_st.__file__
from triton_st import SentenceTransformer, backend, extension
from triton_st.__main__ import main
assert backend.select(torch.zeros(1)) == "cpp"
assert extension.load().is_relative_to(sys.argv[2]), extension.load()
tiny = "--max-train-samples 64 --batch-size 32 --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2".split()
assert main(["train", *tiny, "--vocab-size", "300", "--no-progress", "--fp16", "--output-dir", "run"]) == 0
assert np.isfinite(SentenceTransformer("run/final").encode(["A boy plays."])).all()
"""


def test_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels, site, cache, work = (tmp_path / name for name in ("wheels", "site", "cache", "work"))
    work.mkdir()
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("triton_st/csrc/") and name.endswith(".cpp") for name in names)
    assert not any(name.startswith(("tests/", "bench/")) for name in names)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "TRITON_ST_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(site), str(cache)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
