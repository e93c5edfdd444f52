"""SentenceTransformer: encode, similarity, load and save, against sentence-transformers itself."""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers

from tests.small_model import WORDS, small_model, small_tokenizer
from triton_st import SentenceTransformer
from triton_st.models import BertModel
from triton_st.models.files import replacing_folder
from triton_st.sentence_transformer import _token_batches

TEXTS = [
    "A boy plays in the grass.",
    "",
    "Two dogs run — quickly! — along the river…",
    "short",
    "   spaces \t and\nnew lines  ",
    "🙂🙃 emoji 👩‍👩‍👧‍👦 family",
    "你好，世界 · مرحبا بالعالم · नमस्ते · ქართული · 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "zero\u200bwidth and a soft\u00adhyphen, ﬁ ligature, combining é",
    "word " * 400,
    "x" * 500,
]


@pytest.fixture(scope="module")
def minilm(minilm_folder) -> SentenceTransformer:
    return SentenceTransformer(minilm_folder, device="cpu")


@pytest.fixture(scope="module")
def st_minilm(minilm_folder) -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(minilm_folder), device="cpu")


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return small_model().eval()


# --- encode -----------------------------------------------------------------------------------------------------------


def test_embeddings_equal_sentence_transformers(minilm, st_minilm):
    embeddings = minilm.encode(TEXTS)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, st_minilm.encode(TEXTS), rtol=0, atol=1e-5)


def test_real_sentences_equal_sentence_transformers(minilm, st_minilm, shared_data):
    with (shared_data / "stsb_dev.csv").open(encoding="utf-8") as file:
        texts = [row["sentence1"] for row in csv.DictReader(file)][:200]
    np.testing.assert_allclose(minilm.encode(texts), st_minilm.encode(texts), rtol=0, atol=1e-5)


