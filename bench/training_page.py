"""Turns bench/results/training.json into a page, training.md, and a picture, training.svg.

python -m bench.training_page
"""

from __future__ import annotations

import json
from typing import Any

from bench.report import RESULTS, duration, table
from bench.resources import place
from bench.steps import ST

RESULT = RESULTS / "training.json"
PICTURE = "training.svg"
COLORS = {"fp32": "#2563eb", "fp16": "#0f766e", "bf16": "#0f766e", ST: "#b45309"}
LIBRARY = "sentence-transformers"


def contender(name: str) -> str:
    """What tables call it."""
    return f"{LIBRARY}, fp32" if name == ST else f"triton_st, {name}"


def whole_run(cases: dict[str, Any]) -> str:
    """Table of the whole run."""
    runs, seconds = cases["runs"], cases["seconds"]
    rows = [
        [
            contender(name),
            f"{seconds[name]:.1f}",
            f"{cases['times_faster'][name]:.1f}",
            f"{runs[name]['loss_last_10']:.4f}",
            f"{runs[name]['spearman']:.4f}",
        ]
        for name in sorted(seconds, key=lambda name: -seconds[name])
    ]
    header = ["", "seconds", "times faster", "loss, last ten steps", "Spearman, STS-Benchmark dev"]
    return table(header, rows)


def memory(cases: dict[str, Any]) -> str:
    """Table of resident memory."""
    rows = []
    for case, found in cases.items():
        theirs = found["mib"][ST]
        for name, mib in sorted(found["mib"].items(), key=lambda item: -item[1]["peak"]):
            above, their_above = mib["peak"] - mib["loaded"], theirs["peak"] - theirs["loaded"]
            rows.append(
                [
                    f"{case}, batch {found['batch']}",
                    contender(name),
                    f"{mib['peak']:,.0f}",
                    f"{mib['peak'] / theirs['peak']:.0%}",
                    f"{above:,.0f}",
                    f"{above / their_above:.0%}",
                ]
            )
    header = ["", "", "whole process, MiB", f"of {LIBRARY}'s", "above the loaded model, MiB", f"of {LIBRARY}'s"]
    return table(header, rows)


def by_size(cases: dict[str, Any], size: str, tokens: int | None) -> str:
    """Table of microseconds a token, one row for each length or batch; `tokens` None where each row has its own."""
    names = list(dict.fromkeys(name for found in cases.values() for name in found["seconds"]))
    rows = []
    for key, found in cases.items():
        count, seconds = tokens or found["tokens"], found["seconds"]
        cells = [f"{seconds[n] / count * 1e6:.2f}" if n in seconds else "–" for n in names]
        ours = min(value for name, value in seconds.items() if name != ST)
        faster = f"{seconds[ST] / seconds['fp32']:.1f} – {seconds[ST] / ours:.1f}" if ST in seconds else "–"
        rows.append([f"{int(key):,}", *([f"{count:,}"] if tokens is None else []), *cells, faster])
    header = [size, *(["tokens"] if tokens is None else []), *map(contender, names), "times faster, fp32 – half"]
    return table(header, rows)


def lengths(cases: dict[str, Any]) -> str:
    """Microseconds a token by length."""
    parts = []
    for case, found in cases.items():
        rows = {length: {"seconds": seconds} for length, seconds in found["seconds"].items()}
        parts.append(f"{case}, {found['tokens']:,} tokens:\n\n{by_size(rows, 'length', found['tokens'])}")
    return "\n\n".join(parts)


def batches(cases: dict[str, Any]) -> str:
    """Microseconds a token by batch size."""
    return "\n\n".join(f"{case}:\n\n{by_size(found, 'triplets', None)}" for case, found in cases.items())


def limit(cases: dict[str, Any]) -> str:
    """Share of the limit, and the profile."""
    rows = [
        [
            case,
            *(f"{found['operations'][what] / 1e9:.2f}" for what in ("products", "attention", "loss")),
            f"{found['peak'] / 1e9:,.0f}",
            duration(sum(found["operations"].values()) / found["peak"]),
            duration(found["seconds"]["step"]),
            f"{found['share']:.0%}",
        ]
        for case, found in cases.items()
    ]
    header = ["", "GFLOP: products", "attention", "loss", "oneDNN's best, GFLOP/s", "at that rate", "step", "share"]
    parts = [table(header, rows)]
    what = {
        "products_alone": "its products alone, by oneDNN at their shapes",
        "attention_alone": "its attention alone, by our operator",
        "without_dropout": "the step without dropout",
    }
    rows = [
        [
            case,
            duration(found["seconds"]["step"]),
            *(f"{found['seconds'][w] / found['seconds']['step']:.0%}" for w in what),
        ]
        for case, found in cases.items()
    ]
    parts.append("In parts, measured by themselves, of the step:\n\n" + table(["", "step", *what.values()], rows))
    for case, found in cases.items():
        rows = [[f"`{name}`", f"{share:.1%}"] for name, share in found["operators"].items()]
        parts.append(f"Operators' own time in the step, {case}:\n\n" + table(["operator", "share"], rows))
    return "\n\n".join(parts)


