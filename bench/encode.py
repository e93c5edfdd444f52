"""Sentences per second, latency, memory and start of `encode` on the CPU, against its peers, each in its own process.

    python -m bench.encode_peers ENVIRONMENTS --data DATA          # once: the peers' environments and models
    python -m bench.encode --data DATA --peers ENVIRONMENTS
    python -m bench.encode --data DATA --million                   # a stream of a million sentences, and its memory

What is missing of the peers is left out and said so. Each peer runs in its best setting: batch size and number of
streams are tried once and kept in ENVIRONMENTS/settings.json. Parity comes first: the first round's embeddings are
compared with sentence-transformers' before any of its times counts. Contenders take turns. sentence-transformers runs
twice, as it comes and with MKL told that it is on an Intel processor (a preloaded `mkl_serv_intel_cpu_true`). Writes
bench/results/encode.json, encode_amx.json on a processor with AMX, or encode_avx2.json on one without AVX-512, and the
page and the picture made of it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import encode_page
from bench.resources import minilm_folder, processor

HERE = Path(__file__).parent
TEXTS, THREADS, ROUNDS = 2_000, 2, 3
DTYPES = ("float32", "float16", "bfloat16", "int8")
BUDGET = 900
"""Seconds after which no further round begins."""
LENGTHS = (8, 16, 32, 64, 128, 256)
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
ONE = "A boy plays with a ball in the park."
OURS = [f"triton_st:{dtype}" for dtype in DTYPES]
PEERS = {
    "st:bfloat16": None,
    "onnxruntime:float32": "ort",
    "onnxruntime:int8": "ort",
    "openvino:float32": "ov",
    "openvino:bfloat16": "ov",
    "openvino:int8": "ov",
    "openvino-dynamic:int8": "ov",
    "ctranslate2:float32": "ct2",
    "ctranslate2:int8": "ct2",
    "fastembed:float32": "fe",
}
"""Contenders and the environment of each; None is this one."""
STREAMED = ("onnxruntime", "openvino", "openvino-dynamic", "ctranslate2")
"""Runtimes that can compute two batches at a time, one thread each."""
PARTS = ("main", "sweeps", "cold")
BEGAN = time.perf_counter()

Setting = dict[str, int]


def say(what: str) -> None:
    print(f"{time.perf_counter() - BEGAN:5.0f} s  {what}", file=sys.stderr, flush=True)


class Contender:
    """A worker process."""

    def __init__(self, name: str, python: Path, models: Path, setting: Setting | None = None, **variables: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", **variables}
        environment["PYTHONPATH"] = str(HERE.parent)
        folder = minilm_folder()
        self.name, self.setting = name, setting or {}
        self.process = subprocess.Popen(
            [python, HERE / "encode_worker.py", name.partition(" ")[0], folder, models],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):  # a runtime may print what it likes
                return json.loads(line)
        raise RuntimeError((self.process.stderr.read().strip().splitlines() or ["ended without a word"])[-1])

    def ask(self, texts: list[str], **command: Any) -> dict[str, Any]:
        """Seconds of each run, and resident bytes."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"texts": texts, **self.setting, **command}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def embed(self, texts: list[str], folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
        """Embeddings, and what `ask` says."""
        answer = self.ask(texts, save=str(folder / "embeddings.npy"))
        return np.load(folder / "embeddings.npy"), answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def pool_of_sentences(data: Path) -> list[str]:
    """Different real sentences."""
    rows = [json.loads(line) for line in (data / "nli_train.jsonl").read_text().splitlines()[:6_000]]
    return sorted({text for row in rows for text in (row["anchor"], row["positive"])})


