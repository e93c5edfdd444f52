"""Command line: `python -m triton_st train|encode|evaluate|build|info`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from triton_st.recipes import RECIPES, REFERENCE, Recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from triton_st import SentenceTransformer
    from triton_st.evaluation import EmbeddingSimilarityEvaluator

SIMILARITIES = ("cosine", "manhattan", "euclidean", "dot")


class CommandError(Exception):
    """A mistake in what the user asked for; shown as one line, without a traceback."""


def _positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not text.lstrip("+").isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    """Argument type: an integer of at least 0."""
    return 0 if text == "0" else _positive(text)


# --- train ------------------------------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a sentence encoder, evaluate it and save it with its model card",
        description="Trains a BERT sentence encoder with MultipleNegativesRankingLoss. With no data named it uses the "
        "built-in synthetic scenes; nothing is downloaded. Settings that are not given are those of the recipe.",
        epilog="example: python -m triton_st train --train-file nli.jsonl --sts-dev dev.csv --sts-test test.csv --fp16 "
        "--output-dir out/nli",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default=REFERENCE.name,
        help="reference: the small cased encoder of the published model card, from random weights; better: uncased "
        "word embeddings that start from each word's rarity and spelling, trained on pairs in large batches",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train-file",
        metavar="FILE|HUB_ID",
        help="JSONL, CSV or Parquet with columns anchor, positive[, negative ...]; default: synthetic triplets",
    )
    data.add_argument("--max-train-samples", type=_positive, metavar="N", help="use the first N rows only")
    data.add_argument("--eval-file", metavar="FILE|HUB_ID", help="like --train-file, for a validation loss")
    data.add_argument("--sts-dev", metavar="FILE", help="CSV with score (0-5), sentence1, sentence2")
    data.add_argument("--sts-test", metavar="FILE", help="the same; evaluated before and after training")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="FOLDER|HUB_ID", help="fine-tune this model; default: train one from scratch")
    _add_setting(model, "--vocab-size", type=_positive, help="WordPiece vocabulary (from scratch)")
    _add_setting(model, "--hidden-size", type=_positive, help="from scratch")
    _add_setting(model, "--num-hidden-layers", type=_count, help="from scratch")
    _add_setting(model, "--num-attention-heads", type=_positive, help="from scratch")
    _add_setting(model, "--intermediate-size", type=_positive, help="from scratch")
    _add_setting(model, "--dropout", type=float, help="hidden and attention dropout (from scratch)")
    _add_setting(model, "--max-seq-length", type=_positive, help="longest sequence in tokens")
    training = parser.add_argument_group("training")
    _add_setting(training, "--per-device-train-batch-size", "--batch-size", type=int, metavar="N", help="triplets")
    _add_setting(training, "--num-train-epochs", "--epochs", type=float, metavar="N", help="passes over the data")
    training.add_argument("--max-steps", type=int, default=-1, help="stop after N steps; -1: after the epochs")
    _add_setting(training, "--learning-rate", type=float, help="largest of the schedule")
    _add_setting(training, "--warmup-steps", type=float, help="below 1: share of all steps")
    _add_setting(training, "--lr-scheduler-type", help="any of transformers' that follow the step")
    _add_setting(training, "--weight-decay", type=float, help="of AdamW")
    _add_setting(training, "--max-grad-norm", type=float, help="longer gradients are cut to it; 0: none are")
    _add_setting(training, "--scale", type=float, help="inverse temperature of the loss")
    precision = training.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="half activations, dynamic loss scaling")
    precision.add_argument("--bf16", action="store_true", help="bfloat16 activations")
    _add_setting(training, "--seed", type=int, help="of the weights, the batches and dropout")
    _add_setting(training, "--eval-steps", type=int, help="evaluate every N steps")
    _add_setting(training, "--logging-steps", type=int, help="log every N steps")
    _add_setting(training, "--save-steps", type=int, help="write a checkpoint every N steps")
    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", required=True, metavar="FOLDER", help="checkpoints, logs and final/ go here")
    output.add_argument("--overwrite-output-dir", action="store_true", help="delete an earlier run's files there first")
    output.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output-dir")
    output.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.set_defaults(run=_train)


def _add_setting(group: Any, *flags: str, help: str, **options: Any) -> None:
    """Add a flag whose default is the recipe's; what each recipe says is shown in its help."""
    name = flags[0].removeprefix("--").replace("-", "_")
    values = {recipe.name: _settings(recipe)[name] for recipe in RECIPES.values()}
    shown = f"{values.pop(REFERENCE.name)}"
    shown += "".join(f"; {recipe}: {value}" for recipe, value in values.items() if str(value) != shown)
    group.add_argument(*flags, default=argparse.SUPPRESS, help=f"{help} (default: {shown})", **options)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says, by the names of the flags."""
    named = {"vocab_size": recipe.vocab_size, "max_seq_length": recipe.max_seq_length, "scale": recipe.loss["scale"]}
    return {**named, "dropout": recipe.encoder["hidden_dropout_prob"], **recipe.encoder, **recipe.arguments}


def _prepare_output(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Fail before any work where the run could not be saved, or would overwrite an earlier one."""
    earlier = [p for p in (folder.glob("*") if folder.is_dir() else ()) if _belongs_to_a_run(p)]
    if overwrite and resume:
        raise CommandError("--overwrite-output-dir and --resume exclude each other")
    if earlier and not (overwrite or resume):
        raise CommandError(f"{folder} holds an earlier run: add --resume to go on, or --overwrite-output-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CommandError(f"cannot write to --output-dir {folder}: {error.strerror}") from error
    if overwrite:
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _belongs_to_a_run(path: Path) -> bool:
    return path.name.startswith("checkpoint-") or path.name in (
        "final",
        "eval",
        "metrics.json",
        "training_log.jsonl",
        "training.png",
    )


def _sts_evaluators(args: argparse.Namespace) -> dict[str, EmbeddingSimilarityEvaluator]:
    from triton_st.data import load_sts_dataset
    from triton_st.evaluation import EmbeddingSimilarityEvaluator
    from triton_st.synthetic import synthetic_sts

    evaluators: dict[str, EmbeddingSimilarityEvaluator] = {}
    sources: dict[Literal["dev", "test"], str | None] = {"dev": args.sts_dev, "test": args.sts_test}
    for split, source in sources.items():
        pairs = load_sts_dataset(source) if source else synthetic_sts(split=split)
        evaluators[split] = EmbeddingSimilarityEvaluator(
            pairs["sentence1"],
            pairs["sentence2"],
            pairs["score"],
            batch_size=128,
            similarity_fn_names=list(SIMILARITIES),
            name=f"sts-{split}",
        )
    return evaluators


def _train_model(args: argparse.Namespace, train_dataset: Dataset) -> SentenceTransformer:
    from triton_st import recipes
    from triton_st.sentence_transformer import SentenceTransformer

    if args.model:
        model = SentenceTransformer(args.model)
        model.max_seq_length = min(args.max_seq_length, model.max_seq_length)
        return model
    model = recipes.new_model(
        (text for column in train_dataset.column_names for text in train_dataset[column]),
        recipe=RECIPES[args.recipe],
        vocab_size=args.vocab_size,
        max_seq_length=args.max_seq_length,
        seed=args.seed,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=args.intermediate_size,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
    )
    model.model_card_data.model_name = f"SentenceTransformer from scratch by the recipe {args.recipe}"
    model.model_card_data.add_tags(f"recipe-{args.recipe}")
    return model


def _train(args: argparse.Namespace) -> None:
    from triton_st import recipes
    from triton_st.data import load_training_dataset
    from triton_st.synthetic import synthetic_triplets
    from triton_st.training import SentenceTransformerTrainer

    recipe = RECIPES[args.recipe]
    args = argparse.Namespace(**{**_settings(recipe), **vars(args)})
    arguments = recipes.arguments(  # first of all: a wrong number is found before anything is read or written
        args.output_dir,
        recipe,
        **{
            name: getattr(args, name)
            for name in (
                "per_device_train_batch_size",
                "num_train_epochs",
                "max_steps",
                "learning_rate",
                "warmup_steps",
                "lr_scheduler_type",
                "weight_decay",
                "max_grad_norm",
                "fp16",
                "bf16",
                "seed",
                "eval_steps",
                "logging_steps",
                "save_steps",
            )
        },
        disable_tqdm=args.no_progress,
    )
    output_dir = Path(args.output_dir)
    _prepare_output(output_dir, overwrite=args.overwrite_output_dir, resume=args.resume)
    if args.train_file:
        train_dataset = load_training_dataset(args.train_file, max_samples=args.max_train_samples)
    else:
        train_dataset = synthetic_triplets(args.max_train_samples or 10_112, seed=args.seed)
    eval_dataset = load_training_dataset(args.eval_file) if args.eval_file else None
    evaluators = _sts_evaluators(args)
    model = _train_model(args, train_dataset)
    test_before = evaluators["test"](model, epoch=0, steps=0)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=recipes.training_columns(train_dataset, recipe),
        eval_dataset=recipes.training_columns(eval_dataset, recipe) if eval_dataset else None,
        loss=recipes.ranking_loss(model, recipe, scale=args.scale),
        evaluator=evaluators["dev"],
    )
    trainer.train(resume_from_checkpoint=True if args.resume else None)
    history = [row for row in trainer.state.log_history if any("spearman" in key for key in row)]
    test_after = evaluators["test"](model, epoch=history[-1]["epoch"], steps=trainer.state.global_step)
    final = output_dir / "final"
    trainer.save_model(str(final))
    results = {"dev": (history[0], history[-1]), "test": (test_before, test_after)}
    _print_metrics(results)
    _write_metrics(output_dir / "metrics.json", results)
    _print_neighbours(model, evaluators["dev"].sentences1, evaluators["dev"].sentences2, count=3)
    print(f"\nmodel:      {final}\nmodel card: {final / 'README.md'}")


