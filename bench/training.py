"""Training against sentence-transformers beyond one step: a whole run, memory, how time goes with length and batch.

    python -m bench.training --data ../shared/data
    python -m bench.training --data ../shared/data --only whole_run memory

Sections, each measured anew or left as it was in bench/results/training.json: `whole_run` and `memory` in processes of
their own, `lengths`, `batches` and `limit` in this one, the libraries taking turns. `bench.training_page` makes the
page and the picture of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from bench import steps, training_limit, training_page
from bench.resources import minilm_folder, processor
from bench.training_worker import PRECISIONS
from triton_st import recipes
from triton_st.data import load_training_dataset
from triton_st.models.packing import pack

LENGTHS = (8, 16, 32, 64, 128, 256, 512)
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
SECONDS_PER_CASE, MOST_ROUNDS = 2.0, 7


@dataclasses.dataclass(frozen=True)
class Case:
    """A model in `folder` that is trained: `batch` triplets of real text, or `tokens` of one length."""

    name: str
    folder: str
    contenders: tuple[str, ...]
    batch: int
    tokens: int
    st_batches: int  # the largest batch that sentence-transformers is given: its memory grows with it


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def worker(*arguments: str) -> dict[str, Any]:
    """What a process of `bench.training_worker` says."""
    command = [sys.executable, "-m", "bench.training_worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def whole_run(cases: list[Case], train: Dataset, data: Path) -> dict[str, Any]:
    """Seconds of the reference recipe's whole run, our processes before and after theirs; the lesser of two."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for contender in ("fp32", "fp16", "st", "fp16", "fp32"):
        runs.setdefault(contender, []).append(worker("run", contender, cases[0].folder, str(data)))
        say(f"  {contender}: {runs[contender][-1]}")
    first = {name: each[0] for name, each in runs.items()}
    for name, run in first.items():
        assert all(run[what] >= first["st"][what] for what in ("steps", "evaluations", "checkpoints")), (name, first)
        assert abs(run["loss_last_10"] - first["st"]["loss_last_10"]) < 0.1, (name, first)  # dropout draws differ
    seconds = {name: min(run["seconds"] for run in each) for name, each in runs.items()}
    return {"seconds": seconds, "times_faster": {n: seconds["st"] / s for n, s in seconds.items()}, "runs": first}


def memory(cases: list[Case], train: Dataset, data: Path) -> dict[str, Any]:
    """MiB of resident memory: with the model loaded, and at most while training."""
    result: dict[str, Any] = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as scratch:
            texts = Path(scratch) / "texts.json"
            texts.write_text(json.dumps(steps.triplets(train, case.batch)))
            found = {name: worker("memory", name, case.folder, str(texts)) for name in (*case.contenders, "st")}
        firsts = [run.pop("losses")[0] for run in found.values()]
        assert max(firsts) - min(firsts) < 0.2, firsts
        say(f"  {case.name}: {found}")
        result[case.name] = {"batch": case.batch, "mib": found}
    return result


def timed(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of functions that take turns; one that is slow is called once, after smaller ones like it."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def call(name: str) -> None:
        start = time.perf_counter()
        runs[name]()
        seconds[name].append(time.perf_counter() - start)

    for name in runs:
        call(name)
    first = {name: values[0] for name, values in seconds.items()}
    rounds = {name: min(int(SECONDS_PER_CASE / value), MOST_ROUNDS) for name, value in first.items()}
    for i in range(max(rounds.values())):
        for name in runs:
            if i < rounds[name]:
                call(name)
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}


def compare(models: dict[str, Any], features: Callable[[Any], list[Any]], names: list[str]) -> dict[str, float]:
    """Seconds of a step of each contender on one batch, after their losses agreed without dropout."""
    runs: dict[str, Callable[[], object]] = {}
    values = {}
    for name in names:
        model, loss = models[name]
        columns = features(model)
        model.eval()
        with torch.no_grad():
            values[name] = steps.forward(model, loss, columns, PRECISIONS[name]).item()
        runs[name] = steps.training_step(model, loss, columns, PRECISIONS[name], learning_rate=0.0)
    assert max(values.values()) < 1.01 * min(values.values()), values
    return timed(runs)


