"""Quantizes a sentence encoder for OpenVINO by NNCF: int8.xml and dynamic.xml.

In int8.xml weights and activations are int8, calibrated on real texts; in dynamic.xml weights are, and the runtime
quantizes activations as they come.

python encode_openvino.py MODEL_FOLDER MODELS TEXTS, in an environment with openvino, nncf and tokenizers: MODELS holds
plain.onnx and gets both; TEXTS holds one text a line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
from tokenizers import Tokenizer


def main() -> None:
    """Write both."""
    folder, models, texts = map(Path, sys.argv[1:])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    lines = texts.read_text().splitlines()

    def inputs(line: str) -> dict[str, np.ndarray]:
        ids = np.array([tokenizer.encode(line).ids], np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    quantized = nncf.quantize(
        ov.Core().read_model(models / "plain.onnx"),
        nncf.Dataset(lines, inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(lines),
    )
    ov.save_model(quantized, models / "int8.xml", compress_to_fp16=False)
    compressed = nncf.compress_weights(
        ov.Core().read_model(models / "plain.onnx"), mode=nncf.CompressWeightsMode.INT8_SYM
    )
    ov.save_model(compressed, models / "dynamic.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main()
