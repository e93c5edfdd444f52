"""SentenceTransformer: encode, similarity, load and save, against sentence-transformers itself."""

from __future__ import annotations

import concurrent.futures
import csv
import json

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers

from tests.small_model import WORDS, small_model, small_tokenizer
from triton_st import SentenceTransformer
from triton_st.inference import _token_batches
from triton_st.models import BertModel
from triton_st.models.pooling import Pooling

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
        (None, "inputs: expected a string or strings, got None"),
        (3, "inputs: expected a string or strings, got int"),
        (b"bytes", "inputs: expected a string or strings, got bytes"),
        (["a", None], r"inputs\[1\]: expected a string, got NoneType"),
        (["a", "b", 3.5], r"inputs\[2\]: expected a string, got float"),
        ([["a", "b"]], r"inputs\[0\]: expected a string, got list"),
        (np.array([1, 2]), r"inputs\[0\]: expected a string, got int"),
        (np.array("the boy"), "inputs: expected a string or strings, got ndarray"),
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
        ({"precision": "int4"}, "precision: expected one of float32, int8, uint8, binary, ubinary, got 'int4'"),
        ({"output_value": "cls"}, "output_value: expected one of .*, got 'cls'"),
        ({"batch_size": True}, "batch_size: expected a positive int, got True"),
        ({"truncate_dim": 0}, "truncate_dim: expected a positive int or None, got 0"),
        ({"truncate_dim": "8"}, "truncate_dim: expected a positive int or None, got '8'"),
        ({"prompt_name": "title"}, r"prompt_name: expected one of \['query', 'document'\], got 'title'"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.encode(["a"], **arguments)


def test_a_prompt_that_is_no_text_is_named(model):
    with pytest.raises(TypeError, match="prompt: expected a string, got int"):
        model.encode(["a"], prompt=3)


def test_batch_size_may_be_numpys(model):
    np.testing.assert_array_equal(model.encode(["the boy"], batch_size=np.int64(4)), model.encode(["the boy"]))


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


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings_without_token_embeddings_are_the_same(layers, normalize):
    model = small_model(num_hidden_layers=layers, normalize=normalize)
    features = model.tokenize(["the boy", "a dog runs"])
    weights = torch.randn(2, model.get_embedding_dimension())
    results = []
    for token_embeddings in (True, False):
        outputs = model(features, token_embeddings=token_embeddings)
        assert ("token_embeddings" in outputs) == token_embeddings
        model.zero_grad()
        (outputs["sentence_embedding"] * weights).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([outputs["sentence_embedding"].detach(), *(grad.clone() for grad in gradients)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_other_pooling_is_not_the_encoder_s(model):
    model = small_model()
    features = model.tokenize(["the boy", "a dog runs"]) | {"prompt_length": 2}
    model.pooling = Pooling("mean", include_prompt=False)
    wanted = model(features)["sentence_embedding"]
    assert torch.equal(model(features, token_embeddings=False)["sentence_embedding"], wanted)
    model.pooling = Pooling("cls")
    wanted = model(features)["sentence_embedding"]
    assert torch.equal(model(features, token_embeddings=False)["sentence_embedding"], wanted)


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
    with pytest.raises(TypeError, match=r"encoder: expected a triton_st.models.PackedEncoder, got Linear"):
        SentenceTransformer.from_encoder(torch.nn.Linear(2, 2), small_tokenizer())
    with pytest.raises(TypeError, match="tokenizer: expected a fast tokenizer"):
        SentenceTransformer.from_encoder(encoder, object())
    with pytest.raises(ValueError, match="pooling_mode: expected one or more of cls, max, mean"):
        SentenceTransformer.from_encoder(encoder, small_tokenizer(), pooling_mode="middle")
    small = BertModel(transformers.BertConfig.from_dict(encoder.config.to_dict() | {"vocab_size": 9}))
    with pytest.raises(ValueError, match="tokenizer: expected at most 9 tokens, the encoder's vocab_size, got 25"):
        SentenceTransformer.from_encoder(small, small_tokenizer())
