"""The evaluators against sentence-transformers' and scipy's numbers, and what they say of input that has none."""

from __future__ import annotations

import csv
import logging
import math
import multiprocessing
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sentence_transformers import SentenceTransformer as ReferenceModel
from sentence_transformers import SimilarityFunction
from sentence_transformers.sentence_transformer import evaluation as reference

from triton_st import evaluation
from triton_st.evaluation import (
    EmbeddingSimilarityEvaluator,
    SequentialEvaluator,
    pearson_correlation,
    spearman_correlation,
)

FUNCTIONS = ["cosine", "manhattan", "euclidean", "dot"]
TEN = {f"{kind}_{fn}" for kind in ("pearson", "spearman") for fn in [*FUNCTIONS, "max"]}


class Card:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, float], float, int]] = []

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: dict[str, float], epoch: float = 0, step: int = 0
    ) -> None:
        self.calls.append((evaluator, metrics, epoch, step))


class TableModel:
    """Embeds a sentence as the row that a table gives for it, and remembers what it was asked."""

    similarity_fn_name = "cosine"

    def __init__(self, table: dict[str, np.ndarray]) -> None:
        self.table = table
        self.encoded: list[list[str]] = []
        self.model_card_data = Card()

    def encode(self, sentences: list[str], **kwargs: Any) -> np.ndarray:
        self.encoded.append(list(sentences))
        assert kwargs["convert_to_numpy"] is True
        return np.stack([self.table[sentence] for sentence in sentences])


def pairs(
    n: int, seed: int = 0, dim: int = 7, scale: float = 1.0
) -> tuple[list[str], list[str], list[float], TableModel]:
    """n pairs of repeating sentences, gold scores with ties, and a model that knows the sentences."""
    rng = np.random.default_rng(seed)
    names = [f"s{index}" for index in range(max(2, n // 2))]
    table = {name: (rng.normal(size=dim) * scale).astype(np.float32) for name in names}
    first, second = (rng.choice(names, size=n).tolist() for _ in range(2))
    return first, second, rng.integers(0, 6, size=n).astype(float).tolist(), TableModel(table)


@pytest.fixture(scope="module")
def minilm(minilm_folder: Path) -> ReferenceModel:
    return ReferenceModel(str(minilm_folder), device="cpu")


def read_sts(path: Path, rows: int | None = None) -> tuple[list[str], list[str], list[float]]:
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))[:rows]
    return [r["sentence1"] for r in table], [r["sentence2"] for r in table], [float(r["score"]) for r in table]


# Correlations -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-1e3, 1e3)), min_size=2, max_size=60))
def test_correlations_equal_scipys_with_ties(points: list[tuple[int, float]]) -> None:
    x, y = np.array(points, dtype=np.float64).T
    # scipy itself is only exact to rounding where a vector barely varies.
    if np.ptp(x) == 0 or np.ptp(y) <= 1e-9 * np.abs(y).max():
        return
    assert pearson_correlation(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9)
    assert spearman_correlation(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 10, 1001])
def test_correlations_equal_scipys_on_random_data(n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=n), rng.integers(0, 4, size=n) + 0.5 * rng.normal(size=n).round()
    y[0], y[-1] = -1, 9  # never constant
    assert pearson_correlation(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-13)
    assert spearman_correlation(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-13)


def test_correlations_at_the_ends_of_the_range() -> None:
    x = np.array([1.0, 2.0, 4.0])
    assert pearson_correlation(x, x) == pytest.approx(1.0, abs=1e-15)
    assert spearman_correlation(x, -x) == pytest.approx(-1.0, abs=1e-15)
    for scale in (1e-300, 1e300):  # squares of these leave the range of fp64
        assert pearson_correlation(x * scale, x**2) == pytest.approx(pearson_correlation(x, x**2), abs=1e-14)


