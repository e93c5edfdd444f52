"""The model card: facts and sections of sentence-transformers' card, valid metadata, any text shown as itself."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_st import backend, recipes
from triton_st.evaluation import EmbeddingSimilarityEvaluator
from triton_st.losses import MultipleNegativesRankingLoss
from triton_st.model_card import SentenceTransformerModelCardData
from triton_st.model_card_text import clean, escape
from triton_st.sentence_transformer import SentenceTransformer

TEXTS = [f"A {colour} {animal} {verb}." for colour in ("red", "blue", "green") for animal in ("cat", "dog")
         for verb in ("sleeps", "runs", "eats", "sings quietly in the old garden")]  # fmt: skip
HOSTILE = [
    "pipes | in | cells || and \\| escaped",
    "`code` and ```\nfences\n``` and ``",
    "\"quotes\" 'single' {{ jinja }} {% raw %} ${x}",
    "key: value # comment\n- list\n---\nfront: matter\n...",
    "<script>alert(1)</script> <b>bold</b> &amp; <!-- comment",
    "**bold** _em_ __dunder__ ~~gone~~ [link](http://x) ![img](y) [^1]: note",
    "emoji 👩‍👩‍👧 🇩🇪 日本語 עברית ‮rtl\u202c",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n# heading",
    "\x00null \x1b[31mred\x07 \ufeffbom \x85 \u2028 sep",
    "lone \ud800 surrogate",
    "  spaces around  \t tab\r\nwindows\rmac",
    "yes",
    "123",
    "~",
    "? !tag &anchor *alias @at %percent",
    "x" * 50_000,
]


@pytest.fixture(autouse=True)
def plain_backend() -> Iterator[None]:
    with backend.use("reference"):  # no numbers of kernels are in question here
        yield


@pytest.fixture(scope="module")
def encoder() -> SentenceTransformer:
    with backend.use("reference"):
        return recipes.new_model(TEXTS, vocab_size=200, max_seq_length=32, num_hidden_layers=1)


@pytest.fixture
def model(encoder: SentenceTransformer) -> SentenceTransformer:
    encoder.model_card_data = SentenceTransformerModelCardData()
    return encoder


def triplets(texts: list[str] = TEXTS) -> Dataset:
    return Dataset.from_dict({"anchor": texts, "positive": texts[1:] + texts[:1], "negative": texts[::-1]})


def evaluator(name: str, metrics: dict[str, float], **attributes: Any) -> tuple[Any, dict[str, float]]:
    prefix = f"{name}_" if name else ""
    prefixed = {prefix + key: value for key, value in metrics.items()}
    made = EmbeddingSimilarityEvaluator(["a", "b"], ["c", "d"], [1, 2], name=name, **attributes)
    made.primary_metric = list(prefixed)[-1]
    return made, prefixed


LOG = [
    {"eval_sts-dev_spearman_max": 0.25, "eval_sts-dev_pearson_max": 0.2, "epoch": 0.0, "step": 0},
    {"loss": 5.266599, "learning_rate": 1e-5, "grad_norm": 1.5, "epoch": 0.012658227848, "step": 1},
    {"loss": 5.1, "learning_rate": 5e-5, "grad_norm": 1.5, "epoch": 0.5, "step": 40},
    {"eval_loss": 4.98765, "eval_runtime": 2.5, "eval_sts-dev_spearman_max": 0.5, "epoch": 0.5, "step": 40},
    {"train_runtime": 90.0, "train_loss": 5.0, "epoch": 1.0, "step": 79},
]


def train(model: SentenceTransformer, **changes: Any) -> SentenceTransformerModelCardData:
    """Card data as the trainer leaves it after a run."""
    data = model.model_card_data
    for step, value in ((0, 0.25), (40, 0.5), (79, 0.612345)):
        for name in ("sts-dev", "sts-test"):
            if name == "sts-dev" or step == 79:
                made, metrics = evaluator(name, {"pearson_cosine": value / 2, "spearman_max": value})
                data.set_evaluation_metrics(made, metrics, step / 79, step)
    arguments = {
        "args": recipes.arguments("/secret/place", fp16=True, learning_rate=1e-3),
        "train_dataset": triplets(),
        "eval_dataset": triplets().select(range(5)),
        "loss": MultipleNegativesRankingLoss(model, scale=30.0),
        "log_history": LOG,
    }
    data.set_training_run(**arguments | changes)
    return data


def section(card: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above. Code is no heading."""
    level = len(heading) - len(heading.lstrip("#"))
    kept: list[str] = []
    fenced = inside = False
    for line in card.splitlines():
        fenced ^= line.strip().startswith("```")
        depth = 0 if fenced else len(line) - len(line.lstrip("#"))
        if depth and depth <= level:
            inside = line == heading
        elif inside:
            kept.append(line)
    assert kept, f"no {heading!r}"
    return "\n".join(kept)


