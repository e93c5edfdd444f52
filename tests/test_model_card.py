"""The model card: facts and sections of sentence-transformers' card."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentence_transformers
from datasets import Dataset, load_dataset

from tests.card_runs import (
    LOG,
    TEXTS,
    Mode,
    OtherArguments,
    evaluator,
    metadata,
    new_model,
    section,
    tables,
    train,
    triplets,
)
from triton_st import backend, recipes
from triton_st.losses import MultipleNegativesRankingLoss
from triton_st.model_card import SentenceTransformerModelCardData
from triton_st.sentence_transformer import SentenceTransformer


@pytest.fixture(autouse=True)
def plain_backend() -> Iterator[None]:
    with backend.use("reference"):  # no numbers of kernels are in question here
        yield


@pytest.fixture(scope="module")
def encoder() -> SentenceTransformer:
    return new_model()


@pytest.fixture
def model(encoder: SentenceTransformer) -> SentenceTransformer:
    encoder.model_card_data = SentenceTransformerModelCardData()
    return encoder


# A trained model ----------------------------------------------------------------------------------------------------


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
    assert config == {
        "scale": 30.0,
        "similarity_fct": "cos_sim",
        "gather_across_devices": False,
        "directions": ["query_to_doc"],
        "partition_mode": "joint",
        "hardness_mode": None,
        "hardness_strength": 0.0,
    }


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