def of_length(model: Any, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Two columns of texts, ids [n, length], for either library's model."""
    if steps.is_ours(model):
        return [pack(column.tolist()) for column in ids.chunk(2)]
    rest = {"token_type_ids": torch.zeros_like, "attention_mask": torch.ones_like}
    return [
        {"input_ids": column, **{name: make(column) for name, make in rest.items()}, "modality": "text"}
        for column in ids.chunk(2)
    ]


def lengths(cases: list[Case], train: Dataset, data: Path) -> dict[str, Any]:
    """Seconds of a step over a fixed number of tokens, as texts of one length made of real ones laid end to end."""
    result: dict[str, Any] = {}
    for case in cases:
        names = [*case.contenders, "st"]
        models = {name: steps.load(name, case.folder) for name in names}
        tokenizer = models["st"][0].tokenizer
        texts = tokenizer(train["anchor"][:2_000], add_special_tokens=False)["input_ids"]
        stream = torch.tensor([token for text in texts for token in text])
        rows = result[case.name] = {"tokens": case.tokens, "seconds": {}}
        for length in (LENGTHS[0], *LENGTHS):  # the first twice: the process is warm then
            count, inner = case.tokens // length, length - 2
            body = stream[: count * inner].view(count, inner)
            edges = (torch.full((count, 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
            first, last = edges
            ids = torch.cat([first, body, last], 1)
            found = compare(models, lambda model, ids=ids: of_length(model, ids), names)  # type: ignore[misc]
            rows["seconds"][str(length)] = found
            say(f"  {case.name}, length {length}: {found}")
    return result


def batches(cases: list[Case], train: Dataset, data: Path) -> dict[str, Any]:
    """Seconds of a step, and its tokens, by batch size on real texts."""
    result: dict[str, Any] = {}
    for case in cases:
        names = [*case.contenders, "st"]
        models = {name: steps.load(name, case.folder) for name in names}
        result[case.name] = {}
        for size in (BATCHES[0], *BATCHES):
            texts = steps.triplets(train, size)
            taking_part = names if size <= case.st_batches else list(case.contenders)
            found = compare(models, lambda model, texts=texts: steps.features(model, texts), taking_part)  # type: ignore[misc]
            columns = steps.features(models[names[0]][0], texts)
            tokens = sum(column["input_ids"].numel() for column in columns)
            result[case.name][str(size)] = {"tokens": tokens, "seconds": found}
            say(f"  {case.name}, batch {size}, {tokens} tokens: {found}")
    return result


def limit(cases: list[Case], train: Dataset, data: Path) -> dict[str, Any]:
    """What share of a step the arithmetic in it takes at oneDNN's rate, and where the step goes."""
    result = {}
    for case in cases:
        for contender in case.contenders:
            name = f"{case.name}, {contender}"
            result[name] = training_limit.measure(contender, case.folder, steps.triplets(train, case.batch))
            say(f"  {name}: {result[name]}")
    return result


SECTIONS = {run.__name__: run for run in (whole_run, memory, lengths, batches, limit)}


def main() -> None:
    """Measure the sections asked for, write them and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with nli_train.jsonl and stsb_dev.csv")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    args = parser.parse_args()
    train = load_training_dataset(args.data / "nli_train.jsonl", max_samples=10_112)
    path = training_page.RESULT
    result = json.loads(path.read_text()) if path.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        texts = (text for name in train.column_names for text in train[name])
        recipes.new_model(texts).save_pretrained(folder, create_model_card=False)
        cases = [
            Case("reference recipe", folder, ("fp32", "fp16"), 128, 8_192, st_batches=512),
            Case("all-MiniLM-L6-v2", str(minilm_folder()), ("fp32", "bf16"), 64, 4_096, st_batches=128),
        ]
        for name in args.only:
            say(name)
            started = time.perf_counter()
            found = SECTIONS[name](cases, train, args.data)
            result[name] = {"threads": torch.get_num_threads(), "processor": processor(), "cases": found}
            say(f"  {time.perf_counter() - started:.0f} s")
            path.write_text(json.dumps(result, indent=1) + "\n")
    training_page.main()


if __name__ == "__main__":
    main()
