"""Files of texts to files of embeddings: whole or absent, and a killed run goes on, losing and repeating nothing."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from tests.small_model import WORDS, small_model
from triton_st import SentenceTransformer
from triton_st.__main__ import main
from triton_st.encode_file import encode_file

TEXTS = [f"the {a} {b} {i}" if i % 7 else "" for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)]


@pytest.fixture
def model(tmp_path) -> Path:
    small_model().eval().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def run(model: Path, source: Path, target: Path, *flags: str) -> int:
    return main(["encode", str(model), str(source), str(target), "--no-progress", "--chunk-size", "64", *flags])


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("precision", ["float32", "ubinary"])
def test_both_formats(model, source, tmp_path, suffix, precision):
    target = tmp_path / f"out{suffix}"
    assert run(model, source, target, "--precision", precision, "--prompt", "near ", "--truncate-dim", "24") == 0
    expected = SentenceTransformer(model, device="cpu").encode(
        TEXTS, prompt="near ", truncate_dim=24, precision=precision
    )
    if suffix == ".npy":
        found = np.load(target)
    else:
        found = np.stack(parquet.read_table(target)["embedding"].to_numpy(zero_copy_only=False))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert files(tmp_path) == ["model", target.name, "texts.txt"]


def test_no_lines(model, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert run(model, tmp_path / "empty.txt", tmp_path / "out.npy") == 0
    assert np.load(tmp_path / "out.npy").shape == (0, 50)
    assert files(tmp_path) == ["empty.txt", "model", "out.npy"]


def test_standard_input(model, tmp_path):
    command = [sys.executable, "-m", "triton_st", "encode", str(model), "-", str(tmp_path / "out.npy"), "--no-progress"]
    result = subprocess.run(command, input="\n".join(TEXTS[:9]).encode(), capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    expected = SentenceTransformer(model, device="cpu").encode(TEXTS[:9])
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
    assert files(tmp_path) == ["model", "out.npy"]


def interrupted(model: Path, source: Path, target: Path, chunks: int) -> None:
    """A run that fails, as a power cut would end it, when it asks for chunk number `chunks`."""

    class FailingError(Exception):
        pass

    def load() -> SentenceTransformer:
        loaded = SentenceTransformer(model, device="cpu")
        encode, calls = loaded.encode, []

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) > chunks:
                raise FailingError
            return encode(*args, **kwargs)

        loaded.encode = failing
        return loaded

    with pytest.raises(FailingError):
        encode_file(load, str(model), source, target, chunk_size=64, show_progress_bar=False)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_run_goes_on_where_another_stopped(model, source, tmp_path, suffix, capsys):
    whole, target = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    assert run(model, source, whole) == 0
    interrupted(model, source, target, 2)
    assert not target.exists()
    capsys.readouterr()
    arguments = [str(model), str(source), str(target)]
    assert main(["encode", *arguments, "--no-progress", "--chunk-size", "100", "--batch-size", "3"]) == 0
    assert f"{len(TEXTS)} embeddings of 50 numbers, 128 of them by an earlier run" in capsys.readouterr().out
    assert target.read_bytes() == whole.read_bytes()
    assert files(tmp_path) == sorted(["model", target.name, "texts.txt", whole.name])


@pytest.mark.parametrize("change", ["source", "model", "argument", "note", "rows"])
def test_what_another_run_left_is_not_mixed_in(model, source, tmp_path, change, capsys):
    target = tmp_path / "out.npy"
    interrupted(model, source, target, 3)
    note = tmp_path / ".out.npy.partial.json"
    assert json.loads(note.read_text())["done"] == 192
    expected = 0
    flags = []
    texts = TEXTS
    if change == "source":
        texts = [*TEXTS[::-1]]
        source.write_text("\n".join(texts) + "\n")
    elif change == "model":
        small_model(seed=3).eval().save_pretrained(model)
    elif change == "argument":
        flags = ["--normalize"]
    elif change == "note":
        note.write_text("{")
    else:  # a note from before the rows were cut off
        os.truncate(tmp_path / ".out.npy.partial", 70 * 200 + 17)
        expected = 70
    capsys.readouterr()
    assert run(model, source, target, *flags) == 0
    said = capsys.readouterr().out
    assert (f"{expected} of them by an earlier run" in said) == bool(expected)
    wanted = SentenceTransformer(model, device="cpu").encode(texts, normalize_embeddings=bool(flags))
    np.testing.assert_array_equal(np.load(target), wanted)


def test_killed_and_called_again(model, source, tmp_path):
    """kill -9 as soon as there is something to lose."""
    source.write_text("\n".join(TEXTS * 100) + "\n")
    target, note = tmp_path / "out.npy", tmp_path / ".out.npy.partial.json"
    command = [sys.executable, "-m", "triton_st", "encode", str(model), str(source), str(target), "--no-progress"]
    command += ["--chunk-size", "500"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not note.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()[-2000:]
    assert not target.exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "of them by an earlier run" in again.stdout
    expected = SentenceTransformer(model, device="cpu").encode(TEXTS)
    np.testing.assert_array_equal(np.load(target), np.tile(expected, (100, 1)))


def test_two_at_once(model, source, tmp_path, capsys):
    with (tmp_path / ".out.npy.partial").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(model, source, tmp_path / "out.npy") == 1
    assert "another process is writing it" in capsys.readouterr().err


def test_bad_input(model, source, tmp_path, capsys):
    source.write_bytes(b"fine\nalso fine\n\xff\xfe\n")
    assert run(model, source, tmp_path / "out.npy") == 1
    assert "texts.txt, line 3: is not UTF-8" in capsys.readouterr().err
    assert run(model, source, tmp_path / "out.csv") == 1
    assert "the output must end in .npy or .parquet" in capsys.readouterr().err
    assert files(tmp_path) == ["model", "texts.txt"]
    with pytest.raises(ValueError, match="precision: expected one of float32, binary, ubinary, got 'int8'"):
        encode_file(small_model, "", source, tmp_path / "out.npy", precision="int8")
