"""Embeddings in one byte or one bit per dimension, by sentence-transformers' rules."""

from __future__ import annotations

import logging

import numpy as np
from torch import Tensor

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
_FEW = 100  # embeddings from which ranges are a guess


def check_precision(precision: str) -> None:
    """ValueError unless `precision` is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def quantized_shape(dimension: int, precision: str) -> tuple[int, np.dtype]:
    """How many numbers of which type stand for an embedding of `dimension` numbers."""
    width = -(-dimension // 8) if precision.endswith("binary") else dimension
    kinds = {"float32": np.float32, "int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}
    return width, np.dtype(kinds[precision])


def quantize_embeddings(
    embeddings: Tensor | np.ndarray,
    precision: str,
    ranges: np.ndarray | None = None,
    calibration_embeddings: np.ndarray | None = None,
) -> np.ndarray:
    """Embeddings as "int8" / "uint8" (256 even steps between each dimension's least and largest value), "binary" /
    "ubinary" (eight signs a byte) or "float32".

    Codes of two calls can be compared where both were given the same `ranges` or `calibration_embeddings`; else the
    ranges are those of this call's own embeddings.

    Args:
        embeddings: floating point, [N, D] or [D].
        precision: one of `PRECISIONS`.
        ranges: [2, D], each dimension's least and largest value; for int8 and uint8.
        calibration_embeddings: [M, D], from which to take the ranges.

    Returns:
        [N, D], or [N, ceil(D / 8)] for the binary ones; int8 for "int8" and "binary", uint8 for "uint8" and "ubinary".

    Raises:
        ValueError: an unknown precision, ranges of the wrong shape, or ranges asked of a single embedding.
        TypeError: embeddings that are quantized already.

    Reference: https://sbert.net/docs/package_reference/util/quantization.html.
    """
    check_precision(precision)
    values = embeddings.detach().float().cpu().numpy() if isinstance(embeddings, Tensor) else np.asarray(embeddings)
    if values.dtype.kind != "f":
        raise TypeError(f"embeddings: expected floating point, got {values.dtype}")
    if precision == "float32":
        return values.astype(np.float32)
    if precision.endswith("binary"):
        bits = np.packbits(values > 0, axis=-1)
        return bits if precision == "ubinary" else (bits - 128).astype(np.int8)
    if not len(values):
        return np.zeros(values.shape, np.uint8 if precision == "uint8" else np.int8)
    if ranges is None:
        ranges = _ranges(values, precision, calibration_embeddings)
    ranges = np.asarray(ranges, dtype=np.float32)
    if ranges.shape != (2, values.shape[-1]):
        raise ValueError(f"ranges: expected shape [2, {values.shape[-1]}], got {list(ranges.shape)}")
    start, step = ranges[0], (ranges[1] - ranges[0]) / 255
    codes = np.clip(np.floor((values - start) / np.where(step == 0, 1, step)), 0, 255)
    return codes.astype(np.uint8) if precision == "uint8" else (codes - 128).astype(np.int8)


def _ranges(values: np.ndarray, precision: str, calibration: np.ndarray | None) -> np.ndarray:
    if calibration is None:
        if values.ndim == 1 or len(values) == 1:
            raise ValueError(
                f"precision: {precision} needs each dimension's range, which one embedding does not have; "
                "give ranges or calibration_embeddings"
            )
        if len(values) < _FEW:
            logger.warning(
                "%s ranges are taken from these %d embeddings; more of them, or ranges or calibration_embeddings, "
                "would make them stable",
                precision,
                len(values),
            )
        calibration = values
    calibration = np.asarray(calibration)
    return np.stack([calibration.min(0), calibration.max(0)])
