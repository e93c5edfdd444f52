"""Embeds the lines of a file into a .npy or Parquet file, in flat memory, and goes on where a killed run stopped.

Finished rows are appended to a partial file beside the output; a note beside that says how many are safely on disk and
what they were made from. The output appears in one rename, when it is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from triton_st.data import decoded_lines
from triton_st.progress import progress
from triton_st.quantization import quantized_shape

if TYPE_CHECKING:
    from triton_st.sentence_transformer import SentenceTransformer

FORMATS = (".npy", ".parquet")
PRECISIONS = ("float32", "binary", "ubinary")
"""Those of which a row depends on its text alone."""


def encode_file(
    load_model: Callable[[], SentenceTransformer],
    model_name: str,
    source: Path,
    target: Path,
    *,
    chunk_size: int = 16_384,
    precision: str = "float32",
    show_progress_bar: bool = True,
    **arguments: Any,
) -> tuple[int, int, int]:
    """Embed each line of `source` as a row of `target`.

    Args:
        load_model: called once it is known that `source` can be read and `target` be written.
        model_name: folder or hub id, by which a run is told from one with another model.
        source: UTF-8; only a newline ends a line, and an empty line is an empty text.
        target: .npy for a matrix, .parquet for a column `embedding` of lists of one length.
        chunk_size: lines at a time; what a kill can cost.
        precision: one of `PRECISIONS`.
        show_progress_bar: lines done of all.
        arguments: as `SentenceTransformer.encode` takes them.

    Returns:
        Rows, numbers in a row, and how many of the rows an earlier run had done.

    Raises:
        ValueError: a line is not UTF-8, naming it, or an argument is not served.
        OSError: a file cannot be read or written. BlockingIOError: another process is writing this output.
    """
    if target.suffix not in FORMATS:
        raise ValueError(f"the output must end in {' or '.join(FORMATS)}, got {target}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    rows, digest = _survey(source)
    run = {
        "source": digest,
        "rows": rows,
        "model": model_name,
        "weights": _weights(model_name),
        "precision": precision,
        # What is not set, and the batch size, change no bit of a row.
        **{name: value for name, value in arguments.items() if value and name != "batch_size"},
    }
    with _Partial(target, run) as partial:
        model = load_model()
        dimension = model.get_embedding_dimension()
        if arguments.get("truncate_dim"):
            dimension = min(dimension, arguments["truncate_dim"])
        width, dtype = quantized_shape(dimension, precision)
        resumed = partial.open(width * dtype.itemsize)
        with (
            source.open("rb") as file,
            progress(show_progress_bar, total=rows, initial=resumed, desc="Encode", unit="line") as bar,
        ):
            lines = itertools.islice(_lines(file, source), resumed, None)
            for embeddings in model.encode_iter(
                lines, chunk_size=chunk_size, precision=precision, show_progress_bar=False, **arguments
            ):
                partial.append(np.ascontiguousarray(embeddings).tobytes(), len(embeddings))
                bar.update(len(embeddings))
        if partial.done != rows:
            raise OSError(f"{source} changed while it was read: it had {rows} lines, and then {partial.done}")
        (_finish_npy if target.suffix == ".npy" else _finish_parquet)(partial, (rows, width), dtype)
    return rows, width, resumed


def _lines(file: IO[bytes], name: str | Path) -> Iterator[str]:
    return (line.removesuffix("\n").removesuffix("\r") for line in decoded_lines(file, name))


def _survey(source: Path) -> tuple[int, str]:
    """How many lines a file has, and a digest of it; ValueError names a line that is not UTF-8."""
    digest, count = hashlib.sha256(), 0
    with source.open("rb") as file:

        def read() -> Iterator[bytes]:
            for line in file:
                digest.update(line)
                yield line

        for _ in decoded_lines(read(), source):
            count += 1
    return count, digest.hexdigest()


def _weights(model_name: str) -> list[list[Any]]:
    """Name, size and time of each of a model folder's files, by which a model that was trained on is told apart."""
    folder = Path(model_name)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [
        [str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files if p.name != "README.md"
    ]


class _Partial:
    """Rows on their way into `target`: `.NAME.partial`, and `.NAME.partial.json` that says what they are."""

    def __init__(self, target: Path, run: dict[str, Any]) -> None:
        self.target = target
        self.rows_path = target.with_name(f".{target.name}.partial")
        self.note_path = target.with_name(f".{target.name}.partial.json")
        self.run = run
        self.done = 0

    def __enter__(self) -> _Partial:
        if self.target.is_dir():
            raise IsADirectoryError(f"cannot write to {self.target}: it is a folder")
        try:
            self.file = self.rows_path.open("r+b" if self.rows_path.exists() else "x+b")
        except OSError as error:
            raise type(error)(f"cannot write to {self.target}: {error.strerror}") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise BlockingIOError(f"cannot write to {self.target}: another process is writing it") from None
        return self

    def open(self, row_bytes: int) -> int:
        """Keep what an earlier run of the same kind left, as far as its note vouches for it; returns its rows."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(self.note_path.read_text(encoding="utf-8"))
            if note["run"] == json.loads(json.dumps(self.run | {"row_bytes": row_bytes})):
                whole = os.fstat(self.file.fileno()).st_size // row_bytes if row_bytes else note["done"]
                self.done = min(int(note["done"]), whole)
        self.run |= {"row_bytes": row_bytes}
        self.file.truncate(self.done * row_bytes)
        self.file.seek(0, os.SEEK_END)
        return self.done

    def append(self, data: bytes, rows: int) -> None:
        """Rows first, then the note: a note never vouches for what is not on the disk."""
        self.file.write(data)
        self._to_disk()
        self.done += rows
        temporary = self.note_path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"run": self.run, "done": self.done}), encoding="utf-8")
        temporary.replace(self.note_path)

    def _to_disk(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self, write: Callable[[IO[bytes]], None]) -> None:
        """Let `write` make the output of the rows, give it its name, and leave nothing else behind."""
        temporary = self.target.with_name(f".{self.target.name}.whole")
        try:
            with temporary.open("wb") as whole:
                write(whole)
                whole.flush()
                os.fsync(whole.fileno())
            temporary.replace(self.target)
        finally:
            temporary.unlink(missing_ok=True)
        self.remove()

    def remove(self) -> None:
        """Delete the partial file and its note."""
        for path in (self.note_path, self.rows_path):
            path.unlink(missing_ok=True)

    def __exit__(self, *error: object) -> None:
        if self.done == 0:  # nothing to go on from
            self.remove()
        self.file.close()


def _blocks(partial: _Partial, row_bytes: int) -> Iterator[bytes]:
    partial.file.seek(0)
    block = max(1, (8 << 20) // max(row_bytes, 1)) * max(row_bytes, 1)
    while data := partial.file.read(block):
        yield data


def _finish_npy(partial: _Partial, shape: tuple[int, int], dtype: np.dtype) -> None:
    def write(file: IO[bytes]) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for data in _blocks(partial, shape[1] * dtype.itemsize):
            file.write(data)

    partial.finish(write)


def _finish_parquet(partial: _Partial, shape: tuple[int, int], dtype: np.dtype) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("embedding", pyarrow.list_(pyarrow.from_numpy_dtype(dtype), shape[1]))])

    def write(file: IO[bytes]) -> None:
        with parquet.ParquetWriter(file, schema) as writer:
            for data in _blocks(partial, shape[1] * dtype.itemsize):
                values = pyarrow.array(np.frombuffer(data, dtype))
                column = pyarrow.FixedSizeListArray.from_arrays(values, type=schema.field(0).type)
                writer.write_table(pyarrow.Table.from_arrays([column], schema=schema))

    partial.finish(write)


@contextlib.contextmanager
def standard_input(folder: Path) -> Iterator[Path]:
    """What comes in by standard input, as a file in `folder` for as long as the block lasts."""
    path = folder / f".standard-input.{os.getpid()}"
    try:
        with path.open("wb") as file:
            while data := sys.stdin.buffer.read(1 << 20):
                file.write(data)
        yield path
    finally:
        path.unlink(missing_ok=True)