@pytest.mark.parametrize("x", [[], [1.0], [2.0, 2.0, 2.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_correlations_are_nan_only_where_undefined(x: list[float]) -> None:
    y = np.arange(len(x), dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(pearson_correlation(np.array(x), y))
        assert math.isnan(spearman_correlation(y, np.array(x)))


# Parity with sentence-transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["stsb_dev.csv", "stsb_test.csv"])
def test_all_ten_numbers_equal_sentence_transformers_on_sts_benchmark(
    split: str, shared_data: Path, minilm: ReferenceModel
) -> None:
    first, second, scores = read_sts(shared_data / split, rows=300)
    unique = sorted({*first, *second})
    table = dict(zip(unique, minilm.encode(unique, batch_size=64, show_progress_bar=False), strict=True))
    model = TableModel(table)
    # truncate_dim, precision and so on reach a table's encode as keyword arguments too, and are None here.
    expected = reference.EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS)(model)
    got = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS)(model)
    assert got.keys() == expected.keys() == TEN
    assert got == pytest.approx(expected, abs=1e-6)
    assert got["spearman_cosine"] > 0.8  # a real model on real data


def test_a_live_sentence_transformers_model_gives_its_own_evaluators_numbers(
    shared_data: Path, minilm: ReferenceModel, tmp_path: Path
) -> None:
    first, second, scores = read_sts(shared_data / "stsb_dev.csv", rows=64)
    arguments = {"batch_size": 32, "name": "sts-dev", "truncate_dim": 100, "precision": "float32"}
    theirs = reference.EmbeddingSimilarityEvaluator(first, second, scores, **arguments)
    ours = EmbeddingSimilarityEvaluator(first, second, scores, **arguments)
    expected, got = theirs(minilm, str(tmp_path / "theirs")), ours(minilm, str(tmp_path / "ours"))
    assert got.keys() == expected.keys() == {"sts-dev_pearson_cosine", "sts-dev_spearman_cosine"}
    # Encoding each sentence once batches them otherwise, which moves fp32 embeddings by rounding: two ranks may swap.
    assert got["sts-dev_pearson_cosine"] == pytest.approx(expected["sts-dev_pearson_cosine"], abs=1e-6)
    assert got["sts-dev_spearman_cosine"] == pytest.approx(expected["sts-dev_spearman_cosine"], abs=2e-4)
    assert ours.primary_metric == theirs.primary_metric == "sts-dev_spearman_cosine"
    assert (ours.csv_file, ours.csv_headers) == (theirs.csv_file, theirs.csv_headers)
    assert (ours.description, ours.get_config_dict()) == (theirs.description, theirs.get_config_dict())
    assert minilm.model_card_data.eval_results_dict[ours] == got
    headers = [(tmp_path / side / ours.csv_file).read_bytes().splitlines()[0] for side in ("theirs", "ours")]
    assert headers[0] == headers[1]


@pytest.mark.parametrize("fns", [None, ["dot"], ["euclidean", "cosine"]])
@pytest.mark.parametrize("main", [None, "dot", SimilarityFunction.EUCLIDEAN])
def test_names_and_primary_metric_are_sentence_transformers(fns: list[str] | None, main: Any) -> None:
    first, second, scores, model = pairs(40)
    name = getattr(main, "value", main)
    if fns and name and name not in fns:
        with pytest.raises(ValueError, match=f"main_similarity must be one of similarity_fn_names.*'{name}'"):
            EmbeddingSimilarityEvaluator(first, second, scores, main_similarity=main, similarity_fn_names=fns)
        return
    results = []
    for module in (reference, evaluation):
        evaluator = module.EmbeddingSimilarityEvaluator(
            first, second, scores, main_similarity=main, similarity_fn_names=fns, name="x"
        )
        metrics = evaluator(model, epoch=1, steps=5)
        assert model.model_card_data.calls[-1] == (evaluator, metrics, 1, 5)
        results.append((list(metrics), evaluator.primary_metric, evaluator.greater_is_better))
        assert evaluator.primary_metric in metrics
    assert results[0] == results[1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(12, 50))
def test_random_embeddings_give_sentence_transformers_numbers(seed: int, n: int) -> None:
    first, second, scores, model = pairs(n, seed)
    expected = reference.EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS)(model)
    got = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS)(model)
    assert got == pytest.approx(expected, abs=1e-6)


