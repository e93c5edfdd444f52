"""Writes the measured parts of README.md, between its `<!-- generated: NAME -->` marks, from bench/results/.

python -m bench.readme            # rewrite README.md
python -m bench.readme --check    # exit with 1 if README.md is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import encode_page, training_page
from bench.report import table
from bench.resources import place

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
OPTIONS = "what options cost"  # ends the operator's name where the limit is the plain loss and the dtype an option


def _load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def reference_run() -> str:
    """The reference recipe on real data: STS-Benchmark before and after."""
    run = _load("reference_run")
    before, after = run["metrics"]["before"], run["metrics"]["after"]
    rows = [
        [
            name.replace("_", " "),
            *(f"{split[name]:.4f}" for split in (before["dev"], after["dev"], before["test"], after["test"])),
        ]
        for name in before["dev"]
    ]
    return (
        f"The reference run (hidden size 50, {run['steps']} steps of batch 128 at learning rate 5e-5, fp16, on real "
        "NLI triplets) ended in NaN on its model card. Here its loss goes from "
        f"{run['loss_first_10']:.4f} (mean of the first ten steps) to {run['loss_last_10']:.4f} (last ten), and "
        "STS-Benchmark reads:\n\n"
        + table(["metric", "dev before", "dev after", "test before", "test after"], rows)
        + "\n\n`python -m bench.reference_run --data DATA`"
    )


def better_recipe() -> str:
    """The better recipe against its two bars."""
    result = _load("better_recipe")
    rows = [[name, f"{row['dev']:.4f}", f"{row['test']:.4f}"] for name, row in result["spearman_cosine"].items()]
    ahead = [f"{number:.3f} above the {name}" for name, number in result["ahead_on_dev"].items()]
    met = "reaches" if min(result["ahead_on_dev"].values()) >= result["required_margin"] else "misses"
    return (
        f"`--recipe better` trains from scratch on the same data for {result['training_seconds']:.0f} seconds "
        f"({result['threads']} threads, {result['steps']} steps): a start as a bag of words weighted by inverse "
        "document frequency (IDF) in which like spelling is likeness, words cut before their endings, both directions "
        "of the loss, large batches, no hard negatives. Spearman of the cosine on STS-Benchmark, of which dev chose "
        "the settings:\n\n"
        + table(["", "dev", "test"], rows)
        + f"\n\nOn dev it is {' and '.join(ahead)}, and {met} the aim of {result['required_margin']} above both. "
        "`python -m bench.better_recipe --data DATA`"
    )


def parity() -> str:
    """Distance from sentence-transformers, step by step."""
    result = _load("parity_with_st")
    what = {
        "loss_fp32_vs_st": "loss of every step against sentence-transformers, fp32 (relative)",
        "metrics_fp32_vs_st": "20 final STS-Benchmark metrics against sentence-transformers, fp32",
        "loss_fp16_vs_fp32": "loss of every step, our fp16 against our fp32 (relative)",
        "spearman_fp16_vs_fp32": "final Spearman correlations, our fp16 against our fp32",
    }
    rows = [
        [text, *(f"{run['differences'][name]:.1e}" for run in result["runs"]), f"{result['bounds'][name]:.0e}"]
        for name, text in what.items()
    ]
    header = ["largest difference", *(f"lr {run['learning_rate']:g}" for run in result["runs"]), "bound"]
    return (
        f"Against sentence-transformers' own trainer over {result['runs'][0]['steps']} steps on real NLI data, from "
        "the same weights and batches, dropout 0:\n\n"
        + table(header, rows)
        + "\n\n`python -m bench.parity_with_st --data DATA`"
    )


def _steps(result: dict[str, Any]) -> str:
    """Milliseconds of a training step, and how many times sentence-transformers takes."""
    names = {"st": "sentence-transformers, fp32", "st, bf16 autocast": "sentence-transformers, bf16 autocast"}
    rows = [
        [names.get(name, f"triton_st, {name}"), f"{1000 * seconds:.0f}", f"{result['times_faster'][name]:.1f}"]
        for name, seconds in sorted(result["seconds"].items(), key=lambda item: -item[1])
    ]
    return table(["", "ms a step", "times faster"], rows)


def speed() -> str:
    """Training steps and encoding against sentence-transformers."""
    result = _load("speed_vs_st")
    training, tuning, encoding = result["training"], result["fine_tuning"], result["encoding"]
    per_second = encoding["texts_per_second"]
    best = encoding["times_faster_than_best"]
    texts = [[name, f"{rate:.0f}", f"{rate / per_second['ours'] * best:.1f}"] for name, rate in per_second.items()]
    return (
        f"On {place(result)}, real NLI texts, both libraries taking turns in one process. One "
        f"step of the reference recipe ({training['tokens']:,} tokens, dropout 0.1):\n\n"
        + _steps(training)
        + f"\n\nOne step of fine-tuning all-MiniLM-L6-v2, batch 64 triplets ({tuning['tokens']:,} tokens):\n\n"
        + _steps(tuning)
        + f"\n\n`encode` of all-MiniLM-L6-v2, fp32, {encoding['texts']:,} texts, tokenising included:\n\n"
        + table(["", "texts a second", "times the best of sentence-transformers"], texts)
        + "\n\n`python -m bench.speed_vs_st --data DATA`"
    )


def training() -> str:
    """A whole run, memory of training, and time where nobody pads."""
    loaded = _load("training")
    result = {name: section["cases"] for name, section in loaded.items()}
    lengths = [
        f"{case}, {min(spread):.1f} – {max(spread):.1f}"
        for case, found in result["lengths"].items()
        for spread in [[seconds["st"] / seconds["fp32"] for seconds in found["seconds"].values()]]
    ]
    return (
        f"On {place(loaded['whole_run'])}, the reference recipe from making the trainer to its end, with evaluations "
        "and checkpoints:\n\n"
        + training_page.whole_run(result["whole_run"])
        + "\n\nMost resident memory while training:\n\n"
        + training_page.memory(result["memory"])
        + "\n\nTimes faster than sentence-transformers in fp32 where nobody pads, over texts of one length, 8 to 512 "
        f"tokens: {'; '.join(lengths)}. By length, by batch size, and where a step goes: "
        "[bench/results/training.md](bench/results/training.md). `python -m bench.training --data DATA`"
    )


def _infos() -> list[dict[str, Any]]:
    """What the benchmarks that compare noted."""
    infos = (benchmark["extra_info"] for benchmark in _load("bench")["benchmarks"])
    return [info for info in infos if "ratios" in info]


def loss_options() -> str:
    """What the loss's options cost, in times of the plain loss."""
    costs: dict[str, dict[int, float]] = {}
    for info in _infos():
        if info["operator"].endswith(OPTIONS):
            costs.setdefault(info["dtype"], {})[info["shape"]["queries"]] = 1 / info["share_of_limit"]
    batches = sorted(next(iter(costs.values())))
    rows = [[option, *(f"{by_batch[batch]:.2f}" for batch in batches)] for option, by_batch in costs.items()]
    return (
        "What an option of the loss costs, forward and backward on triplets of width 384, in times of the plain "
        "loss:\n\n" + table(["option", *(f"batch {batch:,}" for batch in batches)], rows)
    )


