"""The cached, symmetric and Matryoshka losses, masked duplicates, diagnostics, and sentence-transformers' models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import sentence_transformers
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer import losses as st_losses

from tests.small_model import WORDS, small_model
from triton_st import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses, util


def texts(column: int, rows: int = 6) -> list[str]:
    generator = torch.Generator().manual_seed(column)
    lengths = torch.randint(1, 12, (rows,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


COLUMNS = [texts(i) for i in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """One model twice: ours and sentence-transformers', with the same weights."""
    folder = tmp_path_factory.mktemp("model")
    ours = small_model()
    ours.save_pretrained(folder)
    return ours.eval(), sentence_transformers.SentenceTransformer(str(folder), device="cpu").eval()


def features(model: Any, columns: list[list[str]] = COLUMNS) -> list[Any]:
    prepare = model.preprocess if isinstance(model, sentence_transformers.SentenceTransformer) else model.tokenize
    return [prepare(column) for column in columns]


def run(loss: Any, columns: list[list[str]] = COLUMNS, factor: float = 1.0) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss, and the gradient of every parameter by a name that both libraries share."""
    model = loss.model
    model.zero_grad()
    value = loss(features(model, columns), None)
    (value * factor).backward()
    short = ("embeddings.", "encoder.layer.")
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            cut = next((name.split(mark, 1)[-1] for mark in reversed(short) if mark in name), name)
            named[cut] = parameter.grad.clone()
    return value.detach(), named


def assert_same(actual: tuple[Any, dict[str, Any]], expected: tuple[Any, dict[str, Any]], factor: float = 1.0) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    assert actual[1].keys() == expected[1].keys()
    largest = max(x.norm() for x in expected[1].values()) * factor
    assert largest > 0
    for name, gradient in actual[1].items():
        exact = expected[1][name] * factor
        error = (gradient - exact).norm()
        assert error <= 1e-4 * max(exact.norm(), 1e-2 * largest), f"{name}: {error:.3e} of {exact.norm():.3e}"


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all directions": {"directions": ALL},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "hardness": {"hardness_mode": "all_negatives", "hardness_strength": 3.0},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


@every_setting
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_equals_sentence_transformers_on_either_model(models: Any, whose: str, settings: dict[str, Any]) -> None:
    expected = run(st_losses.MultipleNegativesRankingLoss(models[1], **settings))
    assert_same(run(losses.MultipleNegativesRankingLoss(models[whose == "theirs"], **settings)), expected)


def test_symmetric_equals_sentence_transformers(models: Any) -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        theirs = st_losses.MultipleNegativesSymmetricRankingLoss(models[1])
    ours = losses.MultipleNegativesSymmetricRankingLoss(models[0])
    assert_same(run(ours), run(theirs))
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert "günther2024jina" in ours.citation


@every_setting
@pytest.mark.parametrize("cut", [{"mini_batch_size": 4}, {"mini_batch_num_tokens": 20}, {"mini_batch_num_tokens": 1}])
@pytest.mark.parametrize("whose", [0, 1], ids=["ours", "theirs"])
def test_cached_equals_uncached(models: Any, whose: int, cut: dict[str, int], settings: dict[str, Any]) -> None:
    plain = run(losses.MultipleNegativesRankingLoss(models[whose], **settings))
    cached = losses.CachedMultipleNegativesRankingLoss(models[whose], **cut, **settings)
    assert_same(run(cached, factor=8.0), plain, factor=8.0)
    with torch.no_grad():
        torch.testing.assert_close(cached(features(models[whose])), plain[0])


def test_cached_embeds_each_mini_batch_again_with_the_dropout_it_had(models: Any) -> None:
    """With one mini-batch a column, the uncached loss of columns embedded one by one draws the same dropout."""
    model = copy.deepcopy(models[0]).train()
    cached = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=6)
    torch.manual_seed(3)
    actual = run(cached)
    after = torch.rand(1)
    torch.manual_seed(3)
    model.zero_grad()
    embeddings = [model(column)["sentence_embedding"] for column in features(model)]
    value = losses.MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(embeddings)
    assert torch.equal(torch.rand(1), after)  # embedding again takes nothing from the generator
    value.backward()
    torch.testing.assert_close(actual[0], value.detach())
    short = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(short) == len(actual[1])
    for mine, theirs in zip(actual[1].values(), short.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cached_embeds_again_in_the_activations_dtype(models: Any, dtype: torch.dtype) -> None:
    model = models[0]
    plain, cached = (
        cls(model) for cls in (losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss)
    )
    gradients = []
    for loss in (plain, cached):
        model.zero_grad()
        with model.activations_in(dtype):
            value = loss(features(model))
        value.backward()  # outside of the block, as the trainer does
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for x, y in zip(*gradients, strict=True):
        assert (x - y).norm() <= 0.05 * max(x.norm(), 1e-3)


@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score", "own"])
@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka_equals_sentence_transformers(models: Any, similarity: str, cached: bool) -> None:
    dims, weights = [8, 32, 16], [1.0, 0.5, 2.0]
    dims = [dim for dim in dims if dim <= models[0].get_embedding_dimension()]
    weights = weights[: len(dims)]

    def own(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return util.cos_sim(a, b)

    fct = own if similarity == "own" else getattr(sentence_transformers.util, similarity)
    inner = st_losses.MultipleNegativesRankingLoss(models[1], 10.0, fct)
    expected = run(st_losses.MatryoshkaLoss(models[1], inner, dims, weights))
    cls = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
    ours = losses.MatryoshkaLoss(models[0], cls(models[0], 10.0, fct), dims, weights)
    assert_same(run(ours), expected)
    assert {**ours.get_config_dict(), "loss": ""} == {
        **st_losses.MatryoshkaLoss(models[1], inner, dims, weights).get_config_dict(),
        "loss": "",
    }
    assert "kusupati2024matryoshka" in ours.citation


def test_matryoshka_draws_some_of_its_dims(models: Any) -> None:
    inner = losses.MultipleNegativesRankingLoss(models[0])
    drawn = losses.MatryoshkaLoss(models[0], inner, [4, 8, 16], n_dims_per_step=1)
    single = [losses.MatryoshkaLoss(models[0], inner, [dim])(features(models[0])).item() for dim in (4, 8, 16)]
    seen = {round(drawn(features(models[0])).item(), 5) for _ in range(30)}
    assert seen == {round(value, 5) for value in single}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"matryoshka_dims": []}, ValueError, "expected at least one"),
        ({"matryoshka_dims": [0, 4]}, ValueError, "expected positive lengths"),
        ({"matryoshka_dims": [4096]}, ValueError, "expected at most"),
        ({"matryoshka_dims": [4], "matryoshka_weights": [1, 2]}, ValueError, "expected 1 of them, got 2"),
        ({"loss": torch.nn.Identity(), "matryoshka_dims": [4]}, TypeError, "expected a triton_st.losses"),
    ],
)
def test_matryoshka_refuses(models: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    inner = losses.MultipleNegativesRankingLoss(models[0])
    with pytest.raises(error, match=message):
        losses.MatryoshkaLoss(models[0], **{"loss": inner, **arguments})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": ()}, "directions"),
        ({"directions": ("doc_to_query",)}, "query_to_doc"),
        ({"directions": ALL, "partition_mode": "per_direction"}, "per_direction"),
        ({"hardness_mode": "soft"}, "hardness_mode"),
        ({"hardness_strength": -1.0}, "non-negative"),
        ({"margin_strategy": "loose"}, "margin_strategy"),
        ({"false_negatives": "drop"}, "false_negatives"),
    ],
)
def test_settings_that_are_refused(models: Any, settings: dict[str, Any], message: str) -> None:
    for cls in (losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss):
        with pytest.raises(ValueError, match=message):
            cls(models[0], **settings)


def test_cached_settings_are_sentence_transformers(models: Any) -> None:
    settings: dict[str, Any] = {"scale": 5.0, "mini_batch_size": 7, "mini_batch_num_tokens": 99, "directions": ALL}
    ours = losses.CachedMultipleNegativesRankingLoss(models[0], **settings)
    theirs = st_losses.CachedMultipleNegativesRankingLoss(models[1], **settings)
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert ours.citation.split() == theirs.citation.split()
    with pytest.raises(ValueError, match="mini_batch_size"):
        losses.CachedMultipleNegativesRankingLoss(models[0], mini_batch_size=0)
    with pytest.raises(ValueError, match="mini_batch_num_tokens"):
        losses.CachedMultipleNegativesRankingLoss(models[0], mini_batch_num_tokens=0)


@pytest.mark.parametrize("whose", [0, 1], ids=["ours", "theirs"])
def test_masked_duplicates_do_no_harm(models: Any, whose: int) -> None:
    """A batch with a row twice has the loss that it has with the row once, had it not been for the mean."""
    model = models[whose]
    doubled = [column[:4] + column[:1] for column in COLUMNS[:2]]
    once = [column[:4] for column in COLUMNS[:2]]
    with torch.no_grad():
        masked = losses.MultipleNegativesRankingLoss(model, false_negatives="mask_duplicates")
        plain = losses.MultipleNegativesRankingLoss(model)
        value, blind = masked(features(model, doubled)), plain(features(model, doubled))
        rows = masked(features(model, once)) * 4
        torch.testing.assert_close(masked(features(model, once)), plain(features(model, once)))
    assert value < blind
    assert rows.isfinite()
    assert masked.get_config_dict()["false_negatives"] == "mask_duplicates"
    with pytest.raises(ValueError, match="embeddings do not say"):
        masked.compute_loss_from_embeddings([torch.randn(3, 4), torch.randn(3, 4)])


def dataset(rows: int = 24) -> Dataset:
    return Dataset.from_dict({"anchor": texts(7, rows), "positive": texts(8, rows), "negative": texts(9, rows)})


@pytest.mark.parametrize("kind", ["plain", "cached", "matryoshka"])
def test_training_logs_diagnostics_and_masks_duplicates(tmp_path: Any, kind: str) -> None:
    model = small_model()
    cls = losses.CachedMultipleNegativesRankingLoss if kind == "cached" else losses.MultipleNegativesRankingLoss
    loss: Any = cls(model, false_negatives="mask_duplicates", diagnostics=True)
    if kind == "matryoshka":
        loss = losses.MatryoshkaLoss(model, loss, [8, model.get_embedding_dimension()])
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=4, logging_steps=2, per_device_train_batch_size=8, report_to="none",
        eval_strategy="steps", eval_steps=4, save_strategy="no", disable_tqdm=True, use_cpu=True,
        gradient_accumulation_steps=1 + (kind == "plain"),
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, args, dataset(), dataset(), loss)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert 0 <= entry["in_batch_accuracy"] <= entry["in_batch_mrr"] <= 1
        assert -1 <= entry["hardest_negative_similarity"] <= 1
        assert -1 <= entry["positive_similarity"] <= 1
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert 0 < evaluated["eval_in_batch_mrr"] <= 1


@pytest.mark.parametrize("kind", ["plain", "cached", "matryoshka"])
def test_sentence_transformers_own_trainer_trains_with_them(models: Any, tmp_path: Any, kind: str) -> None:
    args = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, use_cpu=True, learning_rate=1e-3, seed=1,
    )  # fmt: skip
    curves = []
    for package in (losses, st_losses):
        model = copy.deepcopy(models[1])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        cls = package.MultipleNegativesRankingLoss
        loss: Any = package.CachedMultipleNegativesRankingLoss(model) if kind == "cached" else cls(model)
        if kind == "matryoshka":
            loss = package.MatryoshkaLoss(model, loss, [8, model.get_embedding_dimension()])
        trainer = sentence_transformers.SentenceTransformerTrainer(
            model=model, args=args, train_dataset=dataset(), loss=loss
        )
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 3
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