def varied_texts(data: Path) -> list[str]:
    """Real sentences: three fifths alone, two fifths joined by threes, so that lengths vary as in real corpora."""
    pool = pool_of_sentences(data)
    draw = random.Random(0)
    texts = [draw.choice(pool) for _ in range(TEXTS * 3 // 5)]
    texts += [" ".join(draw.sample(pool, 3)) for _ in range(TEXTS - len(texts))]
    draw.shuffle(texts)
    return texts


def intel_shim(folder: Path) -> Path:
    """A library that answers MKL's question for the processor's maker."""
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def tuned(name: str, contender: Contender, texts: list[str]) -> Setting:
    """Of a few batch sizes, and of one or two streams, those that encode `texts` soonest."""
    contender.ask(texts[:64])
    best: tuple[float, Setting] | None = None
    streams = (2, 1) if name.partition(":")[0] in STREAMED else (1,)
    settings: list[Setting] = [{"batch_size": size, "streams": streams[0]} for size in (8, 32, 128)]
    for setting in settings:
        seconds = contender.ask(texts, **setting)["seconds"][0]
        if best is None or seconds < best[0]:
            best = seconds, setting
    assert best is not None
    for number in streams[1:]:
        setting = best[1] | {"streams": number}
        if contender.ask(texts, **setting)["seconds"][0] < best[0]:
            return setting
    return best[1]


def start(
    peers: Path, texts: list[str], scratch: Path, with_compiled: bool, only: set[str] | None = None
) -> tuple[list[Contender], dict[str, str]]:
    """All contenders, or only those named, in their best settings, and why others are absent."""
    here, shim = Path(sys.executable), str(intel_shim(scratch))
    wanted: list[tuple[str, Path, dict[str, str]]] = [("st", here, {}), ("st mkl-intel", here, {"LD_PRELOAD": shim})]
    if with_compiled:
        wanted.append(("st-compile mkl-intel", here, {"LD_PRELOAD": shim}))
    wanted += [(name, here, {}) for name in OURS]
    wanted += [(name, peers / env / "bin" / "python" if env else here, {}) for name, env in PEERS.items()]
    file = peers / "settings.json"
    settings: dict[str, Setting] = json.loads(file.read_text()) if file.is_file() else {}
    contenders, absent = [], {}
    for name, python, variables in [each for each in wanted if only is None or each[0] in only]:
        try:
            if name not in settings and name != "st" and name not in OURS:  # as it comes; and ours has no setting
                say(f"trying settings of {name}")
                trial = Contender(name, python, peers / "models", None, **variables)
                settings[name] = tuned(name, trial, texts[:384])
                trial.close()
                file.write_text(json.dumps(settings, indent=1) + "\n")
            contenders.append(Contender(name, python, peers / "models", settings.get(name), **variables))
            say(f"started {name} {settings.get(name, '')}")
        except (OSError, RuntimeError) as error:
            absent[name] = str(error) if python.is_file() else "its environment is not there"
            say(f"absent: {name}: {absent[name]}")
    return contenders, absent


def parity(embeddings: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Cosine to sentence-transformers' float32 and the share of its ten nearest neighbours that is kept."""
    exact = embeddings["st"]
    neighbours = {}
    for name, e in embeddings.items():
        scores = e @ e.T
        np.fill_diagonal(scores, -2)
        neighbours[name] = np.argsort(-scores, axis=1)[:, :10]
    result = {}
    for name, e in embeddings.items():
        cosine = (e * exact).sum(1) / np.linalg.norm(e, axis=1)
        kept = [len(set(a) & set(b)) / 10 for a, b in zip(neighbours[name], neighbours["st"], strict=True)]
        result[name] = {
            "largest_difference": float(np.abs(e - exact).max()),
            "mean_cosine": float(cosine.mean()),
            "least_cosine": float(cosine.min()),
            "neighbours_kept": float(np.mean(kept)),
        }
        assert cosine.mean() > 0.95, (name, result[name])  # the same model, whatever its arithmetic
    assert result["triton_st:float32"]["largest_difference"] < 1e-5, result["triton_st:float32"]
    return result


def spearman_on_stsb(contenders: list[Contender], data: Path, folder: Path) -> dict[str, float]:
    """Spearman's correlation of the cosine with STS-Benchmark's test scores."""
    from scipy.stats import spearmanr

    with (data / "stsb_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    texts = [row[side] for side in ("sentence1", "sentence2") for row in rows]
    result = {}
    for contender in contenders:
        embeddings, _ = contender.embed(texts, folder)
        first, second = embeddings[: len(rows)], embeddings[len(rows) :]
        cosines = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
        result[contender.name] = float(spearmanr(cosines, [float(row["score"]) for row in rows]).statistic)
    return result


def operations(folder: Path, lengths: list[int]) -> float:
    """Multiplications and additions of the dense layers for sequences of these lengths; attention is left out."""
    config = json.loads((folder / "config.json").read_text())
    d, i = config["hidden_size"], config["intermediate_size"]
    return 2.0 * sum(lengths) * config["num_hidden_layers"] * (4 * d * d + 2 * d * i)


def peaks() -> dict[str, float]:
    """Operations a second of oneDNN's products: float16 is computed in float32, int8 counts as twice bfloat16."""
    import torch

    from bench.training_limit import peak

    torch.set_num_threads(THREADS)
    float32, bfloat16 = peak(torch.float32), peak(torch.bfloat16)
    return dict(zip(DTYPES, (float32, float32, bfloat16, 2 * bfloat16), strict=True))


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(seconds), "p95": statistics.quantiles(seconds, n=20)[-1]}


def cold_start(peers: Path, scratch: Path) -> float:
    """Seconds from the first line of Python to the first embedding with an empty kernel cache."""
    cache = scratch / "empty"
    contender = Contender(OURS[0], Path(sys.executable), peers / "models", TRITON_ST_CACHE=str(cache))
    contender.close()
    shutil.rmtree(cache)
    return contender.started["start"]


def sweeps(contenders: list[Contender], texts: list[str]) -> dict[str, Any]:
    """Seconds a token by length, seconds a text by texts in a call."""
    by_length: dict[str, dict[int, float]] = {c.name: {} for c in contenders}
    by_batch: dict[str, dict[int, float]] = {c.name: {} for c in contenders}
    for contender in contenders:
        contender.ask(texts[:64])

    def soonest(contender: Contender, some: list[str], repeat: int) -> float:
        """Seconds in its own setting or, since few texts may not make two batches, with all threads on one batch."""
        streams = {1, contender.setting.get("streams", 1)}
        return min(statistics.median(contender.ask(some, repeat=repeat, streams=n)["seconds"]) for n in streams)

    for length, contender in itertools.product(LENGTHS, contenders):
        count = 4096 // length
        sentences = [("dog " * (length - 2)).strip()] * count
        by_length[contender.name][length] = soonest(contender, sentences, 3) / count / length
    say("length sweep done")
    for size, contender in itertools.product(BATCHES, contenders):
        if size > 256 and contender.name not in OURS:
            continue  # minutes, and no news: the main table has 2,000
        by_batch[contender.name][size] = soonest(contender, (texts * 3)[:size], max(1, min(20, 256 // size))) / size
    say("batch sweep done")
    return {"length_sweep": by_length, "batch_sweep": by_batch}


def measure(contenders: list[Contender], texts: list[str], data: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """Parity, then everything timed, contenders taking turns."""
    from tokenizers import Tokenizer

    folder = minilm_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    lengths = [len(e.ids) for e in tokenizer.encode_batch_fast(texts)]
    embeddings: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {}
    latency: dict[str, list[float]] = {c.name: [] for c in contenders}
    peak = {}
    for contender in contenders:
        contender.ask(texts[:64])
        embeddings[contender.name], answer = contender.embed(texts, scratch)
        seconds[contender.name], peak[contender.name] = answer["seconds"], answer["peak"]
    compared = parity(embeddings)
    say("parity holds; round 1 done")
    for contender in contenders:
        contender.ask([ONE], repeat=20, streams=1)
    for _ in range(3):
        for contender in contenders:
            latency[contender.name] += contender.ask([ONE], repeat=60, streams=1)["seconds"]
    say("latency done")
    spearman = spearman_on_stsb([c for c in contenders if c.name in OURS], data, scratch)
    one_round = sum(each[0] for each in seconds.values())
    for number in range(2, rounds + 1):
        if time.perf_counter() - BEGAN + one_round > BUDGET:
            say(f"no time for round {number}")
            break
        for contender in contenders:
            seconds[contender.name] += contender.ask(texts)["seconds"]
        say(f"round {number} done")
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    work, best = operations(folder, lengths), peaks()
    return {
        "threads": THREADS,
        "processor": processor(),
        "rounds": len(seconds["st"]),
        "texts": len(texts),
        "tokens": sum(lengths),
        "tokens_of_one": len(tokenizer.encode(ONE).ids),
        "parity": compared,
        "seconds": medians,
        "spread": {name: [min(each), max(each)] for name, each in seconds.items()},
        "latency": {name: percentiles(each) for name, each in latency.items()},
        "peak_memory": peak,
        "start": {c.name: c.started["start"] for c in contenders},
        "settings": {c.name: c.setting for c in contenders},
        "peak": best,
        "share_of_peak": {name: work / medians[name] / best[name.partition(":")[2]] for name in OURS},
        "spearman": spearman,
    }


def million(data: Path, dtype: str, texts: int) -> dict[str, Any]:
    """Encode a stream of real sentences, short ones, again and again; resident bytes and rate on the way."""
    from bench.encode_worker import memory
    from triton_st import SentenceTransformer

    short = [text for text in pool_of_sentences(data) if len(text) <= 60]
    draw = random.Random(0)

    def stream() -> Iterator[str]:
        return (draw.choice(short) for _ in range(texts))

    model = SentenceTransformer(str(minilm_folder()), device="cpu", dtype=dtype)
    model.encode(short[:4096])
    points: list[dict[str, Any]] = []
    done, began = 0, time.perf_counter()
    for chunk in model.encode_iter(stream()):
        assert np.isfinite(chunk).all()
        done += len(chunk)
        if not points or done - points[-1]["texts"] >= texts // 12 or done == texts:
            points.append({"texts": done, "seconds": time.perf_counter() - began, **memory()})
            say(f"{done:,} texts, {done / points[-1]['seconds']:.0f}/s, {points[-1]['rss'] / 2**20:.0f} MiB")
    return {"processor": processor(), "dtype": dtype, "texts": done, "sentences": len(short), "points": points}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with nli_train.jsonl and stsb_test.csv")
    parser.add_argument("--peers", type=Path, help="what bench.encode_peers made; without it only this environment's")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed calls of each contender")
    parser.add_argument("--texts", type=int, default=TEXTS, help="how many texts; results are kept for all 2,000 only")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure; the rest stays")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile of sentence-transformers as well")
    parser.add_argument("--million", nargs="?", type=int, const=1_000_000, metavar="N", help="encode a long stream")
    parser.add_argument("--dtype", default="int8", choices=DTYPES, help="arithmetic of --million")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    if args.million:
        stream = million(args.data, args.dtype, args.million)
        encode_page.MILLION.write_text(json.dumps(stream, indent=1) + "\n")
        encode_page.write()
        return
    here = processor()
    kept = encode_page.result_file(here)
    measured_here = kept.is_file() and json.loads(kept.read_text())["processor"] == here
    if "main" not in args.parts and not (measured_here and args.texts == TEXTS):
        parser.error(f"--parts {' '.join(args.parts)} adds to what --parts main of all {TEXTS} texts has written here")
    texts = varied_texts(args.data)[: args.texts]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        result_file = kept if args.texts == TEXTS else scratch / "result.json"
        peers = args.peers or scratch
        Contender(OURS[0], Path(sys.executable), peers).close()  # kernels built, libraries read from the disk
        result: dict[str, Any] = {}
        for part in [part for part in PARTS if part in args.parts]:
            result = json.loads(result_file.read_text()) if result_file.is_file() else {}
            if result.get("processor") != here:
                result = {}  # nothing of another processor's stays beside what is measured on this one
            began = time.perf_counter()
            if part == "cold":
                result["cold_start"] = cold_start(peers, scratch)
            else:
                only = None
                if part == "sweeps":
                    only = {*OURS, *encode_page.best_peers(result["seconds"]).values()}
                contenders, absent = start(peers, texts, scratch, args.compiled, only)
                try:
                    if part == "main":
                        result |= {"absent": absent, **measure(contenders, texts, args.data, scratch, args.rounds)}
                    else:
                        result |= sweeps(contenders, texts)
                finally:
                    for contender in contenders:
                        contender.close()
            result["wall"] = result.get("wall", {}) | {part: time.perf_counter() - began}
            result_file.write_text(json.dumps(result, indent=1) + "\n")
            say(f"{part}: done in {result['wall'][part]:.0f} s")
        result = json.loads(result_file.read_text())
    if args.texts == TEXTS:
        encode_page.write()
    print(encode_page.page(result))


if __name__ == "__main__":
    main()