def kernels() -> str:
    """Every operator against its best peer, and its share of this machine's limit."""
    cases: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for info in _infos():
        if not info["operator"].endswith(OPTIONS):
            cases.setdefault((info["operator"], info["direction"], info["dtype"]), []).append(info)
    rows = []
    for key, infos in cases.items():
        against_best = [min(info["ratios"].values()) for info in infos]
        lost = sum(ratio < 1 for ratio in against_best)
        shares = [info["share_of_limit"] for info in infos if "share_of_limit" in info]
        spread = f"{min(against_best):.1f} – {statistics.median(against_best):.1f} – {max(against_best):.1f}"
        rows.append([*key, spread, f"{lost} of {len(infos)}", f"{max(shares):.0%}" if shares else "–"])
    header = ["operator", "direction", "dtype", "times faster than the best peer: least – median – most"]
    return (
        "On a CPU, over sizes from 1 to 1,000,000 rows, each shape against the fastest of sentence-transformers, "
        "PyTorch, `torch.compile` and faiss; the limit is this machine's memory bandwidth (pooling) or oneDNN's "
        "product rate at that shape and dtype:\n\n"
        + table([*header, "shapes lost", "largest share of the limit"], rows)
        + "\n\nAll shapes, the lost ones marked: [bench/results](bench/results/README.md). `make bench`"
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "encode": encode_page.readme,
    "reference_run": reference_run,
    "better_recipe": better_recipe,
    "parity": parity,
    "speed": speed,
    "training": training,
    "kernels": kernels,
    "loss_options": loss_options,
}


def render(text: str) -> str:
    """`text` with every generated part written anew."""
    for name, section in SECTIONS.items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        body = section()
        text, count = pattern.subn(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"README.md must hold the mark of section {name!r} once, found {count}")
    return text


def main() -> int:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README.md is out of date")
    args = parser.parse_args()
    path = ROOT / "README.md"
    current = path.read_text()
    updated = render(current)
    if args.check:
        return int(current != updated)
    path.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
