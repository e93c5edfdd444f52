"""Turns pytest-benchmark's JSON in bench/results/ into tables, bench/results/README.md.

python -m bench.report                     # pages and pictures anew
python -m bench.report --update NEW.json   # after some files of bench/ were run by themselves, with
                                           # --benchmark-json=NEW.json: their cases take the old ones' places
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def duration(seconds: float) -> str:
    """Three significant digits in the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def ratio(value: float) -> str:
    """Time of a peer in ours; where ours is the slower it is marked."""
    return f"{value:.2f}×" if value >= 1 else f"**{value:.2f}× (slower)**"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def compared(name: str, benchmarks: list[dict[str, Any]]) -> str:
    """One operator in one direction: each shape and dtype against all peers."""
    infos = [benchmark["extra_info"] for benchmark in benchmarks]
    peers = list(dict.fromkeys(peer for info in infos for peer in info["ratios"]))
    rate = any("gflop" in info for info in infos)
    header = [*infos[0]["shape"], "dtype", "time", *(["GFLOP/s"] if rate else []), *peers, "share of the limit"]
    rows = [
        [
            *(f"{size:,}" for size in info["shape"].values()),
            info["dtype"],
            duration(info["medians"]["triton_st"]),
            *([f"{info['gflop'] / info['medians']['triton_st']:.0f}"] if rate else []),
            *(ratio(info["ratios"][peer]) if peer in info["ratios"] else "–" for peer in peers),
            f"{info['share_of_limit']:.0%}" if "share_of_limit" in info else "–",
        ]
        for info in infos
    ]
    losing = sum(value < 1 for info in infos for value in info["ratios"].values())
    limits = "; ".join(dict.fromkeys(info["limit"] for info in infos if "limit" in info))
    notes = [
        f"{len(rows)} cases, {infos[0]['threads']} threads; "
        + (f"slower than a peer in {losing} comparisons." if losing else "never slower than a peer."),
        *([f"Limit: {limits}."] if limits else []),
    ]
    return f"## {name}\n\n{' '.join(notes)}\n\n{table(header, rows)}"


def timed(name: str, benchmarks: list[dict[str, Any]]) -> str:
    """Benchmarks that stand by themselves: median times."""
    rows = [[benchmark["name"], duration(benchmark["stats"]["median"])] for benchmark in benchmarks]
    return f"## {name}\n\n{table(['case', 'median'], rows)}"


def page(reports: list[dict[str, Any]]) -> str:
    """All tables of all reports."""
    parts = [
        "# Benchmarks",
        "Written by `make bench` from the JSON beside this page; every number is a measurement. What is compared takes "
        "turns in one process; times are medians. A peer's column holds its time divided by ours: above "
        "1 ours is faster. The limit is the least time in which this machine does the work at all.",
    ]
    for report in reports:
        machine = report["machine_info"]
        cpu = machine.get("cpu", {})
        parts.append(f"Processor: {cpu.get('brand_raw', machine.get('processor'))}, {cpu.get('count')} cores.")
        groups: dict[str, list[dict[str, Any]]] = {}
        for benchmark in report["benchmarks"]:
            info = benchmark["extra_info"]
            own_group = benchmark["group"] or file_of(benchmark)
            name = f"`{info['operator']}`, {info['direction']}" if "ratios" in info else own_group
            groups.setdefault(name, []).append(benchmark)
        for name, benchmarks in groups.items():
            parts.append((compared if "ratios" in benchmarks[0]["extra_info"] else timed)(name, benchmarks))
    return "\n\n".join(parts) + "\n"


def file_of(benchmark: dict[str, Any]) -> str:
    """The file of bench/ that a case stands in."""
    return benchmark["fullname"].partition("::")[0]


def update(newer: dict[str, Any]) -> None:
    """Put the cases of some files, run by themselves, into the results in place of those files' old ones."""
    path = RESULTS / "bench.json"
    report = json.loads(path.read_text())
    run = {file_of(benchmark) for benchmark in newer["benchmarks"]}
    kept = [benchmark for benchmark in report["benchmarks"] if file_of(benchmark) not in run]
    report["benchmarks"] = sorted([*kept, *newer["benchmarks"]], key=file_of)
    path.write_text(json.dumps(report, indent=4) + "\n")


def main() -> None:
    """Read every report of pytest-benchmark, write the page; write the page and the picture of `bench.encode` anew."""
    from bench import encode_page  # which takes its tables from here

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, metavar="NEW.json", help="a report of some files of bench/")
    if newer := parser.parse_args().update:
        update(json.loads(newer.read_text()))
    if encode_page.RESULT.is_file():
        encode_page.write()
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    reports = [report for report in reports if isinstance(report, dict) and "benchmarks" in report]
    if not reports:
        raise SystemExit(f"no report of pytest-benchmark in {RESULTS}: run `make bench`")
    (RESULTS / "README.md").write_text(page(reports))


if __name__ == "__main__":
    main()
