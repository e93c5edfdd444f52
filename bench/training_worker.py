"""What `bench.training` runs in processes of their own: one whole run, or a few steps whose memory is read.

    python -m bench.training_worker run CONTENDER MODEL_FOLDER DATA_FOLDER
    python -m bench.training_worker memory CONTENDER MODEL_FOLDER TEXTS.json

CONTENDER is st, or the precision of ours: fp32, fp16, bf16. The last line printed is a JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import steps
from bench.resources import forget_peak, resident

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, steps.ST: torch.float32}
STEPS = 4
MIB = 2**20
SETTINGS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "batch_sampler",
    "seed",
    "eval_strategy",
    "eval_steps",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
)
"""Of the reference recipe, given to both libraries."""


def whole_run(contender: str, folder: str, data: str) -> dict[str, Any]:
    """The reference recipe from making the trainer to its end: 79 steps, evaluated every 20, checkpoints every 40."""
    from triton_st import recipes
    from triton_st.data import load_sts_dataset, load_training_dataset

    train = load_training_dataset(Path(data) / "nli_train.jsonl", max_samples=10_112)
    dev = load_sts_dataset(Path(data) / "stsb_dev.csv")
    model, loss = steps.load(contender, folder)
    columns = (dev["sentence1"], dev["sentence2"], dev["score"])
    with tempfile.TemporaryDirectory() as scratch:
        recipe = recipes.arguments(scratch)
        settings: dict[str, Any] = {name: getattr(recipe, name) for name in SETTINGS}
        settings |= {"output_dir": scratch, "disable_tqdm": True, "use_cpu": True}
        library: Any
        if steps.is_ours(model):
            import triton_st as library
            from triton_st.evaluation import EmbeddingSimilarityEvaluator

            settings["fp16"] = contender == "fp16"
        else:
            import sentence_transformers as library
            from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

            settings["report_to"] = "none"
            settings["batch_sampler"] = library.sentence_transformer.training_args.BatchSamplers.NO_DUPLICATES
        evaluator = EmbeddingSimilarityEvaluator(
            *columns, batch_size=128, similarity_fn_names=["cosine", "dot", "euclidean", "manhattan"], name="dev"
        )
        started = time.perf_counter()
        trainer = library.SentenceTransformerTrainer(
            model=model,
            args=library.SentenceTransformerTrainingArguments(**settings),
            train_dataset=train,
            loss=loss,
            evaluator=evaluator,
        )
        trainer.train()
        seconds = time.perf_counter() - started
        checkpoints = len(list(Path(scratch).glob("checkpoint-*")))
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    correlations = [entry["eval_dev_spearman_cosine"] for entry in history if "eval_dev_spearman_cosine" in entry]
    return {
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "evaluations": len(correlations),
        "checkpoints": checkpoints,
        "loss_last_10": statistics.fmean(losses[-10:]),
        "spearman": correlations[-1],
    }


def memory(contender: str, folder: str, texts: str) -> dict[str, Any]:
    """Resident MiB with the model loaded, and at most while a few steps are taken."""
    model, loss = steps.load(contender, folder)
    features = steps.features(model, json.loads(Path(texts).read_text()))
    step = steps.training_step(model, loss, features, PRECISIONS[contender])
    loaded = resident("VmRSS") / MIB
    forget_peak()  # of loading
    losses = [step() for _ in range(STEPS)]
    return {"loaded": loaded, "peak": resident("VmHWM") / MIB, "losses": losses}


def main() -> None:
    """Do what the command line says and print what came of it."""
    task, *arguments = sys.argv[1:]
    print(json.dumps({"run": whole_run, "memory": memory}[task](*arguments)), flush=True)


if __name__ == "__main__":
    main()
