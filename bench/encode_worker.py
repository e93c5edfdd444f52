"""One contender of `bench.encode` in a process and environment of its own: reads commands, writes JSON lines.

    python encode_worker.py CONTENDER MODEL_FOLDER PEER_MODELS

Contenders: triton_st:DTYPE, st, st-compile, st:bfloat16, onnxruntime:float32|int8, openvino:float32|bfloat16|int8,
openvino-dynamic:int8, ctranslate2:float32|int8, fastembed:float32. A command is a JSON object with `texts` and perhaps
`batch_size`, `streams` (batches computed at a time, the threads being shared out among them), `save` (where the
embeddings go) and `repeat`; the answer has `seconds` of each run, and the process's `rss` and `peak`, resident bytes
now and at most. The first line tells how long importing, loading and the first embedding took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

STARTED = time.perf_counter()
THREADS = 2

import numpy as np  # noqa: E402  the clock starts before it

from bench.resources import resident  # noqa: E402

Encode = Callable[[list[str], int, int], np.ndarray]
Run = Callable[[list[list[int]]], np.ndarray]


def triton_st(folder: str, dtype: str) -> Encode:
    from triton_st import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", dtype=dtype)
    return lambda texts, size, _: model.encode(texts[0] if len(texts) == 1 else texts, batch_size=size)


def sentence_transformers(folder: str, dtype: str, compiled: bool = False) -> Encode:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    if compiled:
        torch._inductor.config.freezing = True
        transformer: Any = model[0]
        transformer.auto_model = torch.compile(transformer.auto_model, dynamic=True)
    return lambda texts, size, _: model.encode(texts, batch_size=size, show_progress_bar=False)


def length_sorted(folder: str) -> Callable[[list[str], int], Iterator[tuple[list[int], list[list[int]]]]]:
    """Batches of token ids, longest first, and whose they are: what suits runtimes that need padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)

    def batches(texts: list[str], size: int) -> Iterator[tuple[list[int], list[list[int]]]]:
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        for start in range(0, len(ids), size):
            members = order[start : start + size]
            yield members, [ids[i] for i in members]

    return batches


def padded(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [B, L] of a batch whose longest text stands first."""
    tokens = np.zeros((len(ids), len(ids[0])), np.int64)
    mask = np.zeros_like(tokens)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return tokens, mask


def by_runtime(folder: str, load: Callable[[int], Run]) -> Encode:
    """Encode with what `load` makes for a number of streams."""
    batches = length_sorted(folder)
    loaded: dict[int, Run] = {}
    threads = ThreadPoolExecutor(THREADS)

    def encode(texts: list[str], size: int, streams: int) -> np.ndarray:
        if streams not in loaded:
            loaded[streams] = load(streams)
        run = loaded[streams]

        def embed(batch: tuple[list[int], list[list[int]]]) -> tuple[list[int], np.ndarray]:
            return batch[0], run(batch[1])

        result = None
        for members, embeddings in (map if streams == 1 else threads.map)(embed, batches(texts, size)):
            result = np.empty((len(texts), embeddings.shape[1]), np.float32) if result is None else result
            result[members] = embeddings
        assert result is not None
        return result

    return encode


def onnxruntime(folder: str, models: str, dtype: str) -> Encode:
    import onnxruntime as ort

    def load(streams: int) -> Run:
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS // streams  # with one, the calling thread computes
        session = ort.InferenceSession(f"{models}/{dtype}.onnx", options, providers=["CPUExecutionProvider"])

        def run(ids: list[list[int]]) -> np.ndarray:
            tokens, mask = padded(ids)
            return session.run(None, {"input_ids": tokens, "attention_mask": mask})[0]

        return run

    return by_runtime(folder, load)


def openvino(folder: str, models: str, dtype: str, name: str) -> Encode:
    import openvino as ov

    # What int8 leaves in floating point is faster in bfloat16.
    hints = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16"}
    source = f"{models}/{name}"

    def load(streams: int) -> Run:
        compiled = ov.Core().compile_model(source, "CPU", {**hints, "NUM_STREAMS": streams})
        requests: SimpleQueue[Any] = SimpleQueue()
        for _ in range(streams):
            requests.put(compiled.create_infer_request())

        def run(ids: list[list[int]]) -> np.ndarray:
            tokens, mask = padded(ids)
            request = requests.get()
            embeddings = request.infer({"input_ids": tokens, "attention_mask": mask})[0].copy()
            requests.put(request)
            return embeddings

        return run

    return by_runtime(folder, load)


def ctranslate2(folder: str, models: str, dtype: str) -> Encode:
    import ctranslate2

    def load(streams: int) -> Run:
        encoder = ctranslate2.Encoder(
            f"{models}/ctranslate2", compute_type=dtype, inter_threads=streams, intra_threads=THREADS // streams
        )

        def run(ids: list[list[int]]) -> np.ndarray:
            states = np.asarray(encoder.forward_batch(ids).last_hidden_state)
            means = np.stack([text[: len(each)].mean(0) for text, each in zip(states, ids, strict=True)])
            return means / np.linalg.norm(means, axis=1, keepdims=True)

        return run

    return by_runtime(folder, load)


def fastembed(models: str) -> Encode:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        "local/all-MiniLM-L6-v2",
        pooling=PoolingType.DISABLED,
        normalization=False,
        sources=ModelSource(url="file:///"),  # one is asked for, and not used
        dim=384,
        model_file="model.onnx",
    )
    model = TextEmbedding("local/all-MiniLM-L6-v2", specific_model_path=f"{models}/fastembed", threads=THREADS)

    def encode(texts: list[str], size: int, _: int) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        result = np.empty((len(texts), 384), np.float32)
        for i, embedding in zip(order, model.embed([texts[i] for i in order], batch_size=size), strict=True):
            result[i] = embedding
        return result

    return encode


def memory() -> dict[str, int]:
    """Resident bytes of this process now and at most, shared library pages included."""
    return {"rss": resident("VmRSS"), "peak": resident("VmHWM")}


def main() -> None:
    """Load the contender, then answer commands until the input ends."""
    contender, folder, models = sys.argv[1:]
    name, _, dtype = contender.partition(":")
    makers: dict[str, Callable[[], Encode]] = {
        "triton_st": lambda: triton_st(folder, dtype),
        "st": lambda: sentence_transformers(folder, dtype or "float32"),
        "st-compile": lambda: sentence_transformers(folder, "float32", compiled=True),
        "onnxruntime": lambda: onnxruntime(folder, models, dtype),
        "openvino": lambda: openvino(folder, models, dtype, "int8.xml" if dtype == "int8" else "plain.onnx"),
        "openvino-dynamic": lambda: openvino(folder, models, dtype, "dynamic.xml"),
        "ctranslate2": lambda: ctranslate2(folder, models, dtype),
        "fastembed": lambda: fastembed(models),
    }
    encode = makers[name]()
    encode(["Ready when you are."], 1, 1)
    print(json.dumps({"start": time.perf_counter() - STARTED, **memory()}), flush=True)
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        seconds = []
        for _ in range(command.get("repeat", 1)):
            started = time.perf_counter()
            embeddings = encode(command["texts"], command.get("batch_size", 32), command.get("streams", 1))
            seconds.append(time.perf_counter() - started)
        if "save" in command:
            np.save(command["save"], embeddings)
        print(json.dumps({"seconds": seconds, **memory()}), flush=True)


if __name__ == "__main__":
    main()