def test_enum_of_similarities_has_sentence_transformers_names() -> None:
    first, second, scores, model = pairs(20)
    for name, member in evaluation.SimilarityFunction.__members__.items():
        assert member.value == SimilarityFunction[name].value
        evaluator = EmbeddingSimilarityEvaluator(first, second, scores, main_similarity=member)
        assert set(evaluator(model)) == {f"pearson_{member.value}", f"spearman_{member.value}"}


def test_each_sentence_is_encoded_once() -> None:
    first, second, scores, model = pairs(50)
    EmbeddingSimilarityEvaluator(first, second, scores)(model)
    (encoded,) = model.encoded
    assert len(encoded) == len(set(encoded))
    assert set(encoded) == {*first, *second}


def test_truncated_dimensions_are_used() -> None:
    first, second, scores, model = pairs(50, dim=9)
    short = TableModel({name: row[:3] for name, row in model.table.items()})
    got = EmbeddingSimilarityEvaluator(first, second, scores, truncate_dim=3)(model)
    assert got == EmbeddingSimilarityEvaluator(first, second, scores)(short)
    assert got != EmbeddingSimilarityEvaluator(first, second, scores)(model)


def test_half_and_huge_embeddings_give_finite_numbers() -> None:
    first, second, scores, model = pairs(50)
    expected = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS)(model)
    half = TableModel({name: row.astype(np.float16) for name, row in model.table.items()})
    got = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS)(half)
    assert got == pytest.approx(expected, abs=0.02)
    huge = TableModel({name: row * np.float32(1e30) for name, row in model.table.items()})  # squares overflow in fp32
    got = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS)(huge)
    assert got == pytest.approx(expected, abs=5e-3)  # fp32 tells identical sentences apart by rounding, fp64 does not


# Numbers that cannot be had -----------------------------------------------------------------------------------------


def test_constant_embeddings_warn_and_only_their_metrics_are_nan() -> None:
    first, second, scores, model = pairs(30)
    # One direction, other lengths: cosine is constant, the rest is not.
    direction = np.array([3.0, 4.0], dtype=np.float32)
    lengths = {name: direction * 2.0 ** (index % 5) for index, name in enumerate(model.table)}
    with pytest.warns(
        RuntimeWarning, match=r"'dev': the cosine metrics are NaN, since all 30 cosine similarities are 1"
    ):
        metrics = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS, name="dev")(
            TableModel(lengths)
        )
    missing = {key for key, value in metrics.items() if math.isnan(value)}
    assert missing == {"dev_pearson_cosine", "dev_spearman_cosine"}
    assert metrics["dev_spearman_max"] == max(metrics[f"dev_spearman_{fn}"] for fn in FUNCTIONS[1:])


def test_zero_embeddings_are_nan_everywhere_with_a_warning() -> None:
    first, second, scores, model = pairs(10)
    zeros = TableModel({name: np.zeros_like(row) for name, row in model.table.items()})
    with pytest.warns(RuntimeWarning, match=r"similarities are 0: .* no correlation is defined") as caught:
        metrics = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS)(zeros)
    assert len(caught) == 4
    assert metrics.keys() == TEN
    assert all(math.isnan(value) for value in metrics.values())


def test_collapsed_embeddings_warn_that_the_numbers_rest_on_rounding() -> None:
    first, second, scores, _ = pairs(60)
    rng = np.random.default_rng(0)
    nearly = {f"s{i}": np.float32(1) + rng.normal(size=50).astype(np.float32) * np.float32(1e-5) for i in range(30)}
    with pytest.warns(RuntimeWarning, match="the cosine metrics rest on rounding.*collapsed"):
        metrics = EmbeddingSimilarityEvaluator(first, second, scores)(TableModel(nearly))
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_embeddings_are_counted_and_not_hidden(value: float) -> None:
    first, second, scores, model = pairs(30)
    model.table[first[0]] = np.full(7, value, dtype=np.float32)
    bad = (first + second).count(first[0])
    with pytest.warns(RuntimeWarning, match=f"every metric is NaN, since {bad} of 60 embeddings hold NaN or infinity"):
        metrics = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS)(model)
    assert all(math.isnan(v) for v in metrics.values())