def test_the_models_own_length_rules_and_not_the_tokenizers(minilm, minilm_folder):
    carried = json.loads((minilm_folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert carried["truncation"]["max_length"] == 128
    assert carried["padding"]["strategy"] == {"Fixed": 128}
    for _ in range(2):
        features = minilm.tokenize(["word " * 400, "one"])
        assert features["cu_seqlens"].diff().tolist() == [256, 3]
        minilm.tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=8)  # leaves its own settings


def test_a_text_of_100_000_characters(minilm, st_minilm):
    text = "The old river runs past the mill. " * 3000
    np.testing.assert_allclose(minilm.encode(text), st_minilm.encode(text), rtol=0, atol=1e-5)


def test_results_come_in_input_order_whatever_the_batches(model):
    texts = [" ".join(WORDS[: 1 + i * 7 % 20]) for i in range(25)]
    alone = np.stack([model.encode(text) for text in texts])
    for batch_size in (1, 2, 7, 64):
        np.testing.assert_allclose(model.encode(texts, batch_size=batch_size), alone, rtol=0, atol=2e-6)


def test_what_encode_returns(model):
    texts = ["the boy", "a dog runs"]
    array = model.encode(texts)
    assert array.shape == (2, 50)
    tensor = model.encode(texts, convert_to_tensor=True)
    assert torch.equal(tensor, torch.from_numpy(array))
    assert not tensor.is_inference()
    parts = model.encode(texts, convert_to_numpy=False)
    assert isinstance(parts, list)
    assert torch.equal(torch.stack(parts), tensor)
    single = model.encode(texts[0])
    assert isinstance(single, np.ndarray)
    np.testing.assert_allclose(single, array[0], atol=2e-6)
    assert isinstance(model.encode(texts[0], convert_to_numpy=False), torch.Tensor)


def test_no_texts_give_no_rows(model):
    assert model.encode([]).shape == (0, 50)
    assert model.encode([]).dtype == np.float32
    assert model.encode([], convert_to_tensor=True).shape == (0, 50)
    assert model.encode([], convert_to_numpy=False) == []
    assert model.encode([], normalize_embeddings=True, truncate_dim=8).shape == (0, 8)


@pytest.mark.parametrize("wrap", [tuple, np.array, iter, lambda x: np.array(x, dtype=object), dict.fromkeys])
def test_any_collection_of_strings(model, wrap):
    texts = ["the boy", "a dog runs", "cat"]
    np.testing.assert_array_equal(model.encode(wrap(texts)), model.encode(texts))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "sentences: expected a string or strings, got NoneType"),
        (3, "sentences: expected a string or strings, got int"),
        (b"bytes", "sentences: expected a string or strings, got bytes"),
        (["a", None], r"sentences\[1\]: expected a string, got NoneType"),
        (["a", "b", 3.5], r"sentences\[2\]: expected a string, got float"),
        ([["a", "b"]], r"sentences\[0\]: expected a string, got list"),
        (np.array([1, 2]), r"sentences\[0\]: expected a string, got int"),
    ],
)
def test_what_is_no_text_is_named(model, texts, message):
    with pytest.raises(TypeError, match=message):
        model.encode(texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a positive int, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected a positive int, got 2.5"),
        ({"precision": "int8"}, "precision: 'int8' is not served; served: 'float32'"),
        ({"output_value": "cls"}, "output_value: expected one of .*, got 'cls'"),
        ({"truncate_dim": 0}, "truncate_dim: expected a positive int, got 0"),
        ({"prompt_name": "query"}, r"prompt_name: expected one of \[\], got 'query'"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.encode(["a"], **arguments)


def test_lone_surrogates_are_replaced(minilm):
    np.testing.assert_array_equal(minilm.encode("a \ud800 b"), minilm.encode("a ? b"))


def test_threads_may_encode_at_once(minilm):
    texts = [TEXTS[i % 4] for i in range(12)]
    wanted = minilm.encode(texts)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for embeddings in pool.map(minilm.encode, [texts] * 8):
            np.testing.assert_array_equal(embeddings, wanted)


def test_normalising_and_truncating(model):
    texts = ["the boy", "a dog runs"]
    plain = model.encode(texts)
    unit = model.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(model.encode(texts, truncate_dim=8), plain[:, :8])
    np.testing.assert_array_equal(model.encode(texts, truncate_dim=500), plain)
    both = model.encode(texts, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-6)
    normalising = small_model(normalize=True).eval()
    np.testing.assert_allclose(normalising.encode(texts), unit, atol=1e-6)


def test_prompts_are_put_before_texts(model):
    model.prompts = {"query": "near the ", "empty": ""}
    try:
        wanted = model.encode(["near the river", "near the park"])
        np.testing.assert_array_equal(model.encode(["river", "park"], prompt_name="query"), wanted)
        np.testing.assert_array_equal(model.encode(["river", "park"], prompt="near the "), wanted)
        model.default_prompt_name = "query"
        np.testing.assert_array_equal(model.encode(["river", "park"]), wanted)
        np.testing.assert_array_equal(
            model.encode(["near the river"], prompt_name="empty"), model.encode(["near the river"], prompt="")
        )
    finally:
        model.prompts, model.default_prompt_name = {}, None


def test_token_embeddings(model):
    texts = ["the boy", "", "a dog runs near the river"]
    states = model.encode(texts, output_value="token_embeddings")
    assert [len(state) for state in states] == [4, 2, 8]
    np.testing.assert_allclose(torch.stack([s.mean(0) for s in states]), model.encode(texts), atol=1e-6)
    assert torch.equal(model.encode(texts[0], output_value="token_embeddings"), states[0]) or torch.allclose(
        model.encode(texts[0], output_value="token_embeddings"), states[0], atol=2e-6
    )


def test_encoding_is_evaluation_and_gives_the_mode_back():
    model = small_model(hidden_dropout_prob=0.5).train()
    first = model.encode(["the boy"])
    assert model.training
    assert model.encoder.training
    np.testing.assert_array_equal(first, model.encode(["the boy"]))
    with pytest.raises(TypeError):
        model.encode([None])
    assert model.training
    model.eval().encode(["the boy"])
    assert not model.training


def test_progress_bar(model, capfd):
    model.encode(["the boy"] * 3, show_progress_bar=True)
    assert "3/3" in capfd.readouterr().err
    model.encode(["the boy"] * 3, show_progress_bar=False)
    model.encode(["the boy"] * 3)
    assert capfd.readouterr().err == ""


def test_batches_hold_at_most_their_tokens_longest_first():
    lengths = [5, 30, 2, 9, 9, 1, 12]
    batches = list(_token_batches(lengths, 20))
    assert batches == [[1], [6], [3, 4], [0, 2, 5]]
    assert list(_token_batches([], 20)) == []


# --- forward ----------------------------------------------------------------------------------------------------------


def test_forward_adds_to_the_features(model):
    features = model.tokenize(["the boy", "a dog runs"])
    outputs = model(features)
    assert outputs.keys() == features.keys() | {"token_embeddings", "sentence_embedding"}
    assert "sentence_embedding" not in features
    assert outputs["token_embeddings"].shape == (9, 50)
    assert outputs["sentence_embedding"].shape == (2, 50)
    assert outputs["sentence_embedding"].requires_grad


def test_activations_in_half_are_for_the_block_only(model):
    features = model.tokenize(["the boy"])
    with model.activations_in(torch.float16):
        assert model(features)["sentence_embedding"].dtype == torch.float16
        assert model.encode("the boy").dtype == np.float32
    assert model(features)["sentence_embedding"].dtype == torch.float32
    with pytest.raises(RuntimeError, match="inside"), model.activations_in(torch.bfloat16):
        raise RuntimeError("inside")
    assert model.encoder.activation_dtype == torch.float32


def test_features_that_are_not_packed_are_refused(model):
    with pytest.raises(ValueError, match="cu_seqlens, max_seqlen missing"):
        model({"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.ones(1, 2)})


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_equals_sentence_transformers(minilm, st_minilm, name):
    a, b = minilm.encode(TEXTS[:4]), minilm.encode(TEXTS[2:6])
    minilm.similarity_fn_name = st_minilm.similarity_fn_name = name
    try:
        for method in ("similarity", "similarity_pairwise"):
            torch.testing.assert_close(
                getattr(minilm, method)(a, b), getattr(st_minilm, method)(a, b), rtol=1e-5, atol=1e-5
            )
    finally:
        minilm.similarity_fn_name = st_minilm.similarity_fn_name = "cosine"


def test_similarity_name(model):
    assert model.similarity_fn_name == "cosine"
    model.similarity_fn_name = sentence_transformers.SimilarityFunction.DOT_PRODUCT
    assert model.similarity_fn_name == "dot"
    model.similarity_fn_name = "cosine"
    with pytest.raises(ValueError, match=r"similarity_fn_name: expected one of cosine, dot, .*, got 'hamming'"):
        model.similarity_fn_name = "hamming"


def test_max_seq_length(model):
    long = " ".join(WORDS * 3)
    assert model.max_seq_length == model.get_max_seq_length() == 32
    assert model.tokenize([long])["max_seqlen"] == 32
    model.max_seq_length = 10
    try:
        assert model.tokenize([long])["max_seqlen"] == 10
    finally:
        model.max_seq_length = 32
    for wrong in (0, 2, 33, None, 5.0):
        with pytest.raises(ValueError, match="max_seq_length: expected an int from 3 to 32, got"):
            model.max_seq_length = wrong


def test_dimension(model):
    assert model.get_embedding_dimension() == model.get_sentence_embedding_dimension() == 50
    model.truncate_dim = 8
    try:
        assert model.get_embedding_dimension() == 8
        assert model.encode(["cat"]).shape == (1, 8)
    finally:
        model.truncate_dim = None


def test_a_loaded_model_is_in_evaluation_mode_and_a_new_one_in_training_mode(minilm):
    assert not minilm.training
    assert not minilm.encoder.training
    assert small_model().training


def test_device(model):
    assert model.device == torch.device("cpu")
    assert model.to("cpu") is model
    np.testing.assert_array_equal(model.encode("cat", device="cpu"), model.encode("cat"))


def test_parts_that_do_not_fit_are_refused():
    encoder = small_model().encoder
    with pytest.raises(TypeError, match=r"encoder: expected a triton_st.models.BertModel, got Linear"):
        SentenceTransformer.from_encoder(torch.nn.Linear(2, 2), small_tokenizer())
    with pytest.raises(TypeError, match="tokenizer: expected a fast tokenizer"):
        SentenceTransformer.from_encoder(encoder, object())
    with pytest.raises(ValueError, match="pooling_mode: 'cls' is not served"):
        SentenceTransformer.from_encoder(encoder, small_tokenizer(), pooling_mode="cls")
    small = BertModel(transformers.BertConfig.from_dict(encoder.config.to_dict() | {"vocab_size": 9}))
    with pytest.raises(ValueError, match="tokenizer: expected at most 9 tokens, the encoder's vocab_size, got 25"):
        SentenceTransformer.from_encoder(small, small_tokenizer())


# --- save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_saved_model_loads_in_sentence_transformers_and_here(tmp_path, normalize):
    model = small_model(normalize=normalize).eval()
    model.prompts = {"query": "near the "}
    model.similarity_fn_name = "dot"
    model.max_seq_length = 20
    model.save_pretrained(tmp_path / "saved")
    texts = ["the boy plays", "", " ".join(WORDS * 2)]
    wanted = model.encode(texts)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    ours = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for loaded in (theirs, ours):
        np.testing.assert_allclose(loaded.encode(texts), wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            loaded.encode(["river"], prompt_name="query"), model.encode(["near the river"]), rtol=0, atol=1e-5
        )
        assert loaded.max_seq_length == 20
        assert loaded.similarity_fn_name == "dot"
        assert loaded.prompts["query"] == "near the "
    assert (tmp_path / "saved" / "README.md").stat().st_size > 100
    assert not list(tmp_path.glob(".*"))


def test_model_that_sentence_transformers_saved(tmp_path, st_minilm, minilm):
    st_minilm.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(tmp_path, device="cpu")
    assert loaded.normalize
    assert loaded.max_seq_length == 256
    np.testing.assert_array_equal(loaded.encode(TEXTS), minilm.encode(TEXTS))


def test_a_loaded_card_is_kept_until_the_model_is_evaluated(tmp_path, minilm_folder):
    minilm = SentenceTransformer(minilm_folder, device="cpu")
    minilm.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_bytes() == (minilm_folder / "README.md").read_bytes()
    minilm.save_pretrained(tmp_path / "b", create_model_card=False)
    assert not (tmp_path / "b" / "README.md").exists()


def test_plain_transformers_checkpoint_gets_mean_pooling(tmp_path, caplog):
    model = small_model().eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "modules.json").unlink()
    with caplog.at_level(logging.WARNING):
        loaded = SentenceTransformer(tmp_path, device="cpu")
    assert "used with mean pooling" in caplog.text
    np.testing.assert_array_equal(loaded.encode(["the boy"]), model.encode(["the boy"]))


def test_constructor_settings_override_saved_ones(tmp_path):
    model = small_model()
    model.prompts = {"query": "a ", "document": "the "}
    model.save(tmp_path)
    loaded = SentenceTransformer(
        tmp_path,
        device="cpu",
        prompts={"query": "near "},
        default_prompt_name="document",
        similarity_fn_name="euclidean",
        truncate_dim=8,
        trust_remote_code=True,
    )
    assert loaded.prompts == {"query": "near ", "document": "the "}
    assert loaded.similarity_fn_name == "euclidean"
    assert loaded.encode("cat").shape == (8,)
    with pytest.raises(ValueError, match=r"default_prompt_name: expected one of \['query', 'document'\], got 'other'"):
        SentenceTransformer(tmp_path, device="cpu", default_prompt_name="other")


def test_lower_casing_setting(tmp_path):
    model = small_model().eval()
    model.save_pretrained(tmp_path)
    settings = tmp_path / "sentence_bert_config.json"
    settings.write_text(json.dumps({"max_seq_length": 32, "do_lower_case": True}))
    loaded = SentenceTransformer(tmp_path, device="cpu")
    np.testing.assert_array_equal(loaded.encode(["The BOY"]), model.encode(["the boy"]))
    loaded.save_pretrained(tmp_path / "again")
    again = SentenceTransformer(tmp_path / "again", device="cpu")
    np.testing.assert_array_equal(again.encode(["The BOY"]), model.encode(["the boy"]))


@pytest.fixture
def saved(tmp_path) -> Path:
    small_model(normalize=True).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_modules_that_are_not_served_are_named(saved):
    modules = json.loads((saved / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (saved / "modules.json").write_text(json.dumps([*modules[:2], dense]))
    with pytest.raises(ValueError, match=r"modules.json: module 'Dense' is not served; served: Transformer, Pooling"):
        SentenceTransformer(saved)
    (saved / "modules.json").write_text(json.dumps(modules[::-1]))
    with pytest.raises(ValueError, match="expected modules Transformer, Pooling and perhaps Normalize in this order"):
        SentenceTransformer(saved)
    (saved / "modules.json").write_text('{"idx": 0}')
    with pytest.raises(ValueError, match=r"modules.json: expected a JSON list of modules"):
        SentenceTransformer(saved)
    modules[1]["path"] = "../elsewhere"
    (saved / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"module path '../elsewhere' leaves the model's folder"):
        SentenceTransformer(saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "pooling mode 'cls' is not served"),
        ({"pooling_mode_max_tokens": True}, r"pooling mode 'max \+ mean' is not served; served: 'mean'"),
        ({"pooling_mode": "lasttoken"}, "pooling mode 'lasttoken' is not served"),
        ({"pooling_mode": ["mean", "max"]}, r"pooling mode 'mean \+ max' is not served"),
        ({"include_prompt": False}, "include_prompt=false is not served"),
    ],
)
def test_pooling_that_is_not_served_is_named(saved, settings, message):
    _edit(saved / "1_Pooling" / "config.json", **settings)
    with pytest.raises(ValueError, match=message):
        SentenceTransformer(saved)


def test_model_types_that_are_not_served_are_named(saved):
    _edit(saved / "config.json", model_type="mpnet")
    with pytest.raises(ValueError, match="model type 'mpnet' is not served; served: bert"):
        SentenceTransformer(saved)


def test_what_is_no_model_is_named(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"no such model folder: ./absent/model"):
        SentenceTransformer("./absent/model")
    with pytest.raises(FileNotFoundError, match=r"'no/such-model' is no folder here, and 'no/such-model' could not"):
        SentenceTransformer("no/such-model")
    with pytest.raises(FileNotFoundError, match="'sentence-transformers/no-such-model' could not be had from the hub"):
        SentenceTransformer("no-such-model", local_files_only=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is no model folder: it has neither modules.json nor config.json"):
        SentenceTransformer(tmp_path / "empty")
    with pytest.raises(NotADirectoryError, match=r"config.json is a file; expected a model folder"):
        SentenceTransformer(saved / "config.json")
    with pytest.raises(TypeError, match="model_name_or_path: expected a folder or a hub id, got NoneType"):
        SentenceTransformer(None)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor pytorch_model.bin"):
        SentenceTransformer(saved)


def test_a_folder_without_tokenizer_is_named(saved):
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer that transformers can load"):
        SentenceTransformer(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer; expected one of tokenizer.json, vocab.txt"):
        SentenceTransformer(saved)


# --- nothing half-written ---------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    model = small_model()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match=r"cannot write to .*file: it is a file, not a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot write to .*below"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_while_saving_leaves_the_old_model(saved, monkeypatch):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    model = small_model(seed=1)
    monkeypatch.setattr(model.model_card_data, "to_card", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(saved)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(saved.parent / "new")
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_saving_over_a_model_replaces_it_and_keeps_other_files(saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "checkpoint-8").mkdir()
    model = small_model(seed=1).eval()
    model.save_pretrained(saved)
    loaded = SentenceTransformer(saved, device="cpu")
    np.testing.assert_array_equal(loaded.encode(["the boy"]), model.encode(["the boy"]))
    assert not loaded.normalize
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "checkpoint-8").is_dir()
    loaded.save_pretrained(saved)  # onto the very folder it came from
    np.testing.assert_array_equal(SentenceTransformer(saved, device="cpu").encode("cat"), model.encode("cat"))


def test_a_new_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "er"
    with replacing_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    with contextlib.suppress(RuntimeError), replacing_folder(target) as folder:
        (folder / "a.txt").write_text("b")
        raise RuntimeError("stopped")
    assert (target / "a.txt").read_text() == "a"
    shutil.rmtree(target)
    assert list((tmp_path / "deep").iterdir()) == []
