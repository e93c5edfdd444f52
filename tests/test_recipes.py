"""Recipes: what each settles, how flags override it, and the start of the better one as a weighted bag of words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
import torch
from transformers import AutoTokenizer

from triton_st import SentenceTransformer, recipes
from triton_st.__main__ import main
from triton_st.data import train_wordpiece_tokenizer
from triton_st.models.bert import BertModel
from triton_st.models.lexical import inverse_document_frequencies, start_as_weighted_words, word_vectors
from triton_st.synthetic import synthetic_triplets

SMALL = ("--max-train-samples", "256", "--batch-size", "64", "--hidden-size", "40", "--vocab-size", "600")
SMALL += ("--num-attention-heads", "4")
TEXTS = ["A dog runs.", "A dog is running in the park.", "The café is open!", "A cat sleeps.", "a 3 b 3"]


def scene_texts() -> list[str]:
    return [text for row in synthetic_triplets(300, seed=1) for text in row.values()]


@pytest.fixture(scope="module")
def better(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("better")
    arguments = ["train", "--recipe", "better", *SMALL, "--epochs", "4", "--fp16", "--no-progress"]
    assert main([*arguments, "--output-dir", str(folder)]) == 0
    return folder


def test_the_better_recipe_trains_on_pairs_with_the_changes_given(better: Path) -> None:
    log = [json.loads(line) for line in (better / "training_log.jsonl").open()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 16
    assert losses[-1] < losses[0]
    card = (better / "final" / "README.md").read_text()
    assert "by the recipe better" in card
    assert "recipe-better" in card
    assert "<code>anchor</code> and <code>positive</code>" in card


def test_sentence_transformers_loads_it_with_the_same_embeddings(better: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    theirs = st.SentenceTransformer(str(better / "final"), device="cpu")
    ours = SentenceTransformer(str(better / "final"), device="cpu")
    texts = [*scene_texts()[:20], "CAFÉ cafe", ""]
    torch.testing.assert_close(
        torch.from_numpy(ours.encode(texts)), torch.from_numpy(theirs.encode(texts)), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(torch.from_numpy(ours.encode(["a DOG"])), torch.from_numpy(ours.encode(["A dog"])))


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_help_lists_the_recipes_and_their_settings(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--recipe {reference,better}" in printed
    assert f"{recipes.RECIPES[recipe].vocab_size}" in printed
    assert "(default: reference)" in printed


def test_an_unknown_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "best", "--output-dir", str(tmp_path / "run")])
    assert "invalid choice: 'best'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_flag_overrides_its_recipe(recipe: str, tmp_path: Path) -> None:
    given = ["--num-hidden-layers", "1", "--num-attention-heads", "2", "--intermediate-size", "24", "--scale", "10"]
    given += ["--max-seq-length", "24", "--dropout", "0.25", "--learning-rate", "0.002", "--max-steps", "2"]
    given += ["--lr-scheduler-type", "constant", "--warmup-steps", "0", "--seed", "7", "--no-progress"]
    assert main(["train", "--recipe", recipe, *SMALL, *given, "--output-dir", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    wanted: dict[str, float] = {
        "hidden_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    wanted |= {"max_position_embeddings": 24, "hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.25}
    assert {name: config[name] for name in wanted} == wanted
    assert config["vocab_size"] <= 600
    rates = [json.loads(line).get("learning_rate") for line in (tmp_path / "training_log.jsonl").open()]
    assert [rate for rate in rates if rate is not None] == [0.002, 0.002]
    assert '"scale": 10.0' in (tmp_path / "final" / "README.md").read_text()


def test_columns_and_loss_of_a_recipe() -> None:
    rows = synthetic_triplets(8, seed=1)
    assert recipes.training_columns(rows).column_names == ["anchor", "positive", "negative"]
    assert recipes.training_columns(rows, recipes.BETTER).column_names == ["anchor", "positive"]
    model = recipes.new_model(scene_texts(), vocab_size=200, hidden_size=20)
    assert recipes.ranking_loss(model, scale=5).get_config_dict()["scale"] == 5
    assert recipes.ranking_loss(model, recipes.BETTER).false_negatives == "mask_duplicates"
    assert recipes.ranking_loss(model).directions == ("query_to_doc",)


@pytest.mark.parametrize("layers", [0, 2])
def test_an_untrained_model_compares_texts_by_their_weighted_words(layers: int) -> None:
    texts = scene_texts()
    sizes = {"hidden_size": 120, "num_hidden_layers": layers, "num_attention_heads": 4}
    model, again = (
        recipes.new_model(texts, recipe=recipes.BETTER, vocab_size=600, device="cpu", **sizes).eval() for _ in range(2)
    )
    weights = inverse_document_frequencies(model.tokenizer, texts)
    vectors = word_vectors(model.tokenizer, 120 - 8, recipes.SEED) * weights.unsqueeze(1)
    some = texts[:30]
    expected = torch.stack(
        [vectors[ids].sum(0) for ids in model.tokenizer(some, add_special_tokens=False)["input_ids"]]
    )
    found = torch.from_numpy(model.encode(some))
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(found[:-1], found[1:]), cosine(expected[:-1], expected[1:]), rtol=0, atol=1e-4)
    assert torch.equal(found, torch.from_numpy(again.encode(some)))


def test_inverse_document_frequencies_count_each_text_once() -> None:
    tokenizer = train_wordpiece_tokenizer(TEXTS, vocab_size=200, lowercase=True)
    weights = inverse_document_frequencies(tokenizer, [*TEXTS, *TEXTS])
    ids = tokenizer.get_vocab()
    assert weights[ids["a"]] == pytest.approx(math.log(6 / 5))
    assert weights[ids["dog"]] == pytest.approx(math.log(6 / 3))
    assert weights[ids["3"]] == pytest.approx(math.log(6 / 2))
    assert weights[ids["."]] == weights[ids["!"]] == weights[tokenizer.unk_token_id] == 0


def test_words_of_like_spelling_have_like_vectors() -> None:
    words = "running runs runner sleeps sleeping table"
    tokenizer = train_wordpiece_tokenizer([words] * 9, vocab_size=400, lowercase=True)
    vectors = word_vectors(tokenizer, 512, seed=3)
    of = {word: vectors[tokenizer.get_vocab()[word]] for word in words.split()}
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    assert of["sleeps"] @ of["sleeping"] > 0.3
    assert abs(of["running"] @ of["table"]) < 0.2
    assert torch.equal(vectors, word_vectors(tokenizer, 512, seed=3))
    assert not torch.equal(vectors, word_vectors(tokenizer, 512, seed=4))


def test_a_width_with_no_room_for_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_size: expected more than 8, got 8"):
        recipes.new_model(TEXTS, recipe=recipes.BETTER, hidden_size=8, num_attention_heads=1)
    model = recipes.new_model(TEXTS, vocab_size=60, hidden_size=10, num_hidden_layers=1)
    assert isinstance(model.encoder, BertModel)
    start_as_weighted_words(model.encoder, model.tokenizer, [], seed=1)  # no text: every word is as rare
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_length_with_no_room_for_words_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"max_seq_length: expected more than the 2 special tokens .*, got {length}"):
        recipes.new_model(TEXTS, max_seq_length=length)


def test_an_uncased_tokenizer_is_saved_as_one(tmp_path: Path) -> None:
    tokenizer = train_wordpiece_tokenizer(TEXTS, vocab_size=200, lowercase=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("CAFÉ Dog")["input_ids"] == tokenizer("cafe dog")["input_ids"] == loaded("cafe dog")["input_ids"]
    cased = train_wordpiece_tokenizer(TEXTS, vocab_size=200)
    assert cased("A")["input_ids"] != cased("a")["input_ids"]


def test_a_tokenizer_that_splits_endings_is_saved_as_one(tmp_path: Path) -> None:
    sentence = "She baked a cake, bakes and is baking; dogs dress, bus by bus."
    tokenizer = train_wordpiece_tokenizer([sentence] * 9, vocab_size=300, lowercase=True, split_endings=True)
    stems = "she bak ed a cak e , bak es and is bak ing ; dog s dress , bus by bus ."
    assert " ".join(tokenizer.tokenize(sentence)) == stems
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert " ".join(loaded.tokenize(sentence)) == stems
    assert dict(loaded(sentence, "Dogs")) == dict(tokenizer(sentence, "Dogs"))
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.model_max_length == tokenizer.model_max_length == 512


def test_the_better_model_is_the_same_in_sentence_transformers(tmp_path: Path) -> None:
    texts = scene_texts()
    model = recipes.new_model(texts, recipe=recipes.BETTER, vocab_size=600, hidden_size=128, device="cpu")
    model.save_pretrained(str(tmp_path))
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(theirs.encode(texts[:20]), model.encode(texts[:20]), rtol=0, atol=1e-5)
