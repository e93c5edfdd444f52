"""One contender of `bench.encode` in a process and environment of its own: reads commands, writes JSON lines.

    python encode_worker.py CONTENDER MODEL_FOLDER ONNX_FOLDER

Contenders: triton_st:DTYPE, st, onnxruntime:float32|int8, openvino:float32|bfloat16. A command is a JSON object with
`texts` and perhaps `batch_size`, `save` (where the embeddings go) and `repeat`; the answer has `seconds` of each run
and `rss`, the process's resident bytes. The first line tells how long importing, loading and the first embedding took.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
THREADS = 2

import numpy as np  # noqa: E402  the clock starts before it

Encode = Callable[[list[str], int], np.ndarray]


def triton_st(folder: str, dtype: str) -> Encode:
    from triton_st import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", dtype=dtype)
    return lambda texts, size: model.encode(texts[0] if len(texts) == 1 else texts, batch_size=size)


def sentence_transformers(folder: str) -> Encode:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    return lambda texts, size: model.encode(texts, batch_size=size, show_progress_bar=False)


def padded_batches(folder: str) -> Callable[[list[str], int], Iterator[tuple[list[int], np.ndarray, np.ndarray]]]:
    """Batches in order of length, each padded to its longest text: what suits the runtimes that need padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)

    def batches(texts: list[str], size: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        for start in range(0, len(ids), size):
            members = order[start : start + size]
            tokens = np.zeros((len(members), len(ids[members[0]])), np.int64)
            mask = np.zeros_like(tokens)
            for row, i in enumerate(members):
                tokens[row, : len(ids[i])] = ids[i]
                mask[row, : len(ids[i])] = 1
            yield members, tokens, mask

    return batches


def by_runtime(folder: str, run: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Encode:
    batches = padded_batches(folder)

    def encode(texts: list[str], size: int) -> np.ndarray:
        result = None
        for members, tokens, mask in batches(texts, size):
            embeddings = run(tokens, mask)
            result = np.empty((len(texts), embeddings.shape[1]), np.float32) if result is None else result
            result[members] = embeddings
        assert result is not None
        return result

    return encode


def onnxruntime(folder: str, onnx_folder: str, dtype: str) -> Encode:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(f"{onnx_folder}/{dtype}.onnx", options, providers=["CPUExecutionProvider"])
    return by_runtime(folder, lambda tokens, mask: session.run(None, {"input_ids": tokens, "attention_mask": mask})[0])


def openvino(folder: str, onnx_folder: str, dtype: str) -> Encode:
    import openvino as ov

    core = ov.Core()
    hints = {
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
    }
    request = core.compile_model(f"{onnx_folder}/plain.onnx", "CPU", hints).create_infer_request()

    def run(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return request.infer({"input_ids": tokens, "attention_mask": mask})[0]

    return by_runtime(folder, run)


def resident() -> int:
    """Resident bytes of this process, shared library pages included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Load the contender, then answer commands until the input ends."""
    contender, folder, onnx_folder = sys.argv[1:]
    name, _, dtype = contender.partition(":")
    makers: dict[str, Callable[[], Encode]] = {
        "triton_st": lambda: triton_st(folder, dtype),
        "st": lambda: sentence_transformers(folder),
        "onnxruntime": lambda: onnxruntime(folder, onnx_folder, dtype),
        "openvino": lambda: openvino(folder, onnx_folder, dtype),
    }
    encode = makers[name]()
    encode(["Ready when you are."], 1)
    print(json.dumps({"start": time.perf_counter() - STARTED, "rss": resident()}), flush=True)
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        seconds = []
        for _ in range(command.get("repeat", 1)):
            started = time.perf_counter()
            embeddings = encode(command["texts"], command.get("batch_size", 32))
            seconds.append(time.perf_counter() - started)
        if "save" in command:
            np.save(command["save"], embeddings)
        print(json.dumps({"seconds": seconds, "rss": resident()}), flush=True)


if __name__ == "__main__":
    main()
