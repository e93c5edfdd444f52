"""The model card's metadata block and its state: valid, complete, no number that is none."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest

from tests.card_runs import LOG, TEXTS, evaluator, metadata, new_model, section, tables, train, triplets
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
