"""Dynamic loss scaling for half-precision gradients, on any device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MIN_SCALE = 1.0


class LossScaler:
    """Keeps the factor by which the loss is multiplied so that small gradients survive float16.

    The scale is a power of two, so that scaling and unscaling lose no bit. A step with a gradient that is not finite
    is skipped and the scale halved; after `growth_interval` good steps in a row it is doubled. Numbers as in
    `torch.amp.GradScaler`; here the scale is a plain number, which the trainer logs, saves and stops on. Method:
    Micikevicius et al., "Mixed Precision Training", https://arxiv.org/abs/1710.03740, section 3.2.

    Args:
        scale: initial scale, a power of two; rounded down to one otherwise.
        growth_interval: good steps after which the scale is doubled.
        enabled: False makes a scaler whose scale stays 1 (float32, bfloat16).
    """

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000, enabled: bool = True) -> None:
        self.enabled = enabled
        self.scale = 2.0 ** int(torch.tensor(scale).log2().floor()) if enabled else 1.0
        self.growth_interval = growth_interval
        self.good_steps = 0
        self.skipped_in_a_row = 0
        self.skipped = 0

    def unscale_(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if self.scale != 1.0:
            torch._foreach_mul_(list(gradients), 1.0 / self.scale)

    def update(self, *, overflow: bool) -> None:
        """Take note of a step: halve the scale after an overflow, double it after enough good steps."""
        if not self.enabled:
            return
        if overflow:
            self.scale /= 2
            self.good_steps = 0
            self.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale *= 2
            self.good_steps = 0

    @property
    def exhausted(self) -> bool:
        """True once no scale is left to try: gradients overflow although the loss is not scaled up at all."""
        return self.scale < MIN_SCALE

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers."""
        names = ("scale", "good_steps", "skipped_in_a_row", "skipped")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`."""
        for name, value in state.items():
            setattr(self, name, value)