SECTIONS: dict[str, tuple[str, str, Any]] = {
    "whole_run": (
        "Whole run",
        "The reference recipe from making the trainer to its end: tokenising, 79 steps of 128 triplets, evaluation on "
        "STS-Benchmark dev every 20 steps, a checkpoint every 40, dropout 0.1; each run in a process of its own, ours "
        "before and after theirs, of which the lesser counts.",
        whole_run,
    ),
    "memory": (
        "Memory",
        "Most resident memory of a process while it takes four steps on one batch of real triplets: in all, libraries "
        "and weights included, and above what it held with the model loaded.",
        memory,
    ),
    "lengths": (
        "Time a token by length",
        "Microseconds a token of one training step over a fixed number of tokens, as texts of one length made of real "
        "ones laid end to end, so that nobody pads. A flat column is what arithmetic in the tokens alone would give; "
        "attention adds what is quadratic in the length.",
        lengths,
    ),
    "batches": (
        "Time a token by batch",
        f"Microseconds a token of one training step on real triplets. {LIBRARY} pads, and its memory grows with it: "
        "where it says – it was not asked.",
        batches,
    ),
    "limit": (
        "Share of the limit",
        "Multiplications and additions counted (of the products, of attention, of the loss; forward and backward, what "
        "is computed again not counted), at the best rate that oneDNN's product reaches here, against our step. "
        "float16 is held against float32's rate, which is the faster on CPUs.",
        limit,
    ),
}


def page(result: dict[str, Any]) -> str:
    """All sections that were measured."""
    parts = [
        "# Training",
        "Written by `python -m bench.training --data DATA`; every number is a measurement on "
        f"{place(next(iter(result.values())))}. A step is forward, backward, clipping and AdamW. What is "
        "compared takes turns on the same weights and texts, after the losses agreed; medians.",
    ]
    for name, (title, text, render) in SECTIONS.items():
        if name in result:
            parts.append(f"## {title}\n\n{text}\n\n{render(result[name]['cases'])}")
            if name == "lengths":
                parts.append(f"![Microseconds a token by length and by batch]({PICTURE})")
    return "\n\n".join(parts) + "\n"


def draw(result: dict[str, Any]) -> None:
    """Microseconds a token by length, above, and by batch, below, of each model."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    by_length = {
        case: {int(x): (found["tokens"], seconds) for x, seconds in found["seconds"].items()}
        for case, found in result["lengths"]["cases"].items()
    }
    by_batch = {
        case: {int(x): (row["tokens"], row["seconds"]) for x, row in found.items()}
        for case, found in result["batches"]["cases"].items()
    }
    plt.rcParams.update({"svg.hashsalt": "triton_st", "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, len(by_length), figsize=(9, 6.5), layout="constrained", squeeze=False)
    for row, (label, panels) in enumerate((("tokens in a text", by_length), ("triplets in a batch", by_batch))):
        for axis, (case, points) in zip(axes[row], panels.items(), strict=True):
            names = dict.fromkeys(name for _, seconds in points.values() for name in seconds)
            for name in names:
                line = [(x, s[name] / tokens * 1e6) for x, (tokens, s) in points.items() if name in s]
                axis.plot(*zip(*line, strict=True), marker="o", markersize=4, color=COLORS[name], label=contender(name))
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(list(points), [f"{x:,}" for x in points])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axis.set_title(case, fontsize=10)
            axis.set_xlabel(label)
            axis.set_ylabel("µs a token, training")
            axis.grid(color="#e5e7eb")
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / PICTURE, metadata={"Date": None})


def main() -> None:
    """Write the page, and the picture once both of its halves are measured."""
    result = json.loads(RESULT.read_text())
    RESULT.with_suffix(".md").write_text(page(result))
    if {"lengths", "batches"} <= result.keys():
        draw(result)


if __name__ == "__main__":
    main()
