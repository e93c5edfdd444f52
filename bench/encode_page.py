"""The pages, the pictures and README's part about `encode`, from bench/results/encode*.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bench.report import table
from bench.resources import place

RESULTS = Path(__file__).parent / "results"
RESULT, MILLION = RESULTS / "encode.json", RESULTS / "encode_million.json"
OTHERS = {" with AMX": RESULTS / "encode_amx.json", " without AVX-512": RESULTS / "encode_avx2.json"}
"""Results on other processors, by what the processor's name ends with: what is fast on them is not elsewhere."""
PRECISIONS = ("float32", "bfloat16", "int8")
AIMS = {"float32": 4.0, "bfloat16": 7.5, "int8": 12.0}
"""Times sentence-transformers as it comes."""
AIM_OVER_PEERS = 1.5

Result = dict[str, Any]


def result_file(processor: str) -> Path:
    """Where results are kept."""
    return next((path for end, path in OTHERS.items() if processor.endswith(end)), RESULT)


def ours(precision: str) -> str:
    return f"triton_st:{precision}"


def is_ours(name: str) -> bool:
    return name.startswith("triton_st:")


def precision_of(name: str) -> str:
    """The arithmetic of a contender; sentence-transformers' default is float32."""
    return name.partition(" ")[0].partition(":")[2] or "float32"


def best_peers(values: dict[str, float]) -> dict[str, str]:
    """For each precision the peer of the least value, seconds say; st as it comes and with MKL told included."""
    best: dict[str, str] = {}
    for name in sorted(values, key=values.__getitem__, reverse=True):
        if not is_ours(name):
            best[precision_of(name)] = name
    return best


def label(name: str) -> str:
    """How a contender is called in tables."""
    library, _, rest = name.partition(":")
    names = {
        "st": "sentence-transformers",
        "openvino-dynamic": "openvino, dynamic,",
        "st mkl-intel": "sentence-transformers, MKL told “Intel”",
    }
    names["st-compile mkl-intel"] = "the same, torch.compile and freezing"
    return names.get(name, f"{names.get(library, library)} {rest}")


def against_peers(result: Result) -> dict[str, dict[str, Any]]:
    """Precision -> ours in times of the best peer by throughput and by latency (above 1 ours is better)."""
    p50 = {name: each["p50"] for name, each in result["latency"].items()}
    fastest, soonest = best_peers(result["seconds"]), best_peers(p50)
    return {
        precision: {
            "peer": fastest[precision],
            "throughput": result["seconds"][fastest[precision]] / result["seconds"][ours(precision)],
            "latency_peer": soonest[precision],
            "latency": p50[soonest[precision]] / p50[ours(precision)],
        }
        for precision in PRECISIONS
        if precision in fastest
    }


def _rows(result: Result) -> list[list[str]]:
    rows = []
    for name in sorted(result["seconds"], key=result["seconds"].__getitem__):
        seconds, p = result["seconds"][name], result["parity"][name]
        told = result["seconds"].get("st mkl-intel")
        bold = "**" if is_ours(name) else ""
        rows.append([
            f"{bold}{label(name)}{bold}",
            f"{result['texts'] / seconds:,.0f}",
            f"{result['seconds']['st'] / seconds:.2f}",
            f"{told / seconds:.2f}" if told else "–",
            f"{result['latency'][name]['p50'] * 1e3:.2f} / {result['latency'][name]['p95'] * 1e3:.2f}",
            f"{p['mean_cosine']:.5f} / {p['least_cosine']:.4f} / {p['neighbours_kept']:.3f}",
            f"{result['peak_memory'][name] / 2**20:,.0f}",
            f"{result['start'][name]:.1f}",
        ])  # fmt: skip
    return rows


def main_table(result: Result) -> str:
    """All contenders, the fastest first."""
    header = ["", "texts/s", "× st", "× st, MKL told", f"one text of {result['tokens_of_one']} tokens, ms, p50 / p95",
              "cosine mean / least / neighbours kept", "peak MiB", "start, s"]  # fmt: skip
    return table(header, _rows(result))