def test_one_pair_and_constant_scores_warn() -> None:
    first, second, _, model = pairs(10)
    with pytest.warns(RuntimeWarning, match="takes at least 2 pairs, and there is 1"):
        metrics = EmbeddingSimilarityEvaluator(first[:1], second[:1], [1])(model)
    assert all(math.isnan(value) for value in metrics.values())
    with pytest.warns(RuntimeWarning, match="all 10 gold scores are 2.5"):
        metrics = EmbeddingSimilarityEvaluator(first, second, [2.5] * 10)(model)
    assert all(math.isnan(value) for value in metrics.values())


def test_ordinary_input_warns_of_nothing() -> None:
    first, second, scores, model = pairs(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=FUNCTIONS)(model)
    assert all(math.isfinite(value) for value in metrics.values())


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], ["b", "c"], [1.0]), ValueError, "one length, got 1 sentences1, 2 sentences2, 1 scores"),
        (([], [], []), ValueError, "at least one pair"),
        (("ab", ["a", "b"], [1, 2]), TypeError, "sentences1 must be a list of strings, got str"),
        ((["a", "b"], None, [1, 2]), TypeError, "sentences2 must be a list of strings, got NoneType"),
        ((["a", "b"], ["c", None], [1, 2]), TypeError, r"sentences2\[1\] must be a string, got NoneType"),
        ((["a", "b"], ["c", "d"], [1, "2"]), TypeError, r"scores\[1\] must be a number, got str: '2'"),
        ((["a", "b"], ["c", "d"], [None, 2]), TypeError, r"scores\[0\] must be a number, got NoneType"),
        ((["a", "b"], ["c", "d"], [1, math.nan]), ValueError, r"scores\[1\] must be finite, got nan"),
        ((["a", "b"], ["c", "d"], 3.0), TypeError, "scores must be a list of numbers, got float"),
    ],
)
def test_bad_pairs_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EmbeddingSimilarityEvaluator(*arguments)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"similarity_fn_names": ["cosine", "hamming"]}, "similarity_fn_names must be one of .* got 'hamming'"),
        ({"main_similarity": "hamming"}, "main_similarity must be one of .* got 'hamming'"),
        ({"precision": "int8"}, "precision must be None or 'float32' .* got 'int8'"),
        ({"truncate_dim": 0}, "truncate_dim must be None or a positive integer, got 0"),
        ({"truncate_dim": 1.5}, "truncate_dim must be None or a positive integer, got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingSimilarityEvaluator(["a"], ["b"], [1.0], **settings_)


def test_a_model_that_gives_another_number_of_vectors_is_refused() -> None:
    model = SimpleNamespace(similarity_fn_name="cosine", encode=lambda sentences, **_: np.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"one vector per sentence, \[4, D\], got \[1, 4\]"):
        EmbeddingSimilarityEvaluator(["a", "b"], ["c", "d"], [1, 2])(model)


def test_columns_of_a_dataset_and_numpy_scores_are_taken() -> None:
    datasets = pytest.importorskip("datasets")
    first, second, scores, model = pairs(20)
    data = datasets.Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})
    expected = EmbeddingSimilarityEvaluator(first, second, scores)(model)
    for given_scores in (data["score"], np.array(scores, dtype=np.float32), [int(score) for score in scores]):
        assert EmbeddingSimilarityEvaluator(data["sentence1"], data["sentence2"], given_scores)(model) == expected


def test_input_examples_are_taken() -> None:
    first, second, scores, model = pairs(20)
    examples = [SimpleNamespace(texts=[a, b], label=c) for a, b, c in zip(first, second, scores, strict=True)]
    evaluator = EmbeddingSimilarityEvaluator.from_input_examples(examples, name="dev")
    assert evaluator(model) == EmbeddingSimilarityEvaluator(first, second, scores, name="dev")(model)