def tables(text: str) -> list[list[list[str]]]:
    """Tables as a Markdown reader sees them: rows of cells' HTML."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    html = markdown.render(text)
    return [
        [
            re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        for table in re.findall(r"<table>(.*?)</table>", html, re.DOTALL)
    ]


def metadata(card: str) -> dict[str, Any]:
    """The metadata block, read in the three ways that matter and found the same."""
    data = ModelCard(card).data
    block = card.split("---\n")[1]
    loaded = yaml.safe_load(block)
    assert ModelCardData(**dict(loaded)).to_dict() == data.to_dict()
    return loaded


# A trained model ----------------------------------------------------------------------------------------------------


def test_metadata_of_a_trained_model(model: SentenceTransformer) -> None:
    model.model_card_data = SentenceTransformerModelCardData(
        language="en",
        license="apache-2.0",
        model_name="Small: an encoder",
        train_datasets=[{"name": "AllNLI", "id": "sentence-transformers/all-nli"}],
    )
    model.model_card_data.set_base_model("org/base", revision="0123abc")
    found = metadata(train(model).to_card(model))
    assert found["language"] == ["en"]
    assert found["license"] == "apache-2.0"
    assert found["library_name"] == "sentence-transformers"
    assert found["pipeline_tag"] == "sentence-similarity"
    assert found["base_model"] == "org/base"
    assert found["datasets"] == ["sentence-transformers/all-nli"]
    assert found["metrics"] == ["pearson_cosine", "spearman_max"]
    assert {"sentence-transformers", "sentence-similarity", "feature-extraction", "dense"} <= set(found["tags"])
    assert {"generated_from_trainer", "dataset_size:24", "loss:MultipleNegativesRankingLoss"} <= set(found["tags"])
    assert found["widget"]
    for widget in found["widget"]:
        assert widget["source_sentence"] in TEXTS
        assert widget["source_sentence"] not in widget["sentences"]
        assert set(widget["sentences"]) <= set(TEXTS)
    (index,) = found["model-index"]
    assert index["name"] == "Small: an encoder"
    values = {
        (result["dataset"]["type"], metric["type"]): (metric["name"], metric["value"])
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert values == {
        ("sts-dev", "pearson_cosine"): ("Pearson Cosine", 0.612345 / 2),
        ("sts-dev", "spearman_max"): ("Spearman Max", 0.612345),
        ("sts-test", "pearson_cosine"): ("Pearson Cosine", 0.612345 / 2),
        ("sts-test", "spearman_max"): ("Spearman Max", 0.612345),
    }
    assert index["results"][0]["task"] == {"type": "semantic-similarity", "name": "Semantic Similarity"}


def test_sections_are_those_of_sentence_transformers(model: SentenceTransformer) -> None:
    folder = Path(sentence_transformers.__file__).parent / "sentence_transformer"
    template = re.sub(
        r"<!--.*?-->", "", (folder / "model_card_template.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    theirs = set(re.findall(r"^\s*(#{2,4} [A-Z][^{\n]*?)\s*$", template, re.MULTILINE))
    # Carbon tracking is not ours, and further reading is no fact about a model.
    theirs -= {"### Environmental Impact", "## Additional Resources"}
    card = train(model, hardware="NVIDIA H100", training_time=100.0).to_card(model)
    ours = set(re.findall(r"^(#{1,4} .*?)$", card, re.MULTILINE))
    assert len(theirs) > 12
    assert theirs <= ours, theirs - ours


def test_details_come_from_the_model(model: SentenceTransformer) -> None:
    model.model_card_data = SentenceTransformerModelCardData(
        language=["en", "de"], license="mit", train_datasets=[{"name": "NLI"}]
    )
    model.model_card_data.set_base_model("org/base", revision="0123abc")
    card = train(model).to_card(model)
    details = section(card, "### Model Description")
    assert "- **Maximum Sequence Length:** 32 tokens" in details
    assert "- **Output Dimensionality:** 50 dimensions" in details
    assert "- **Similarity Function:** Cosine Similarity" in details
    assert "- **Base Model:** [org/base](https://huggingface.co/org/base) at revision `0123abc`" in details
    assert f"- **Parameters:** {sum(p.numel() for p in model.parameters()):,}" in details
    assert "- **Training Dataset:**\n    - NLI" in details
    assert "- **Languages:** en, de" in details
    assert "- **License:** mit" in details
    assert str(model) in section(card, "### Full Model Architecture")
    assert "\n# SentenceTransformer based on org/base\n" in card
    assert "fine-tuned from [org/base](https://huggingface.co/org/base), on the NLI dataset. It turns" in card


def test_evaluation_tables_are_per_dataset_with_the_primary_metric_in_bold(model: SentenceTransformer) -> None:
    card = train(model).to_card(model)
    text = section(card, "### Metrics")
    assert (
        tables(text)
        == [
            [
                ["Metric", "Value"],
                ["pearson_cosine", "0.3062"],
                ["<strong>spearman_max</strong>", "<strong>0.6123</strong>"],
            ]
        ]
        * 2
    )
    assert text.index("* Dataset: `sts-dev`") < text.index("* Dataset: `sts-test`")
    assert text.count("#### Semantic Similarity") == 2
    assert "EmbeddingSimilarityEvaluator" in text


def test_evaluator_settings_are_shown(model: SentenceTransformer) -> None:
    made, metrics = evaluator("", {"spearman_cosine": 0.5}, truncate_dim=16)
    model.model_card_data.set_evaluation_metrics(made, metrics)
    card = model.model_card_data.to_card(model)
    assert '      "truncate_dim": 16' in section(card, "#### Semantic Similarity")
    (result,) = metadata(card)["model-index"][0]["results"]
    assert result["dataset"] == {"name": "Unknown", "type": "unknown"}


def test_training_dataset_facts(model: SentenceTransformer) -> None:
    model.model_card_data.train_datasets = [{"name": "NLI"}]
    text = section(train(model).to_card(model), "### Training Dataset")
    assert "#### NLI" in text
    assert "* Size: 24 training samples" in text
    assert "* Columns: <code>anchor</code>, <code>positive</code> and <code>negative</code>" in text
    assert "based on the first 24 samples" in text
    statistics, samples = tables(text)
    counts = [len(ids) for ids in model.tokenizer(TEXTS)["input_ids"]]
    spread = (
        f"min: {min(counts)} tokens</li><li>mean: {round(sum(counts) / 24, 2)} tokens</li><li>max: {max(counts)} tokens"
    )
    assert statistics == [
        ["", "anchor", "positive", "negative"],
        ["type", "string", "string", "string"],
        ["details"] + [f"<ul><li>{spread}</li></ul>"] * 3,
    ]
    data = triplets()
    assert samples[1:] == [[f"<code>{data[row][column]}</code>" for column in data.column_names] for row in range(3)]
    assert "MultipleNegativesRankingLoss" in text
    config = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    assert config == {"scale": 30.0, "similarity_fct": "cos_sim"}


def test_statistics_use_the_first_thousand_rows_and_the_models_length_limit(model: SentenceTransformer) -> None:
    texts = ["cat"] * 1000 + ["dog " * 500] * 200
    short = train(model, train_dataset=triplets(texts)).to_card(model)
    text = section(short, "### Training Dataset")
    assert "* Size: 1,200 training samples" in text
    assert "based on the first 1,000 samples" in text
    assert "max: 3 tokens" in text  # the long ones come later
    text = section(train(model, train_dataset=triplets(texts[::-1])).to_card(model), "### Training Dataset")
    assert "max: 32 tokens" in text


def test_other_columns_have_their_own_statistics(model: SentenceTransformer) -> None:
    data = Dataset.from_dict(
        {"sentence": TEXTS, "label": [0, 0, 1] * 8, "score": [0.5, 1.25, 3.0] * 8, "tags": [["a"], ["b", "c"], []] * 8}
    )
    text = section(train(model, train_dataset=data, eval_dataset=None).to_card(model), "### Training Dataset")
    details = tables(text)[0][2]
    assert details[2] == "<ul><li>0: 66.67%</li><li>1: 33.33%</li></ul>"
    assert details[3] == "<ul><li>min: 0.5</li><li>mean: 1.58</li><li>max: 3.0</li></ul>"
    assert details[4] == "<ul><li>min: 0 elements</li><li>mean: 1.0 elements</li><li>max: 2 elements</li></ul>"


def test_several_and_streamed_datasets(model: SentenceTransformer) -> None:
    streamed = triplets().to_iterable_dataset()
    data = train(model, train_dataset={"nli": triplets(), "web": streamed}, eval_dataset=None)
    card = data.to_card(model)
    text = section(card, "### Training Datasets")
    assert "#### nli" in text
    assert "#### web" in text
    assert "trained on the nli and web datasets" in card
    assert next(iter(streamed))["anchor"] == TEXTS[0]  # nothing of it was used up
    assert "dataset_size:24" in metadata(card)["tags"]
    assert "### Evaluation Dataset" not in card


def test_name_of_a_file_reader_is_not_a_name(model: SentenceTransformer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"anchor": "a", "positive": "b"}) + "\n")
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    card = train(model, train_dataset=data, eval_dataset=None).to_card(model)
    assert "#### Unnamed Dataset" in card
    assert "json dataset" not in card
    assert str(tmp_path) not in card


def test_hub_origin_of_a_dataset_is_found(model: SentenceTransformer) -> None:
    data = triplets()
    revision = "a" * 40
    data.info.dataset_name = "all-nli"
    data.info.download_checksums = {f"hf://datasets/sentence-transformers/all-nli@{revision}/pair/train.parquet": {}}
    card = train(model, train_dataset=data).to_card(model)
    assert (
        "* Dataset: [sentence-transformers/all-nli](https://huggingface.co/datasets/sentence-transformers/all-nli)"
        in card
    )
    assert f"[aaaaaaa](https://huggingface.co/datasets/sentence-transformers/all-nli/tree/{revision})" in card
    assert metadata(card)["datasets"] == ["sentence-transformers/all-nli"]


def test_hyperparameters_that_differ_and_all(model: SentenceTransformer) -> None:
    text = section(train(model).to_card(model), "### Training Hyperparameters")
    changed, everything = text.split("#### All Hyperparameters")
    listed = dict(re.findall(r"^- `(.*?)`: (.*)$", changed, re.MULTILINE))
    assert listed == {
        "per_device_train_batch_size": "128",
        "per_device_eval_batch_size": "128",
        "num_train_epochs": "1",
        "learning_rate": "0.001",
        "warmup_steps": "0.1",
        "fp16": "True",
        "batch_sampler": "no_duplicates",
        "logging_steps": "1",
        "eval_strategy": "steps",
        "eval_steps": "20",
        "save_steps": "40",
        "save_total_limit": "2",
    }
    assert "- `adam_beta2`: 0.999" in everything
    assert "- `optim`: adamw_torch_fused" in everything
    assert everything.strip().startswith("<details><summary>")
    assert everything.strip().endswith("</details>")
    assert "/secret/place" not in text


class Mode(Enum):
    FAST = "fast"
    SLOW = "slow"


@dataclass
class OtherArguments:
    output_dir: str
    mode: Mode = Mode.FAST
    rate: float = 0.5
    names: list[str] = field(default_factory=lambda: ["x"])
    limit: float = math.inf

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def test_any_dataclass_of_arguments_will_do(model: SentenceTransformer) -> None:
    data = train(model, args=OtherArguments("o", mode=Mode.SLOW, names=["x", "y|`z"]))
    assert data.non_default_hyperparameters == {"mode": "slow", "names": ["x", "y|`z"]}
    assert list(data.hyperparameters) == ["mode", "rate", "names", "limit"]
    assert "- `mode`: slow" in data.to_card(model)


def test_training_log_merges_losses_and_primary_metrics_by_step(model: SentenceTransformer) -> None:
    data = train(model)
    (table,) = tables(section(data.to_card(model), "### Training Logs"))
    assert table == [
        ["Epoch", "Step", "Training Loss", "Validation Loss", "sts-dev_spearman_max", "sts-test_spearman_max"],
        ["0.0", "0", "-", "-", "0.25", "-"],
        ["0.0127", "1", "5.2666", "-", "-", "-"],
        ["0.5", "40", "5.1", "4.9877", "0.5", "-"],
        ["1.0", "79", "-", "-", "0.6123", "0.6123"],
    ]
    made, metrics = evaluator("sts-test", {"spearman_max": math.nan})
    data.set_evaluation_metrics(made, metrics, -1, -1)  # outside of training
    data.set_best_model_step(40)
    text = section(data.to_card(model), "### Training Logs")
    (table,) = tables(text)
    assert table[-1] == ["-1", "-1", "-", "-", "-", "nan"]
    assert table[3][1:3] == ["<strong>40</strong>", "<strong>5.1</strong>"]
    assert "The bold row" in text


def test_an_evaluation_by_hand_before_training_is_step_zero(model: SentenceTransformer) -> None:
    made, metrics = evaluator("sts-test", {"spearman_max": 0.1})
    model.model_card_data.set_evaluation_metrics(made, metrics, -1, -1)
    data = train(model)
    (table,) = tables(section(data.to_card(model), "### Training Logs"))
    assert table[0][4:] == ["sts-test_spearman_max", "sts-dev_spearman_max"]
    assert table[1] == ["0.0", "0", "-", "-", "0.1", "0.25"]
    assert table[-1][1] == "79"


def test_a_second_training_starts_a_new_log(model: SentenceTransformer) -> None:
    train(model)
    made, metrics = evaluator("sts-test", {"spearman_max": 0.2})
    model.model_card_data.set_evaluation_metrics(made, metrics, -1, -1)  # between the two
    for step, value in ((0, 0.61), (10, 0.71)):
        made, metrics = evaluator("sts-dev", {"spearman_max": value})
        model.model_card_data.set_evaluation_metrics(made, metrics, step / 10, step)
    model.model_card_data.set_training_run(
        args=recipes.arguments("o"),
        train_dataset=triplets(),
        loss=MultipleNegativesRankingLoss(model),
        log_history=[{"loss": 4.0, "epoch": 1.0, "step": 10}],
    )
    (table,) = tables(section(model.model_card_data.to_card(model), "### Training Logs"))
    assert [row[1] for row in table] == ["Step", "0", "10"]
    assert table[1][2:] == ["-", "0.2", "0.61"]
    assert table[2][2:] == ["4.0", "-", "0.71"]


def test_the_best_steps_metrics_are_shown_where_training_went_back_to_it(model: SentenceTransformer) -> None:
    history = [{"eval_sts-dev_pearson_cosine": 0.31, "eval_sts-dev_spearman_max": 0.77, "epoch": 0.5, "step": 40}]
    data = train(model, log_history=history)
    data.set_best_model_step(40)
    card = data.to_card(model)
    first, second = tables(section(card, "### Metrics"))
    assert first[1:] == [["pearson_cosine", "0.31"], ["<strong>spearman_max</strong>", "<strong>0.77</strong>"]]
    assert second[1] == ["pearson_cosine", "0.3062"]  # step 40 has none of sts-test: the latest
    assert metadata(card)["model-index"][0]["results"][0]["metrics"][1]["value"] == 0.77
    made, metrics = evaluator("sts-dev", {"pearson_cosine": 0.32, "spearman_max": 0.78})
    data.set_evaluation_metrics(made, metrics, -1, -1)  # the model as it is now, evaluated by hand
    assert tables(section(data.to_card(model), "### Metrics"))[0][1] == ["pearson_cosine", "0.32"]


def test_log_without_evaluators_shows_every_metric_but_times(model: SentenceTransformer) -> None:
    history = [
        {"eval_loss": 1.5, "eval_accuracy": 0.75, "eval_runtime": 3.0, "eval_samples_per_second": 9.0, "step": 5}
    ]
    model.model_card_data.set_training_run(
        args=recipes.arguments("o"), train_dataset=None, loss=MultipleNegativesRankingLoss(model), log_history=history
    )
    (table,) = tables(section(model.model_card_data.to_card(model), "### Training Logs"))
    assert table == [["Epoch", "Step", "Validation Loss", "accuracy"], ["-", "5", "1.5", "0.75"]]


def test_a_long_log_is_folded(model: SentenceTransformer) -> None:
    history = [{"loss": 1.0, "epoch": step / 200, "step": step} for step in range(1, 201)]
    text = section(train(model, log_history=history).to_card(model), "### Training Logs")
    assert text.strip().startswith("<details>")
    assert len(tables(text)[0]) == 1 + 200 + 1  # with the evaluation before step 1


def test_environment_and_citations(model: SentenceTransformer) -> None:
    card = train(model, training_time=4000.0, evaluation_time=90.0, hardware="2 CPU cores").to_card(model)
    times = section(card, "### Training Time")
    assert "- **Training:** 1.1 hours" in times
    assert "- **Evaluation:** 1.5 minutes" in times
    assert "- **Total:** 1.1 hours" in times
    assert "- **Hardware:** 2 CPU cores" in card
    versions = section(card, "### Framework Versions")
    for name in ("Python", "triton_st", "PyTorch", "Triton", "Transformers", "Tokenizers", "Datasets"):
        assert re.search(rf"^- {name}: \d+\.\d+", versions, re.MULTILINE), name
    bibtex = section(card, "### BibTeX")
    assert "reimers-2019-sentence-bert" in section(bibtex, "#### Sentence Transformers")
    assert MultipleNegativesRankingLoss(model).citation.strip() in section(bibtex, "#### MultipleNegativesRankingLoss")
    without = train(model).to_card(model)
    assert "### Training Time" not in without
    assert "### Training Hardware" not in without


def test_losses_of_one_paper_share_its_entry(model: SentenceTransformer) -> None:
    data = model.model_card_data
    data.citations |= {"OneLoss": "@misc{one}", "OtherLoss": "@misc{one}\n"}
    text = section(data.to_card(model), "### BibTeX")
    assert "#### OneLoss and OtherLoss" in text
    assert text.count("@misc{one}") == 1


def test_a_second_run_replaces_the_first(model: SentenceTransformer) -> None:
    model.model_card_data.train_datasets = [{"name": "NLI"}]
    train(model)
    data = train(model, train_dataset=triplets(TEXTS[:7]), log_history=LOG[:2])
    card = data.to_card(model)
    assert [tag for tag in metadata(card)["tags"] if tag.startswith("dataset_size")] == ["dataset_size:7"]
    assert "#### NLI" in card  # its user's name for it
    assert "4.9877" not in card


# Usage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["triton_st", "sentence_transformers"])
def test_usage_snippets_run_and_print_what_the_card_says(
    package: str, model: SentenceTransformer, tmp_path: Path
) -> None:
    train(model)
    model.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (snippet,) = [code for code in snippets if code.startswith(f"from {package} ")]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet.replace("path/to/this/model", str(tmp_path / "model")), {})
    expected = re.findall(r"^# (.*)$", snippet, re.MULTILINE)
    assert printed.getvalue().splitlines()[0] == expected[0] == "(3, 50)"
    numbers = [re.findall(r"-?\d\.\d+", text) for text in (printed.getvalue(), "\n".join(expected))]
    assert len(numbers[0]) == 9
    assert [float(x) for x in numbers[0]] == pytest.approx([float(x) for x in numbers[1]], abs=2e-4)


def test_usage_without_examples_runs_nothing(model: SentenceTransformer) -> None:
    model.model_card_data = SentenceTransformerModelCardData(generate_widget_examples=False, model_id="me/mine")
    train(model)
    model.encode = None  # type: ignore[assignment, method-assign]
    try:
        card = model.model_card_data.to_card(model)
    finally:
        del model.encode
    assert "SentenceTransformer('me/mine')" in card
    assert "torch.Size([3, 3])" in card
    assert "widget" not in metadata(card)


def test_making_a_card_leaves_mode_and_random_state_alone(model: SentenceTransformer) -> None:
    import torch

    train(model)
    model.train()
    before = torch.get_rng_state()
    first, second = model.model_card_data.to_card(model), model.model_card_data.to_card(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    model.eval()
    assert model.model_card_data.to_card(model) == first  # no dropout in what it shows


# Numbers that are none ----------------------------------------------------------------------------------------------


def test_nan_is_told_in_tables_and_left_out_of_metadata(model: SentenceTransformer) -> None:
    for name, value in (("sts-dev", math.nan), ("sts-test", math.inf)):
        made, metrics = evaluator(
            name, {"pearson_cosine": 0.5 if name == "sts-dev" else value, "spearman_cosine": value}
        )
        model.model_card_data.set_evaluation_metrics(made, metrics, 1.0, 79)
    data = train(model, log_history=[{"loss": math.nan, "epoch": 0.5, "step": 3}])
    for name, value in (("sts-dev", math.nan), ("sts-test", math.inf)):
        made, metrics = evaluator(
            name, {"pearson_cosine": 0.5 if name == "sts-dev" else value, "spearman_cosine": value}
        )
        data.set_evaluation_metrics(made, metrics, 1.0, 79)
    card = data.to_card(model)
    found = metadata(card)
    assert found["metrics"] == ["pearson_cosine"]
    (result,) = found["model-index"][0]["results"]
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("pearson_cosine", 0.5)]
    first, second = tables(section(card, "### Metrics"))
    assert first[1:] == [["pearson_cosine", "0.5"], ["<strong>spearman_cosine</strong>", "<strong>nan</strong>"]]
    assert second[1][1] == "inf"
    assert ["0.5", "3", "nan"] in [row[:3] for row in tables(section(card, "### Training Logs"))[0]]


def test_no_finite_metric_means_no_model_index(model: SentenceTransformer) -> None:
    made, metrics = evaluator("sts", {"spearman_cosine": math.nan})
    model.model_card_data.set_evaluation_metrics(made, metrics)
    found = metadata(model.model_card_data.to_card(model))
    assert "model-index" not in found
    assert "metrics" not in found


# A model that was never trained -------------------------------------------------------------------------------------


def test_card_of_an_untrained_model_is_short_and_valid(model: SentenceTransformer) -> None:
    card = model.model_card_data.to_card(model)
    found = metadata(card)
    assert set(found) == {"library_name", "pipeline_tag", "tags"}
    assert "generated_from_trainer" not in found["tags"]
    for heading in ("## Evaluation", "### Training Dataset", "### Training Hyperparameters", "### Training Logs"):
        assert f"\n{heading}" not in card
    for heading in ("## Model Details", "## Usage", "### Framework Versions", "## Citation"):
        assert f"\n{heading}\n" in card
    assert len(card) < len(train(model).to_card(model)) / 2


def test_a_model_id_without_owner_is_refused() -> None:
    with pytest.raises(ValueError, match="model_id must be a hub id 'owner/name', got 'mine'"):
        SentenceTransformerModelCardData(model_id="mine")


# Hostile text -------------------------------------------------------------------------------------------------------


def visible(html: str) -> str:
    """The text that a browser shows for a table cell."""
    import html as entities

    assert not re.search(r"<(?!/?code>|br>)", html), html
    return entities.unescape(re.sub(r"</?code>", "", html.replace("<br>", "\n")))


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_samples_show_as_themselves(text: str, model: SentenceTransformer) -> None:
    texts = [text, "plain", "other"]
    columns = {"anchor": texts, "positive": texts[::-1], "negative": ["n1", "n2", "n3"]}
    # Arrow cannot hold a lone surrogate; a data set of another kind could.
    data = InMemory(columns) if "\ud800" in text else Dataset.from_dict(columns)
    card = train(model, train_dataset=data, eval_dataset=None).to_card(model)
    card.encode("utf-8")
    metadata(card)
    block = section(card, "### Training Dataset")
    _, samples = tables(block)
    assert {len(row) for row in samples} == {3}
    assert len(samples) == 4
    shown = clean(text if len(text) <= 1000 else text[:1000] + "...").strip("\n")
    assert visible(samples[1][0]).split() == shown.split()
    assert visible(samples[3][1]).split() == shown.split()
    # What follows is still a card: later sections are not swallowed.
    assert section(card, "## Citation")
    assert re.findall(r"^# .*$", card, re.MULTILINE)[0] == "# SentenceTransformer"


class InMemory:
    """A data set that holds what Arrow would refuse."""

    info = None

    def __init__(self, columns: dict[str, list[str]]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return {name: values[key] for name, values in self.columns.items()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=3, max_size=6), st.text(min_size=1, max_size=20))
def test_any_text_leaves_the_metadata_valid(texts: list[str], name: str) -> None:
    model = StandIn()
    data = SentenceTransformerModelCardData(model_name=name, license=None, language=[])
    made, metrics = evaluator(name, {"spearman_cosine": 0.5})
    data.set_evaluation_metrics(made, metrics)
    rows = InMemory({"anchor": texts, "positive": texts[1:] + texts[:1]})
    data.set_training_run(
        args=OtherArguments(name, names=texts), train_dataset={name: rows}, loss=StandInLoss(), log_history=[]
    )
    card = data.to_card(model)
    found = metadata(card)
    one_line = {" ".join(clean(text).split()) for text in texts}
    for widget in found.get("widget", []):
        assert {widget["source_sentence"], *widget["sentences"]} <= one_line
    assert found["model-index"][0]["results"][0]["dataset"]["type"] == (clean(name) or "unknown")
    assert json.loads(json.dumps(data.to_state(), allow_nan=False))


class StandInLoss:
    def get_config_dict(self) -> dict[str, Any]:
        return {"scale": 1.0, "function": math.sqrt, "other": object}


class StandIn:
    """The little of a model that a card needs."""

    max_seq_length, similarity_fn_name, training = 16, "dot", False

    def get_embedding_dimension(self) -> int:
        return 4

    def parameters(self) -> list[Any]:
        return []

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        import torch

        return {"cu_seqlens": torch.tensor([0, *(2 for _ in texts)]).cumsum(0)}

    def encode(self, texts: list[str], **_: Any) -> Any:
        import torch

        return torch.zeros(len(texts), 4)

    def similarity(self, a: Any, b: Any) -> Any:
        return a @ b.T


@given(st.text(max_size=80))
def test_escaped_text_shows_as_itself(text: str) -> None:
    markdown = (
        pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    )
    html = markdown.renderInline(f"<code>{escape(text)}</code>")
    assert visible(html).split() == clean(text).split()


# State --------------------------------------------------------------------------------------------------------------


def test_state_survives_json_and_gives_the_same_card(model: SentenceTransformer) -> None:
    data = train(
        model, log_history=[*LOG, {"loss": math.nan, "epoch": 1.0, "step": 79}], hardware="x", training_time=3.0
    )
    made, metrics = evaluator("broken", {"spearman_cosine": -math.inf})
    data.set_evaluation_metrics(made, metrics, 1.0, 79)
    data.set_best_model_step(40)
    card = data.to_card(model)
    text = json.dumps(data.to_state(), allow_nan=False)
    restored = SentenceTransformerModelCardData.from_state(json.loads(text))
    assert restored.to_card(model) == card
    assert restored.to_state() == data.to_state()


def test_a_resumed_run_goes_on_with_the_log_and_the_metrics(model: SentenceTransformer) -> None:
    expected = train(model).to_card(model)
    model.model_card_data = SentenceTransformerModelCardData()
    for name, step in (("sts-dev", 0), ("sts-dev", 40)):
        made, metrics = evaluator(name, {"pearson_cosine": 0.1, "spearman_max": {0: 0.25, 40: 0.5}[step]})
        model.model_card_data.set_evaluation_metrics(made, metrics, step / 79, step)
    state = json.loads(json.dumps(model.model_card_data.to_state()))
    model.model_card_data = data = SentenceTransformerModelCardData.from_state(state)
    for name in ("sts-dev", "sts-test"):
        made, metrics = evaluator(name, {"pearson_cosine": 0.612345 / 2, "spearman_max": 0.612345})
        data.set_evaluation_metrics(made, metrics, 1.0, 79)
    data.set_training_run(
        args=recipes.arguments("/secret/place", fp16=True, learning_rate=1e-3), train_dataset=triplets(),
        eval_dataset=triplets().select(range(5)), loss=MultipleNegativesRankingLoss(model, scale=30.0), log_history=LOG,
    )  # fmt: skip
    assert data.to_card(model) == expected


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state must hold the fields of .*\['nonsense'\]"):
        SentenceTransformerModelCardData.from_state({"nonsense": 1})