def aims(result: Result) -> list[tuple[str, str, bool]]:
    """What was aimed at, what was measured, and whether that is met."""
    base, rows = result["seconds"]["st"], []
    for precision, each in against_peers(result).items():
        faster = base / result["seconds"][ours(precision)]
        rows += [
            (f"{precision}: at least {AIMS[precision]:g} × sentence-transformers as it comes", f"{faster:.2f} ×",
             faster >= AIMS[precision]),
            (f"{precision}: at least {AIM_OVER_PEERS} × the best peer ({label(each['peer'])})",
             f"{each['throughput']:.2f} ×", each["throughput"] >= AIM_OVER_PEERS),
            (f"{precision}: one text no later than with the best peer ({label(each['latency_peer'])})",
             f"{1 / each['latency']:.2f} of its time", each["latency"] >= 1),
        ]  # fmt: skip
    p, spearman = result["parity"][ours("int8")], result["spearman"]
    distance = abs(spearman[ours("int8")] - spearman[ours("float32")])
    memory = {name: result["peak_memory"][name] / result["peak_memory"]["st"] for name in map(ours, PRECISIONS)}
    start = result["start"][ours("float32")] / result["start"]["st"]
    rows += [
        ("int8: mean cosine at least 0.999", f"{p['mean_cosine']:.5f}", p["mean_cosine"] >= 0.999),
        ("int8: least cosine at least 0.995", f"{p['least_cosine']:.4f}", p["least_cosine"] >= 0.995),
        ("int8: at least 0.95 of the ten nearest kept", f"{p['neighbours_kept']:.3f}", p["neighbours_kept"] >= 0.95),
        ("int8: Spearman on STS-Benchmark within 0.002 of float32's", f"{distance:.4f}", distance <= 0.002),
        *((f"{precision_of(name)}: at most half of sentence-transformers' peak memory", f"{share:.2f}", share <= 0.5)
          for name, share in memory.items()),
        ("float32: started no later than sentence-transformers", f"{start:.2f} of its time", start <= 1),
    ]  # fmt: skip
    return rows


def _sweep(result: Result, key: str) -> str:
    sizes = list(next(each for name, each in result[key].items() if is_ours(name)))
    rows = [
        [label(name), *(f"{1 / each[n]:,.0f}" if n in each else "–" for n in sizes)]
        for name, each in result[key].items()
    ]
    return table(["", *(f"{int(n):,}" for n in sizes)], rows)


def lost(result: Result) -> list[str]:
    """Cases of the sweeps and of latency in which a peer of the same precision is ahead."""
    cases = []
    p50 = {name: each["p50"] for name, each in result["latency"].items()}
    for name, seconds in p50.items():
        if not is_ours(name) and seconds < p50[ours(precision_of(name))]:
            mine = p50[ours(precision_of(name))]
            cases.append(f"one text: {label(name)} {seconds * 1e3:.2f} ms against {mine * 1e3:.2f} ms")
    for key, unit in (("length_sweep", "tokens"), ("batch_sweep", "texts in a call")):
        for name, each in result.get(key, {}).items():
            for n, seconds in each.items():
                mine = result[key][ours(precision_of(name))].get(n)
                if not is_ours(name) and seconds < mine:
                    cases.append(f"{int(n):,} {unit}: {label(name)} {mine / seconds:.2f} × as fast")
    return cases


def _million(result: Result) -> str:
    first, last = result["points"][0], result["points"][-1]
    least, most = (pick(point["rss"] for point in result["points"]) / 2**20 for pick in (min, max))
    rows = [
        [f"{p['texts']:,}", f"{p['seconds']:.0f}", f"{p['texts'] / p['seconds']:,.0f}", f"{p['rss'] / 2**20:.0f}"]
        for p in result["points"]
    ]
    return (
        f"## A stream of {result['texts']:,} sentences\n\n`encode_iter` over {result['sentences']:,} real short "
        f"sentences drawn again and again, {result['dtype']}: resident memory stays between {least:.0f} and {most:.0f} "
        f"MiB; {first['rss'] / 2**20:.0f} after the first chunk, {last['rss'] / 2**20:.0f} after the last.\n\n"
        + table(["texts", "seconds", "texts/s", "resident MiB"], rows)
    )  # fmt: skip


