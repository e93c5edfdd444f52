"""`encode`, argument by argument, against sentence-transformers' own on the same real weights."""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import multiprocessing
import time

import numpy as np
import pandas
import pytest
import sentence_transformers
import torch
from sentence_transformers.util.quantization import quantize_embeddings as st_quantize_embeddings

from tests.small_model import small_model
from triton_st import SentenceTransformer, multi_process
from triton_st.quantization import quantize_embeddings, quantized_shape

TEXTS = [
    "A boy plays in the grass.",
    "",
    "The grass is where a boy is playing, says a much longer sentence.",
    "   ",
    "Rain.",
    "word " * 300,
]
PROMPTS = {"query": "query: ", "passage": "passage: ", "empty": ""}


@pytest.fixture(scope="module")
def ours(minilm_folder) -> SentenceTransformer:
    return SentenceTransformer(minilm_folder, device="cpu", prompts=PROMPTS)


@pytest.fixture(scope="module")
def theirs(minilm_folder) -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(minilm_folder), device="cpu", prompts=PROMPTS)


def assert_same(actual, expected) -> None:
    """The same kind of thing, holding the same numbers."""
    assert type(actual) is type(expected)
    if isinstance(expected, list):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
        return
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"batch_size": 2},
        {"prompt_name": "query"},
        {"prompt": "passage: "},
        {"prompt": "passage: ", "prompt_name": "query"},
        {"prompt_name": "empty"},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"convert_to_numpy": False, "convert_to_tensor": True},
        {"normalize_embeddings": True},
        {"truncate_dim": 64},
        {"truncate_dim": 64, "normalize_embeddings": True},
        {"truncate_dim": 1000},
        {"output_value": "token_embeddings"},
        {"output_value": "token_embeddings", "convert_to_tensor": True},
        {"device": "cpu"},
        {"task": "query"},
    ],
    ids=str,
)
@pytest.mark.parametrize("single", [False, True], ids=["list", "one"])
def test_every_argument(ours, theirs, arguments, single):
    inputs = TEXTS[2] if single else TEXTS
    assert_same(ours.encode(inputs, **arguments), theirs.encode(inputs, **arguments))


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("convert_to_tensor", [False, True])
def test_signs(ours, theirs, precision, convert_to_tensor):
    arguments = {"precision": precision, "convert_to_tensor": convert_to_tensor}
    actual, expected = ours.encode(TEXTS, **arguments), theirs.encode(TEXTS, **arguments)
    assert type(actual) is type(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape == (len(TEXTS), 48)
    assert (np.asarray(actual) != np.asarray(expected)).mean() < 0.01  # of values within 1e-5 of zero


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_bytes(ours, theirs, precision, caplog):
    with caplog.at_level(logging.WARNING, logger="triton_st"):
        actual = ours.encode(TEXTS, precision=precision)
    assert "ranges are taken from these 6 embeddings" in caplog.text
    expected = theirs.encode(TEXTS, precision=precision)
    assert actual.dtype == expected.dtype
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= 1
    with pytest.raises(ValueError, match="precision: int8 needs each dimension's range"):
        ours.encode(TEXTS[0], precision="int8")


def test_codes_of_two_calls_can_be_compared(ours):
    """By sentence-transformers' rule, each call has ranges of its own."""
    floats = ours.encode(TEXTS)
    whole = ours.encode(TEXTS, precision="int8", calibration_embeddings=floats)
    parts = [ours.encode(part, precision="int8", calibration_embeddings=floats) for part in (TEXTS[:2], TEXTS[2:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    ranges = np.stack([floats.min(0), floats.max(0)])
    np.testing.assert_array_equal(ours.encode(TEXTS, precision="int8", ranges=ranges), whole)
    with pytest.raises(ValueError, match=r"ranges: expected shape \[2, 384\], got \[2, 5\]"):
        ours.encode(TEXTS, precision="int8", ranges=ranges[:, :5])


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_quantization_equals_sentence_transformers(precision):
    values = np.random.default_rng(0).normal(size=(200, 37)).astype(np.float32)
    values[:, 3] = 0.25  # a dimension without range
    actual = quantize_embeddings(values, precision)
    np.testing.assert_array_equal(actual, st_quantize_embeddings(values, precision))
    np.testing.assert_array_equal(quantize_embeddings(torch.from_numpy(values), precision), actual)
    assert quantized_shape(37, precision) == (actual.shape[1], actual.dtype)
    with pytest.raises(TypeError, match="embeddings: expected floating point, got int64"):
        quantize_embeddings(np.arange(3), precision)


def test_all_features(ours, theirs):
    for actual, expected in zip(
        ours.encode(TEXTS, output_value=None), theirs.encode(TEXTS, output_value=None), strict=True
    ):
        kept = expected["attention_mask"].bool()
        assert torch.equal(actual["input_ids"], expected["input_ids"][kept])
        assert_same(actual["token_embeddings"], expected["token_embeddings"][kept])
        assert_same(actual["sentence_embedding"], expected["sentence_embedding"])
    assert ours.encode("Rain.", output_value=None, truncate_dim=8)["sentence_embedding"].shape == (8,)


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
@pytest.mark.parametrize("arguments", [{}, {"prompt": "x "}, {"prompt_name": "empty"}, {"normalize_embeddings": True}])
def test_queries_and_documents(ours, theirs, method, arguments):
    assert_same(getattr(ours, method)(TEXTS, **arguments), getattr(theirs, method)(TEXTS, **arguments))


@pytest.mark.parametrize(
    "inputs",
    [
        tuple(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        pandas.Series(TEXTS, index=range(10, 16)),
        (text for text in TEXTS),
        dict.fromkeys(TEXTS).keys(),
    ],
    ids=["tuple", "array", "objects", "series", "generator", "keys"],
)
def test_every_kind_of_input(ours, inputs):
    np.testing.assert_array_equal(ours.encode(inputs), ours.encode(TEXTS))


def test_the_older_name_of_the_texts(ours):
    np.testing.assert_array_equal(ours.encode(sentences=TEXTS), ours.encode(inputs=TEXTS))
    with pytest.raises(TypeError, match="inputs: expected a string or strings once"):
        ours.encode(TEXTS, sentences=TEXTS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        ours.encode(TEXTS, batchsize=3)


@pytest.mark.parametrize("precision", ["float32", "ubinary"])
def test_into_an_array_of_ones_own(ours, tmp_path, precision):
    wanted = ours.encode(TEXTS, precision=precision)
    out = np.lib.format.open_memmap(tmp_path / "e.npy", mode="w+", dtype=wanted.dtype, shape=wanted.shape)
    assert ours.encode(TEXTS, out=out, precision=precision) is out
    out.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "e.npy"), wanted)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.empty((6, 384)), ValueError, r"out: expected float32 of shape \[6, 384\], got float64 of shape"),
        (np.empty((5, 384), np.float32), ValueError, r"got float32 of shape \[5, 384\]"),
        (np.empty((6, 3), np.float32), ValueError, r"got float32 of shape \[6, 3\]"),
        (np.broadcast_to(np.float32(0), (6, 384)), ValueError, "out: expected an array that can be written to"),
        (torch.empty(6, 384), TypeError, "out: expected a numpy array, got Tensor"),
    ],
)
def test_an_array_that_does_not_fit(ours, out, error, message):
    with pytest.raises(error, match=message):
        ours.encode(TEXTS, out=out)
    with pytest.raises(ValueError, match="out: expected None with an output_value other"):
        ours.encode(TEXTS, out=out, output_value=None)


def test_streams(ours):
    taken = []

    def stream():
        for text in itertools.cycle(TEXTS):
            taken.append(text)
            yield text

    chunks = ours.encode_iter(stream(), chunk_size=4, normalize_embeddings=True)
    assert not taken
    found = np.concatenate([next(chunks), next(chunks)])
    assert len(taken) == 8
    wanted = ours.encode([*TEXTS, *TEXTS[:2]], normalize_embeddings=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert list(ours.encode_iter([])) == []
    with pytest.raises(TypeError, match=r"inputs\[5\]: expected a string, got NoneType"):
        list(ours.encode_iter([*TEXTS[:5], None], chunk_size=2))
    with pytest.raises(TypeError, match="inputs: expected strings, got str"):
        ours.encode_iter("text")
    with pytest.raises(ValueError, match="int8 and uint8 of a stream need ranges"):
        ours.encode_iter(TEXTS, precision="int8")


def test_truncating_for_a_while(ours, theirs):
    with ours.truncate_embeddings(16), theirs.truncate_embeddings(16):
        assert ours.get_embedding_dimension() == theirs.get_embedding_dimension() == 16
        assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert ours.get_embedding_dimension() == 384


def assert_an_interrupted_call_leaves_the_pool_usable(ours, pool, monkeypatch) -> None:
    """What the workers had done of it is not taken for the next call's."""

    def interrupted(*_):
        time.sleep(0.3)  # by which some chunks are through
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(multi_process, "_next_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ours.encode(TEXTS * 4, pool=pool, chunk_size=2)
    np.testing.assert_allclose(ours.encode(TEXTS[::-1], pool=pool, chunk_size=1), ours.encode(TEXTS[::-1]), atol=1e-6)
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        parts = [TEXTS[:2], TEXTS[2:4], TEXTS[4:]]
        found = list(threads.map(lambda texts: ours.encode(texts, pool=pool, chunk_size=1), parts))
    np.testing.assert_allclose(np.concatenate(found), ours.encode(TEXTS), atol=1e-6)


def test_devices_in_a_list_are_a_pool_for_one_call():
    model = small_model().eval()
    model.inference_dtype = "int8"
    before = len(multiprocessing.active_children())
    states = model.encode(["the boy", "a dog"], device=["cpu"], output_value=None)
    assert len(multiprocessing.active_children()) == before
    for found, wanted in zip(states, model.encode(["the boy", "a dog"], output_value=None), strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_several_processes(ours, theirs, monkeypatch):
    wanted = ours.encode(TEXTS, prompt_name="query", normalize_embeddings=True)
    pool = ours.start_multi_process_pool(["cpu", "cpu"])
    try:
        arguments = {"pool": pool, "chunk_size": 2, "prompt_name": "query", "normalize_embeddings": True}
        np.testing.assert_allclose(ours.encode(TEXTS, **arguments), wanted, rtol=0, atol=1e-6)
        states = ours.encode(TEXTS, pool=pool, output_value="token_embeddings")
        assert_same(states, theirs.encode(TEXTS, output_value="token_embeddings"))
        assert ours.encode(TEXTS, pool=pool, precision="ubinary").shape == (6, 48)
        assert ours.encode([], pool=pool).shape == (0, 384)
        older = ours.encode_multi_process(TEXTS, pool, "query", normalize_embeddings=True, truncate_dim=384)
        np.testing.assert_array_equal(older, ours.encode(TEXTS, **arguments))
        with pytest.raises(ValueError, match="batch_size: expected a positive int"):
            ours.encode(TEXTS, pool=pool, batch_size=0)
        out = np.empty((6, 384), np.float32)
        assert ours.encode(TEXTS, out=out, **arguments) is out
        np.testing.assert_array_equal(out, older)
        assert_an_interrupted_call_leaves_the_pool_usable(ours, pool, monkeypatch)
        pool["processes"][0].kill()
        pool["processes"][1].kill()
        with pytest.raises(RuntimeError, match="a worker of the pool died: process"):
            ours.encode(TEXTS, pool=pool)
    finally:
        ours.stop_multi_process_pool(pool)
