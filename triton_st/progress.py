"""Progress bars of encoding."""

from __future__ import annotations

from typing import Any, TypeAlias

from tqdm.auto import tqdm


class Silent:
    """A progress bar that shows nothing.

    tqdm's own, disabled, takes a lock of the whole process all the same: a call that was interrupted at that very
    moment leaves it locked, and every other thread that encodes later would wait for ever.
    """

    def update(self, n: int = 1) -> None:
        """Nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass


Bar: TypeAlias = "tqdm | Silent"


def progress(show: bool, **arguments: Any) -> Bar:
    """tqdm's bar with these arguments if it is to be shown."""
    return tqdm(**arguments) if show else Silent()
