"""The reference recipe on real NLI triplets, through the command line, as its model card describes it.

Trains for 79 steps at the card's learning rate in float16 and evaluates on STS-Benchmark dev and test. Writes
bench/results/reference_run.json and exits with 1 where a number is not finite or the loss did not fall.

    python -m bench.reference_run --data ../shared/data
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

from triton_st.__main__ import main as triton_st

RESULT = Path(__file__).parent / "results" / "reference_run.json"


def main() -> int:
    """Run, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with nli_train.jsonl, stsb_dev.csv, stsb_test.csv"
    )
    data = parser.parse_args().data
    with tempfile.TemporaryDirectory() as scratch:
        command = ["train", "--train-file", str(data / "nli_train.jsonl"), "--max-train-samples", "10112"]
        command += ["--sts-dev", str(data / "stsb_dev.csv"), "--sts-test", str(data / "stsb_test.csv")]
        start = time.perf_counter()
        if triton_st([*command, "--fp16", "--no-progress", "--output-dir", scratch]) != 0:
            return 1
        seconds = time.perf_counter() - start
        metrics = json.loads((Path(scratch) / "metrics.json").read_text())
        rows = [json.loads(line) for line in (Path(scratch) / "training_log.jsonl").open()]
    losses = [row["loss"] for row in rows if "loss" in row]
    result = {
        "steps": len(losses),
        "seconds": seconds,
        "loss_first_10": statistics.fmean(losses[:10]),
        "loss_last_10": statistics.fmean(losses[-10:]),
        "losses": losses,
        "metrics": metrics,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    numbers = losses + [v for splits in metrics.values() for row in splits.values() for v in row.values()]
    good = all(map(math.isfinite, numbers)) and result["loss_last_10"] < result["loss_first_10"]
    print(f"loss {result['loss_first_10']:.4f} -> {result['loss_last_10']:.4f}; {'ok' if good else 'FAILED'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