# Log and CSV --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({}, "on the dev dataset (truncated to 3):"),
        ({"epoch": 2}, "on the dev dataset after epoch 2 (truncated to 3):"),
        ({"epoch": 0.5, "steps": 40}, "on the dev dataset in epoch 0.5 after 40 steps (truncated to 3):"),
    ],
)
def test_log_says_when(call: dict[str, Any], text: str, caplog: pytest.LogCaptureFixture) -> None:
    first, second, scores, model = pairs(20)
    with caplog.at_level(logging.INFO, logger="triton_st.evaluation"):
        metrics = EmbeddingSimilarityEvaluator(first, second, scores, name="dev", truncate_dim=3)(model, **call)
    assert caplog.messages[0].endswith(text)
    assert f"Spearman: {metrics['dev_spearman_cosine']:.4f}" in caplog.messages[1]


def test_csv_grows_by_one_row_a_call(tmp_path: Path) -> None:
    first, second, scores, model = pairs(20)
    evaluator = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=["cosine", "dot"], name="dev")
    folder = tmp_path / "new" / "eval"
    metrics = [evaluator(model, str(folder), epoch=0.5, steps=step) for step in (1, 2)]
    with (folder / "similarity_evaluation_dev_results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["1", "2"]
    for row, expected in zip(rows, metrics, strict=True):
        for fn in ("cosine", "dot"):
            for kind in ("pearson", "spearman"):
                assert float(row[f"{fn}_{kind}"]) == expected[f"dev_{kind}_{fn}"]
    assert set(rows[0]) == {"epoch", "steps", "cosine_pearson", "cosine_spearman", "dot_pearson", "dot_spearman"}


def test_csv_survives_a_cut_off_line_and_says_when_columns_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, scores, model = pairs(20)
    one = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=["cosine"])
    two = EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=["cosine", "dot"])
    one(model, str(tmp_path), 1, 1)
    path = tmp_path / one.csv_file
    path.write_bytes(path.read_bytes() + b"1,2,0.3")  # what a full disk leaves
    one(model, str(tmp_path), 1, 3)
    assert not caplog.messages
    two(model, str(tmp_path), 1, 4)
    assert "other columns" in caplog.text
    lines = path.read_text().splitlines()
    assert [line.split(",")[1] for line in lines] == ["steps", "1", "2", "3", "steps", "4"]


def test_csv_is_written_only_on_request(tmp_path: Path) -> None:
    first, second, scores, model = pairs(20)
    EmbeddingSimilarityEvaluator(first, second, scores, write_csv=False)(model, str(tmp_path))
    EmbeddingSimilarityEvaluator(first, second, scores)(model)
    assert list(tmp_path.iterdir()) == []


def _append_rows(path: str, writer: int) -> None:
    for row in range(50):
        evaluation._append_csv(path, ["epoch", "steps", "cosine_pearson"], [writer, row, 0.123456789])


def test_csv_rows_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_rows, args=(str(path), writer)) for writer in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    header, *rows = path.read_text().splitlines()
    assert header == "epoch,steps,cosine_pearson"
    assert sorted(rows) == sorted(f"{writer},{row},0.123456789" for writer in range(3) for row in range(50))


# Several evaluators -------------------------------------------------------------------------------------------------


def test_sequential_evaluator_is_sentence_transformers() -> None:
    first, second, scores, model = pairs(30)
    for chosen in (None, lambda values: sum(values) / len(values), min):
        results = []
        for module in (reference, evaluation):
            parts: list[Any] = [
                module.EmbeddingSimilarityEvaluator(first, second, scores, name="dev", similarity_fn_names=FUNCTIONS),
                module.EmbeddingSimilarityEvaluator(second[:15], second[-15:], scores[:15], name="test"),
                lambda *_: 0.25,
            ]
            arguments = {} if chosen is None else {"main_score_function": chosen}
            evaluator = module.SequentialEvaluator(parts, **arguments)
            results.append(evaluator(model))
            assert evaluator.primary_metric == "sequential_score"
        assert results[0].keys() == results[1].keys()
        assert results[1] == pytest.approx(results[0], abs=1e-6)
    assert len(results[1]) == 10 + 2 + 1 + 1


def test_sequential_evaluator_refuses_what_is_no_evaluator() -> None:
    with pytest.raises(ValueError, match="at least one evaluator"):
        SequentialEvaluator([])
    with pytest.raises(TypeError, match=r"evaluators\[1\] must be an evaluator, got str"):
        SequentialEvaluator([lambda *_: 1.0, "x"])
