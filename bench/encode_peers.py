"""Makes the environments and models of the peers of `bench.encode`; what is already there stays.

    python -m bench.encode_peers FOLDER --data DATA

FOLDER gets one virtual environment for each runtime, since their requirements disagree, and `models`: the encoder as
ONNX (fused by onnxruntime's optimizer for BERT), as ONNX quantized by onnxruntime, as OpenVINO quantized by NNCF, and
in CTranslate2's format. DATA/stsb_train.csv calibrates.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.resources import minilm_folder

HERE = Path(__file__).parent
PACKAGES = {
    "ort": ["onnxruntime", "onnx", "sympy", "tokenizers"],
    "ov": ["openvino", "nncf", "tokenizers"],
    "ct2": ["ctranslate2", "safetensors", "tokenizers"],
    "fe": ["fastembed"],
}
CALIBRATION = 200
"""Sentences alone, and as many again joined by threes."""


def environment(peers: Path, name: str) -> None:
    """A virtual environment with the packages of one runtime."""
    if (peers / name / "bin" / "python").is_file():
        return
    subprocess.run([sys.executable, "-m", "venv", peers / name], check=True)
    elsewhere = ("PIP_TARGET", "PIP_PREFIX", "PIP_USER")  # a pip so told would install outside it
    subprocess.run(
        [peers / name / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES[name]],
        env={key: value for key, value in os.environ.items() if key not in elsewhere},
        check=True,
    )


def models(peers: Path, data: Path) -> None:
    """The encoder in every runtime's format."""
    folder, out = minilm_folder(), peers / "models"

    def convert(name: str, made: str, script: str, *arguments: Path) -> None:
        if not (out / made).exists():
            subprocess.run([peers / name / "bin" / "python", HERE / script, folder, *arguments], check=True)

    convert("ort", "int8.onnx", "encode_onnx.py", out)
    convert("ct2", "ctranslate2/model.bin", "encode_ctranslate2.py", out / "ctranslate2")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as texts:
        with (data / "stsb_train.csv").open(newline="") as rows:
            sentences = [row["sentence1"] for row in csv.DictReader(rows)][: 2 * CALIBRATION]
        lines = sentences[:CALIBRATION]
        lines += [" ".join(sentences[i : i + 3]) for i in range(CALIBRATION, 2 * CALIBRATION, 3)]
        texts.writelines(line + "\n" for line in lines)
        texts.flush()
        convert("ov", "dynamic.xml", "encode_openvino.py", out, Path(texts.name))
    if not (out / "fastembed").exists():
        (out / "fastembed").mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(folder / name, out / "fastembed" / name)
        shutil.copy(out / "float32.onnx", out / "fastembed" / "model.onnx")


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with stsb_train.csv")
    args = parser.parse_args()
    for name in PACKAGES:
        environment(args.folder, name)
    models(args.folder, args.data)


if __name__ == "__main__":
    main()