def _what(result: Result) -> str:
    mean = result["tokens"] / result["texts"]
    return (
        f"all-MiniLM-L6-v2 on {place(result)}, {result['texts']:,} real texts of {mean:.0f} "
        f"tokens on average, tokenizing included; median of {result['rounds']} round(s), contenders in turns, each in "
        "an environment and a process of its own and at its best setting (batch size, streams; length-sorted batches). "
        "`st` is sentence-transformers in float32 at batch 32 as it comes. Cosine and neighbours: against its "
        "embeddings. Start: from the first line of Python to the first embedding, kernels built."
    )


def _intel(result: Result) -> str:
    if "st mkl-intel" not in result["seconds"]:
        return ""
    if "AMD" not in result["processor"]:
        return (
            "MKL takes a slow path on AMD processors: there it is half of any float32 gain over sentence-transformers "
            "as it comes. This processor is not one."
        )
    gain = result["seconds"]["st"] / result["seconds"]["st mkl-intel"]
    whole = result["seconds"]["st"] / result["seconds"][ours("float32")]
    part = math.log(gain) / math.log(whole)
    return (
        "MKL takes a slow path on AMD processors: told that the processor is Intel's, "
        f"sentence-transformers itself becomes {gain:.2f} times as fast. That is {part:.0%} of float32's gain over it "
        f"as it comes ({gain:.2f} of {whole:.2f}, as factors); the third column of the table leaves it out."
    )


def page(result: Result) -> str:
    """Everything."""
    absent = "; ".join(f"{name} ({why})" for name, why in result["absent"].items())
    best = table(
        ["precision", "best peer", "ours is faster", "soonest peer with one text", "its time in ours"],
        [[precision, label(each["peer"]), f"{each['throughput']:.2f} ×", label(each["latency_peer"]),
          f"{each['latency']:.2f} ×"] for precision, each in against_peers(result).items()],
    )  # fmt: skip
    own = table(
        ["", *map(label, result["share_of_peak"])],
        [["share of this machine's peak of products", *(f"{v:.0%}" for v in result["share_of_peak"].values())],
         ["STS-Benchmark test, Spearman", *(f"{result['spearman'][n]:.4f}" for n in result["share_of_peak"])]],
    )  # fmt: skip
    settings = "; ".join(
        f"{label(name)}: batches of {each['batch_size']}" + (", two at a time" if each.get("streams") == 2 else "")
        for name, each in result["settings"].items()
        if each
    )
    verdicts = table(["aim", "measured", "met"], [[a, m, "yes" if met else "**no**"] for a, m, met in aims(result)])
    cases, picture = lost(result), result_file(result["processor"]).with_suffix(".svg").name
    parts = [
        "# Encoding on the CPU", _what(result), _intel(result),
        f"![throughput and length sweep]({picture})" if "length_sweep" in result else "",
        main_table(result),
        f"Settings found: {settings}. int8: onnxruntime quantizes dynamically, per channel; OpenVINO's models come "
        "from NNCF, weights and activations quantized and calibrated on real texts, or (dynamic) weights alone; "
        "CTranslate2 quantizes when it loads. CTranslate2 and onnxruntime have no bfloat16 on a CPU."
        + (f" Not there: {absent}." if absent else ""),
        f"With an empty kernel cache the start takes {result['cold_start']:.0f} s: the kernels are compiled, once."
        if "cold_start" in result else "",
        "## Aims", verdicts,
        "## Against the best peer", best,
        "## Ours", own,
        *(["## Tokens per second by sequence length", _sweep(result, "length_sweep"),
           "## Texts per second by texts in a call", _sweep(result, "batch_sweep")]
          if "length_sweep" in result else []),
        "## Lost", "\n".join(f"- {case}" for case in cases) if cases else "No case of the above.",
    ]  # fmt: skip
    stream = json.loads(MILLION.read_text()) if MILLION.is_file() else {}
    if stream.get("processor") == result["processor"]:
        parts.append(_million(stream))
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdict(result: Result) -> str:
    """Ours against the best peers, what was aimed at and missed, and what was lost."""
    ratios = ", ".join(f"{each['throughput']:.1f} × at {name}" for name, each in against_peers(result).items())
    missed = [f"{aim} ({measured})" for aim, measured, met in aims(result) if not met]
    cases = lost(result)
    return (
        f"Against the best peer at the same precision: {ratios}."
        + (f" Aims missed: {'; '.join(missed)}." if missed else "")
        + (f" Lost: {'; '.join(cases)}." if cases else "")
    )


