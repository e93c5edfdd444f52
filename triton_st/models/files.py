"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path


def read_json(path: Path) -> dict:
    """Read a JSON object; ValueError names the file if it holds anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(fields).__name__}")
    return fields


def write_json(path: Path, fields: object) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


LEFTOVER = re.compile(r"\..+\.\d+\.tmp")
"""Names of what a killed process leaves: files and folders half-written, folders half-deleted."""


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written or half-deleted in `folder` itself."""
    for path in folder.glob("*"):
        if LEFTOVER.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; on success the file takes its place at `path`, on failure it is deleted."""
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: str | Path, *, whole: bool = False) -> Iterator[Path]:
    """Give a temporary folder to write into; on success its files take their places in `folder`, on failure none does.

    Everything is flushed to disk first. A new `folder` appears in one rename. In one that exists, files of the same
    name are replaced one by one, each in one rename, once all have been written; its other files stay. With `whole` the
    folder itself is exchanged for the new one instead: a process killed at any moment leaves no mixture of the two.

    Raises:
        OSError: `folder` cannot be written, naming it and why; nothing of it was touched.
    """
    target = Path(folder).resolve()
    temporary = _temporary(target)
    try:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"cannot write to {folder}: it is a file, not a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if target.is_dir() and not os.access(target, os.W_OK | os.X_OK):
            raise PermissionError(f"cannot write to {folder}: permission denied")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if str(error).startswith("cannot write to"):
            raise
        raise type(error)(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        yield temporary
        for path in [*sorted(temporary.rglob("*")), temporary]:
            _flush(path)
        if whole:
            delete_folder(target, then=temporary)
        elif target.exists():  # the folder itself stays, even when empty: it may be somebody's working directory
            _move_files(temporary, target)
        else:
            temporary.rename(target)
        _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_folder(folder: Path, then: Path | None = None) -> None:
    """Delete a folder so that a process killed meanwhile leaves no half of it under its name.

    `then` is renamed to it once the old one is out of the way, before its files are deleted.
    """
    doomed = _temporary(folder.with_name(f"old-{folder.name}"))
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
    if then is not None:
        then.rename(folder)
    shutil.rmtree(doomed, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _flush(path: Path) -> None:
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_files(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        destination = target / path.relative_to(source)
        if path.is_dir():
            destination.mkdir(exist_ok=True)
        else:
            path.replace(destination)