def _metric(row: dict[str, float], split: str, name: str) -> float:
    """The value in `row` of, say, `sts-dev_pearson_cosine`, whether or not it is prefixed with `eval_`."""
    key = f"sts-{split}_{name}"
    return row[key] if key in row else row[f"eval_{key}"]


METRICS = tuple(
    f"{correlation}_{similarity}" for similarity in (*SIMILARITIES, "max") for correlation in ("pearson", "spearman")
)
BeforeAfter = dict[str, tuple[dict[str, float], dict[str, float]]]
"""Per split, all metrics before and after training."""


def _print_metrics(results: BeforeAfter) -> None:
    header = "".join(f"{f'{split} before':>14}{f'{split} after':>14}" for split in results)
    print(f"\n{'STS metric':<20}{header}")
    for name in METRICS:
        values = [_metric(row, split, name) for split, rows in results.items() for row in rows]
        print(f"{name:<20}" + "".join(f"{value:>14.4f}" for value in values))


def _write_metrics(path: Path, results: BeforeAfter) -> None:
    table = {
        when: {split: {name: _metric(rows[i], split, name) for name in METRICS} for split, rows in results.items()}
        for i, when in enumerate(("before", "after"))
    }
    path.write_text(_strict_json(table) + "\n")


def _strict_json(table: Any) -> str:
    """Nested numbers as JSON, which has no NaN: null stands for a metric that is not defined."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(entry) for key, entry in value.items()}
        return value if math.isfinite(value) else None

    return json.dumps(finite(table), indent=2, allow_nan=False)


def _print_neighbours(model: SentenceTransformer, queries: Sequence[str], corpus: Sequence[str], count: int) -> None:
    """The nearest sentence of the corpus for a few queries spread over the set."""
    candidates = sorted(set(corpus))
    chosen = list(queries[:: max(1, len(queries) // count)][:count])
    embeddings = (model.encode(texts, show_progress_bar=False) for texts in (chosen, candidates))
    scores = model.similarity(*embeddings)
    print("\nnearest neighbours")
    for query, row in zip(chosen, scores, strict=True):
        best = next((i for i in row.argsort(descending=True).tolist() if candidates[i] != query), None)
        if best is not None:
            print(f"  {query}\n  -> {row[best]:.3f}  {candidates[best]}")


# --- encode, evaluate, build, info ------------------------------------------------------------------------------------


def _add_encode(commands: Any) -> None:
    parser = commands.add_parser(
        "encode",
        help="embed the lines of a text file into a .npy matrix or a Parquet file",
        description="Reads one text per line (UTF-8; only a newline ends a line, and an empty line is an empty text) "
        "and writes a matrix [lines, dim] as .npy, or a column 'embedding' as .parquet, in memory that does not grow "
        "with the number of lines. A run that was killed and is called again goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument("input", metavar="TEXTS", help="text file, or - for standard input")
    parser.add_argument("output", metavar="OUT", help="OUT.npy or OUT.parquet; it appears when it is whole")
    parser.add_argument("--batch-size", type=_positive, default=128, help="batch size in texts of 64 tokens")
    parser.add_argument("--chunk-size", type=_positive, default=16_384, help="lines at a time: what a kill can cost")
    parser.add_argument("--normalize", action="store_true", help="scale every embedding to length 1")
    parser.add_argument("--truncate-dim", type=_positive, help="keep the first dimensions only")
    parser.add_argument(
        "--precision", choices=("float32", "binary", "ubinary"), default="float32", help="of the output"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt-name", help="put the model's prompt of this name before every text")
    prompt.add_argument("--prompt", help="put this before every text")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=_encode)


def _encode(args: argparse.Namespace) -> None:
    from triton_st.encode_file import encode_file, standard_input
    from triton_st.sentence_transformer import SentenceTransformer

    target = Path(args.output)
    if args.input == "-" and not os.access(target.parent, os.W_OK):
        raise CommandError(f"cannot write to {target}")
    with standard_input(target.parent) if args.input == "-" else contextlib.nullcontext(Path(args.input)) as source:
        rows, dimension, resumed = encode_file(
            lambda: SentenceTransformer(args.model),
            args.model,
            source,
            target,
            chunk_size=args.chunk_size,
            precision=args.precision,
            show_progress_bar=not args.no_progress,
            batch_size=args.batch_size,
            normalize_embeddings=args.normalize,
            truncate_dim=args.truncate_dim,
            prompt_name=args.prompt_name,
            prompt=args.prompt,
        )
    before = f", {resumed} of them by an earlier run" if resumed else ""
    print(f"{args.output}: {rows} embeddings of {dimension} numbers{before}")


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="Pearson and Spearman on sentence pairs with graded similarity",
        description="Prints Pearson and Spearman correlation of cosine, Manhattan, Euclidean and dot-product "
        "similarity with the scores of a CSV file (score, sentence1, sentence2), as JSON with --json.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument("--sts", metavar="FILE", help="CSV with score, sentence1, sentence2; default: the built-in set")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from triton_st.sentence_transformer import SentenceTransformer

    evaluator = _sts_evaluators(argparse.Namespace(sts_dev=None, sts_test=args.sts))["test"]
    metrics = evaluator(SentenceTransformer(args.model))
    if args.json:
        print(_strict_json(metrics))
        return
    for name, value in metrics.items():
        print(f"{name:<32}{value:>10.4f}")


def _build(args: argparse.Namespace) -> None:
    from triton_st import extension

    try:
        print(extension.load())
    except extension.BuildError as error:
        raise CommandError(f"the C++ kernels could not be built: {error}") from error


def _info(args: argparse.Namespace) -> None:
    from triton_st import info

    print(info.report())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="triton_st", description="Fused Triton and C++ kernels that train and run sentence-embedding models."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_encode(commands)
    _add_evaluate(commands)
    build = commands.add_parser(
        "build",
        help="compile the C++ kernels ahead of time",
        description="Compiles csrc/ into the kernel cache unless it is there, and prints the library's path. "
        "TRITON_ST_CACHE, CXX and TRITON_ST_CXXFLAGS choose the cache, the compiler and further flags.",
    )
    build.set_defaults(run=_build)
    info = commands.add_parser(
        "info",
        help="which backend serves what, and why not another",
        description="Versions, devices, and for each device the backend that serves it and why not another.",
    )
    info.set_defaults(run=_info)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "huggingface_hub", "triton_st.evaluation"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        args.run(args)
    except (CommandError, ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"triton_st: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntriton_st: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