def readme() -> str:
    """README's part."""
    result = json.loads(RESULT.read_text())
    parts = [
        _what(result),
        "![texts per second by precision, tokens per second by length](bench/results/encode.svg)",
        main_table(result),
        f"{_intel(result)} {_verdict(result)} Sweeps over length and batch, settings, and what was aimed at: "
        "[bench/results/encode.md](bench/results/encode.md). `python -m bench.encode --data DATA --peers FOLDER`",
    ]
    for path in filter(Path.is_file, OTHERS.values()):
        result = json.loads(path.read_text())
        rates = ", ".join(f"{result['texts'] / result['seconds'][ours(name)]:,.0f} at {name}" for name in PRECISIONS)
        parts.append(
            f"On {place(result)}, texts per second: {rates}. {_verdict(result)} "
            f"All of it: [bench/results/{path.stem}.md](bench/results/{path.stem}.md)"
        )
    return "\n\n".join(parts)


def plot(result: Result, path: Path) -> None:
    """Throughput of all contenders by precision, and tokens a second by length."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    colours = {"float32": "tab:blue", "float16": "tab:cyan", "bfloat16": "tab:green", "int8": "tab:orange"}
    style = {"svg.hashsalt": "encode", "font.size": 8, "svg.fonttype": "none"}
    with plt.rc_context(style):
        figure, (bars, lines) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.15, 1), layout="constrained")
        shown = sorted(result["seconds"], key=lambda name: (list(colours).index(precision_of(name)),
                                                            result["seconds"][name]))  # fmt: skip
        rates = [result["texts"] / result["seconds"][name] for name in shown]
        drawn = bars.barh(range(len(shown)), rates, color=[
            colours[precision_of(name)] if is_ours(name) else "lightgray" for name in shown
        ])  # fmt: skip
        peaks = result["share_of_peak"]
        bars.bar_label(
            drawn,
            [f"{rate:,.0f}" + (f", {peaks[name]:.0%} of peak" if name in peaks else "")
             for name, rate in zip(shown, rates, strict=True)],
            padding=3,
        )  # fmt: skip
        bars.set_yticks(range(len(shown)), map(label, shown))
        bars.invert_yaxis()
        bars.set_xlim(0, max(rates) * 1.25)
        bars.set_title("texts per second", loc="left")
        for name, by_length in result["length_sweep"].items():
            sizes = [int(n) for n in by_length]
            lines.plot(sizes, [1e-3 / seconds for seconds in by_length.values()], marker="o", markersize=3,
                       color=colours[precision_of(name)] if is_ours(name) else "gray",
                       linestyle="-" if is_ours(name) else "--", label=label(name))  # fmt: skip
        ends = [(1e-3 / list(by_length.values())[-1], name) for name, by_length in result["length_sweep"].items()]
        sizes = [int(n) for n in result["length_sweep"][ours("float32")]]
        lines.set_xscale("log", base=2)
        lines.set_xticks(sizes, map(str, sizes))
        lines.set_xlim(sizes[0], sizes[-1])
        place = -1e9
        top = lines.get_ylim()[1]
        for end, name in sorted(ends):
            place = max(end, place + 0.045 * top)
            colour = colours[precision_of(name)] if is_ours(name) else "gray"
            lines.annotate(label(name), (sizes[-1], place), (4, 0), textcoords="offset points", va="center",
                           color=colour, annotation_clip=False)  # fmt: skip
        lines.set_ylim(0)
        lines.set_title("thousand tokens per second, by tokens in a text", loc="left")
        for axes in (bars, lines):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def write() -> None:
    """Write the pages and the pictures anew."""
    for path in filter(Path.is_file, (RESULT, *OTHERS.values())):
        result = json.loads(path.read_text())
        path.with_suffix(".md").write_text(page(result))
        if "length_sweep" in result:
            plot(result, path.with_suffix(".svg"))
