"""Batches padded to a few sizes for CUDA graphs: results stay, a size is captured once, eager where none can be.

Where there is no GPU, plain calls stand for graphs: all is tested then but the capture itself.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import numpy as np
import pytest
import torch

from tests.small_model import WORDS, random_batch, small_model
from triton_st import backend, graphs
from triton_st.graphs import SEQUENCES, TOKENS, Bucket, GraphedEncoder, bucket_of, eager_states, pad
from triton_st.kernels import common
from triton_st.models import BertModel, MPNetModel, pack

LENGTHS = [[3], [16], [5, 1, 7, 2], [32] * 7 + [3], [1] * 33, [0, 3, 0], [2] * 100]
TEXTS = ["the boy plays", "a dog", "", "red ball near the old tree in the park", "happy cat sleeps"]


class Repeating:
    """In place of `graphs.capture`: the work itself, and how often it was asked for."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, work, stream, pool):
        self.count += 1
        work()
        return work


def graphed(encoder, dtype=torch.float32) -> GraphedEncoder:
    made = GraphedEncoder(encoder, dtype, capture=Repeating())
    made.problem = lambda: made._failure
    return made


@pytest.fixture
def encoder():
    return small_model().eval().encoder


# --- sizes ---


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_padding_keeps_the_batch_and_makes_whole_sequences(lengths):
    features = random_batch(lengths)
    tokens, count = len(features["input_ids"]), len(lengths)
    bucket = bucket_of(tokens, count, 32)
    assert tokens <= bucket.tokens <= max(16, 3 * tokens // 2)
    assert bucket.tokens in TOKENS
    assert bucket.sequences in SEQUENCES
    ids, starts = pad(features, bucket, 32)
    assert ids.shape == (bucket.tokens,)
    assert starts.shape == (bucket.sequences + 1,)
    assert (ids.dtype, starts.dtype) == (torch.int64, torch.int32)
    assert torch.equal(ids[:tokens], features["input_ids"])
    assert torch.equal(starts[: count + 1], features["cu_seqlens"])
    assert starts[-1] == bucket.tokens
    assert starts.diff().min() >= 0
    assert starts.diff().max() <= 32


@pytest.mark.parametrize("longest", [1, 7, 512])
def test_every_size_has_room_for_its_padding(longest):
    for tokens in range(1, 3000, 13):
        for count in {1, tokens // 5 + 1, tokens}:
            if (bucket := bucket_of(tokens, count, longest)) is not None:
                pad(pack([[1] * (tokens - count + 1), *[[1]] * (count - 1)]), bucket, longest)


def test_what_has_no_size():
    assert bucket_of(0, 3, 32) is None
    assert bucket_of(TOKENS[-1], 1, 32) == Bucket(TOKENS[-1], SEQUENCES[0])
    assert bucket_of(TOKENS[-1] + 1, 1, 32) is None
    assert bucket_of(16, SEQUENCES[-1] + 1, 32) is None
    assert list(TOKENS) == sorted(TOKENS)


# --- results ---


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_padding_changes_no_result(encoder, name):
    made = graphed(encoder)
    with backend.use(name):
        for lengths in LENGTHS:
            features = random_batch(lengths, vocabulary=25)
            expected = eager_states(encoder, features, torch.float32)
            torch.testing.assert_close(made.states(features), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_of_a_gpu_interpreted(encoder, dtype, device):
    if problem := backend.triton_problem(device):
        pytest.skip(problem)
    features = random_batch([5, 1, 7], vocabulary=25)
    with backend.use("triton"), torch.inference_mode():
        made = GraphedEncoder(encoder.to(device), dtype, capture=Repeating())
        assert made.problem() is None
        actual, expected = made.states(features), eager_states(encoder, features, dtype)
    assert actual.dtype == dtype
    assert made._capture.count == 1
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)


def test_a_size_is_captured_once(encoder):
    made = graphed(encoder)
    for lengths in ([3], [5, 4], [16], [17], [20, 3], [3]):
        made.states(random_batch(lengths, vocabulary=25))
    assert made._capture.count == len(made._replays) == 2


def test_parameters_are_followed(encoder):
    made, features = graphed(encoder), random_batch([5, 9], vocabulary=25)
    first = made.states(features)
    with torch.no_grad():
        encoder.encoder.layer[0].output.dense.weight.mul_(1.5)
    written = made.states(features)
    assert made._capture.count == 1  # a graph reads the memory that was written to
    assert not torch.equal(written, first)
    encoder.encoder.layer[1].output.dense.weight = torch.nn.Parameter(torch.ones(50, 72))
    replaced = made.states(features)
    assert made._capture.count == 2
    torch.testing.assert_close(replaced, eager_states(encoder, features, torch.float32), rtol=0, atol=1e-5)
    encoder.encoder.layer[0] = copy.deepcopy(encoder.encoder.layer[1])
    torch.testing.assert_close(made.states(features), eager_states(encoder, features, torch.float32), rtol=0, atol=1e-5)
    assert made._capture.count == 3


def test_threads_share_the_graphs(encoder):
    made = graphed(encoder)
    batches = [random_batch([5, 3 + i, 2], vocabulary=25, seed=i) for i in range(6)]
    expected = [made.states(batch) for batch in batches]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(made.states(batches[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_capture_their_own(encoder):
    made = GraphedEncoder(encoder, torch.float16)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.dtype == torch.float16
        assert other.encoder is not encoder
        assert other._replays == {}


# --- where there can be no graph ---


def test_a_capture_that_fails_is_not_tried_again(encoder, caplog):
    calls = []

    def failing(work, stream, pool):
        calls.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    made = GraphedEncoder(encoder, torch.float32, capture=failing)
    made.problem = lambda: made._failure
    features = random_batch([5, 9], vocabulary=25)
    for _ in range(3):
        assert torch.equal(made.states(features), eager_states(encoder, features, torch.float32))
    assert calls == [1]
    assert caplog.text.count("CUDA graphs are not used from here on: operation not permitted") == 1
    assert GraphedEncoder.problem(made) == "operation not permitted when stream is capturing"


def test_encoders_that_are_not_captured(encoder):
    assert GraphedEncoder(encoder, torch.float32).problem() == "backend 'cpp' serves here"


def test_a_large_batch_runs_as_it_is(encoder):
    made = graphed(encoder)
    assert len(made.states(random_batch([32] * 513, vocabulary=25))) == 513 * 32
    assert made.states(pack([])).shape == (0, 50)
    assert made._capture.count == 0


@pytest.mark.parametrize("family", [BertModel, MPNetModel])
def test_a_pass_reads_no_value_of_a_tensor(family, monkeypatch):
    """On meta tensors, which have none, as on a GPU where reading one would wait, and end a capture."""
    monkeypatch.setattr(backend, "select", lambda tensor: "triton")
    config = family.config_class(vocab_size=30, hidden_size=50, num_hidden_layers=2, num_attention_heads=5)
    meta = family(config).eval().to("meta")
    ids, offsets = torch.empty(64, dtype=torch.int64, device="meta"), torch.empty(9, dtype=torch.int32, device="meta")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with common.recording("cuda") as launches, torch.inference_mode():
            states = meta.states(ids, offsets, 32, None, False, dtype)
        assert states.shape == (64, 50)
        assert {launch.kernel.fn.__name__ for launch in launches} >= {"_embedding_kernel", "_attention_kernel"}


def test_the_order_of_a_capture(monkeypatch):
    """As torch's notes have it: warm up, then capture on that stream, from the shared pool, this thread alone."""
    events = []

    class Graph:
        replay = staticmethod(lambda: events.append("replay"))

    @contextlib.contextmanager
    def capturing(graph, **options):
        events.append(("begin", options))
        yield
        events.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    replay = graphs.capture(lambda: events.append("work"), "stream", "pool")
    options = {"pool": "pool", "stream": "stream", "capture_error_mode": "thread_local"}
    assert events == ["work"] * 3 + [("begin", options), "work", "end"]
    replay()
    assert events[-1] == "replay"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: captures are not tested")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_graphs_on_a_gpu(dtype):
    model = small_model().eval().to("cuda")
    model.inference_dtype = dtype
    texts = [" ".join(WORDS[: 1 + i % 19]) for i in range(300)]
    graphed_first, again = model.encode(texts), model.encode(texts)
    assert model._graphs._replays
    assert model._graphs._failure is None
    np.testing.assert_array_equal(again, graphed_first)
    model._graphs._failure = "for comparison"
    limit = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(model.encode(texts), graphed_first, rtol=0, atol=limit)


# --- encode on them ---


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_encode_on_interpreted_kernels(dtype, monkeypatch, device):
    if problem := backend.triton_problem(device):
        pytest.skip(problem)
    model = small_model(num_hidden_layers=1).eval()
    expected = model.encode(TEXTS)
    model.inference_dtype = dtype
    made = GraphedEncoder(model.encoder, getattr(torch, dtype), capture=Repeating())
    monkeypatch.setattr(model, "_graphed", lambda wanted: made if wanted == made.dtype else None)
    with backend.use("triton"):
        actual = model.encode(TEXTS)
    assert made._capture.count == 1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 if dtype == "float32" else 1e-2)
    assert (np.abs(actual - expected).max() > 1e-6) == (dtype == "float16")


@pytest.mark.parametrize("output_value", ["sentence_embedding", "token_embeddings"])
def test_a_word_that_is_not_finite_stays_in_its_texts(output_value, device):
    """Texts that share a tile of attention with one that holds it are embedded again by themselves."""
    if problem := backend.triton_problem(device):
        pytest.skip(problem)
    model = small_model(num_hidden_layers=1).eval()
    expected = model.encode(TEXTS, output_value=output_value)
    [word] = model.tokenizer.convert_tokens_to_ids(["dog"])
    with torch.no_grad():
        model.encoder.embeddings.word_embeddings.weight[word] = float("nan")
    with backend.use("triton"):
        actual = model.encode(TEXTS, output_value=output_value)
    for text, found, wanted in zip(TEXTS, actual, expected, strict=True):
        found, wanted = np.asarray(found), np.asarray(wanted)
        if "dog" in text:
            assert np.isnan(found).all()
        else:
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
