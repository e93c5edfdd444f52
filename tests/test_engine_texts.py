"""Texts through the CPU engine: block by block, behind a SentenceTransformer's `encode`, in every precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving import threads
from small_model import WORDS, small_model
from test_engine import CLOSE, bert, every_precision

from triton_st import SentenceTransformer, backend
from triton_st.engine import DTYPES, Engine
from triton_st.inference import _say_once
from triton_st.models.pooling import Dense

TEXTS = ["the boy plays", "a dog", "", "the small cat sleeps near the old tree with a ball"]

# --- texts ---


def test_texts_block_by_block_are_texts_at_once() -> None:
    model = small_model()
    texts = [f"the {a} {b}" for a in ("boy", "dog", "cat plays in the park") for b in ("runs", "sleeps near", "")] * 40
    engine, seen = Engine(model.encoder.eval()), []
    out = torch.full((len(texts), 50), float("nan"))
    engine.embed_texts(texts, model._token_ids, out, done=seen.append)
    batch = model.tokenize(texts)
    assert torch.equal(out, engine.embed(batch["input_ids"], batch["cu_seqlens"]))
    assert sum(seen) == len(texts)
    assert len(seen) > 1
    engine.embed_texts([], model._token_ids, out[:0])


def test_an_error_while_tokenizing_comes_through() -> None:
    engine = Engine(bert())

    def token_ids(texts: list[str]) -> list[list[int]]:
        if "bad" in texts:
            raise OSError("no tokens today")
        return [[1, 2]] * len(texts)

    with pytest.raises(OSError, match="no tokens today"):
        engine.embed_texts(["good"] * 1000 + ["bad"], token_ids, torch.empty(1001, 50))


# --- SentenceTransformer ---


@every_precision
def test_encode_is_the_engine_s(dtype: str) -> None:
    model = small_model(normalize=True).eval()
    model.inference_dtype = dtype
    texts = ["the boy plays", "a dog", "", "the small cat sleeps near the old tree with a ball"] * 50
    with backend.use("reference"):
        assert model._cpu_engine() is None
        expected = model.encode(texts, convert_to_tensor=True)
    actual = model.encode(texts, convert_to_tensor=True)
    assert model._cpu_engine().dtype == dtype
    assert torch.cosine_similarity(actual, expected).min() >= CLOSE[dtype]
    if dtype == "float32":
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert torch.equal(model.encode(texts[1], convert_to_tensor=True), actual[1])
    assert torch.equal(model.encode(texts, truncate_dim=7, convert_to_tensor=True), actual[:, :7])
    model.train()
    assert model._cpu_engine() is None  # another thread may be writing to the parameters


@every_precision
def test_token_states_are_the_engine_s(dtype: str) -> None:
    """Of one precision with the embeddings, and the same to the last bit in any batch."""
    model = small_model().eval()
    exact = model.encode(TEXTS, output_value="token_embeddings")
    model.inference_dtype = dtype
    states = model.encode(TEXTS * 150, output_value="token_embeddings")
    for text, actual, expected in zip(TEXTS, states, exact, strict=False):
        assert actual.dtype == torch.float32
        assert torch.cosine_similarity(actual, expected).min() >= CLOSE[dtype]
        assert torch.equal(actual, expected) == (dtype == "float32")
        assert torch.equal(model.encode(text, output_value="token_embeddings"), actual)
    everything = model.encode(TEXTS, output_value=None, truncate_dim=20)
    embeddings = model.encode(TEXTS, convert_to_tensor=True, truncate_dim=20)
    for i, item in enumerate(everything):
        assert torch.equal(item["sentence_embedding"], embeddings[i])
        assert torch.equal(item["token_embeddings"], states[i])
        assert item["input_ids"].tolist() == model.tokenize(TEXTS[i : i + 1])["input_ids"].tolist()


@pytest.mark.parametrize("output_value", ["sentence_embedding", "token_embeddings"])
def test_precision_where_the_engine_does_not_serve(output_value: str) -> None:
    model = small_model().train()
    found = {}
    for dtype in DTYPES:
        model.inference_dtype = dtype
        found[dtype] = model.encode(TEXTS[:1], output_value=output_value)[0]
    assert (found["int8"] == found["float32"]).all()
    for dtype in ("float16", "bfloat16"):
        assert 0 < abs(found[dtype] - found["float32"]).max() < 0.05
    with model.activations_in(torch.bfloat16):  # asked for by name, it goes first
        assert (model.encode(TEXTS[:1], output_value=output_value)[0] == found["bfloat16"]).all()


def test_int8_elsewhere_says_what_serves_once(caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    model = small_model().train()
    model.inference_dtype = "int8"
    for _ in range(2):
        model.encode(TEXTS)
    assert caplog.text.count("dtype int8 is for inference on the CPU, with its kernels; float32 serves here") == 1


def test_all_minilm_in_every_precision(minilm_folder: Path, shared_data: Path) -> None:
    lines = (shared_data / "stsb_dev.csv").read_text(encoding="utf-8").splitlines()[1:]
    texts = [line.split(",", 1)[1] for line in lines[:300]]
    exact = SentenceTransformer(minilm_folder, device="cpu").encode(texts, convert_to_tensor=True)
    expected = {"float16": (0.99999, 0.9999), "bfloat16": (0.9999, 0.9995), "int8": (0.999, 0.995)}
    for dtype, (mean, least) in expected.items():
        model = SentenceTransformer(minilm_folder, device="cpu", model_kwargs={"torch_dtype": dtype})
        cosine = torch.cosine_similarity(model.encode(texts, convert_to_tensor=True), exact)
        assert cosine.mean() >= mean, dtype
        assert cosine.min() >= least, dtype
    with pytest.raises(ValueError, match="dtype: expected one of float32"):
        SentenceTransformer(minilm_folder, device="cpu", dtype="int4")


@every_precision
@pytest.mark.parametrize(
    ("activation", "width", "residual"), [("Tanh", 37, False), ("Sigmoid", 50, True), ("SiLU", 3, True)]
)
def test_a_text_s_bits_do_not_depend_on_its_batch_behind_a_dense_layer(
    dtype: str, activation: str, width: int, residual: bool
) -> None:
    model = small_model().eval()
    model.inference_dtype = dtype
    name = f"torch.nn.modules.activation.{activation}"
    model.head.append(Dense(50, width, activation_function=name, use_residual=residual).eval())
    texts = [f"{TEXTS[i % 4]} the {WORDS[i % 20]} {WORDS[i // 20 % 20]}" for i in range(1000)]
    with threads(2):
        expected = model.encode(texts, normalize_embeddings=True, convert_to_tensor=True)
        assert torch.equal(
            model.encode(texts[::-1], normalize_embeddings=True, convert_to_tensor=True).flip(0), expected
        )
    with threads(1):
        for i in (0, 1, 500, 999):
            assert torch.equal(model.encode(texts[i], normalize_embeddings=True, convert_to_tensor=True), expected[i])
    with backend.use("reference"):
        plain = model.encode(texts, normalize_embeddings=True, convert_to_tensor=True)
    assert torch.cosine_similarity(plain, expected).min() >= CLOSE[dtype]
