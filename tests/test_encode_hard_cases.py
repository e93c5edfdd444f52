"""What happens to encoders in the wild: forks, interruptions, threads, odd characters, streams without end."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from serving import threads
from tqdm.auto import tqdm

from tests.small_model import WORDS, small_model
from triton_st import SentenceTransformer, encoding
from triton_st.engine import DTYPES

TEXTS = [f"the {a} {b}" for a in WORDS for b in WORDS]


@pytest.fixture
def model() -> SentenceTransformer:
    return small_model().eval()


# --- forks ---

FORKED = """
import logging, multiprocessing, os, sys, threading
import numpy as np, torch
from tests.small_model import WORDS, small_model
from triton_st.models.pooling import Dense

torch.set_num_threads(2)
model = small_model().eval()
model.head.append(Dense(50, 40))  # a product of torch's own
texts = [" ".join(WORDS[i % 9 : 20 : 1 + i % 3]) for i in range(600)]
if sys.argv[1] == "threads":
    expected = model.encode(texts)
    torch.randn(300, 300) @ torch.randn(300, 300)
elif sys.argv[1] == "another thread":
    thread = threading.Thread(target=model.encode, args=(texts,))
    thread.start()
    thread.join()

def embed():
    states = model.encode(texts[:3], output_value="token_embeddings")
    model.inference_dtype = "int8"
    model.encode(texts)
    model.inference_dtype = "float32"
    return model.encode(texts, normalize_embeddings=True), torch.get_num_threads(), len(states)

with multiprocessing.get_context("fork").Pool(1) as pool:
    found, count, states = pool.apply(embed)
assert (count, states) == (1, 3), (count, states)
assert torch.get_num_threads() == 2
expected = model.encode(texts, normalize_embeddings=True)
np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
"""


@pytest.mark.parametrize("before", ["threads", "another thread"])
def test_a_forked_process_encodes(before: str) -> None:
    """Torch's threads do not survive a fork: a child that counted on them would wait for ever."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.getcwd(), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, "-c", FORKED, before], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("this process was forked: texts are encoded on one thread here") == 1


# --- interruptions ---


def interrupt_when(model: SentenceTransformer, texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as soon as so many texts have gone to the tokenizer."""
    own, seen = model._token_ids, []

    def token_ids(some: list[str]) -> list[list[int]]:
        seen.extend(some)
        if len(seen) >= texts:
            seen.clear()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return own(some)

    monkeypatch.setattr(model, "_token_ids", token_ids)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, which it does not in processes that a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("backend_of", ["engine", "model"])
def test_an_interruption_leaves_the_model_as_it_was(model, monkeypatch, backend_of) -> None:
    if backend_of == "model":
        model.train()  # which the engine does not serve
    texts = TEXTS * 60
    wanted = model.encode(TEXTS, show_progress_bar=True)  # tqdm's first bar starts a thread that stays
    before = threading.active_count()
    with monkeypatch.context() as patch:
        interrupt_when(model, 10_000, patch)
        with pytest.raises(KeyboardInterrupt):
            model.encode(texts, show_progress_bar=True)
    assert threading.active_count() == before
    np.testing.assert_array_equal(model.encode(TEXTS), wanted)


@pytest.mark.usefixtures("ctrl_c")
def test_what_was_written_before_an_interruption_stays(model, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "_ROWS_AT_ONCE", 1000)
    texts = (TEXTS * 8)[:3000]
    out = np.full((3000, 50), 7, np.float32)
    with monkeypatch.context() as patch:
        interrupt_when(model, 2500, patch)
        with pytest.raises(KeyboardInterrupt):
            model.encode(texts, out=out)
    wanted = model.encode(texts)
    np.testing.assert_array_equal(out[:2000], wanted[:2000])
    assert (out[2000:] == 7).all()
    assert model.encode(texts, out=out) is out
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("precision", ["float32", "ubinary", "int8"])
def test_rows_go_to_out_block_by_block(model, monkeypatch, precision) -> None:
    ranges = np.stack([np.full(50, -1, np.float32), np.full(50, 1, np.float32)]) if precision == "int8" else None
    arguments = {"precision": precision, "ranges": ranges, "normalize_embeddings": True}
    wanted = model.encode(TEXTS, **arguments)
    monkeypatch.setattr(encoding, "_ROWS_AT_ONCE", 7)
    out = np.zeros_like(wanted)[:, ::-1]  # an odd layout
    assert model.encode(TEXTS, out=out, **arguments) is out
    np.testing.assert_array_equal(out, wanted)
    single = np.zeros_like(wanted[:1])
    np.testing.assert_array_equal(model.encode(TEXTS[0], out=single, **arguments), wanted[0])
    assert model.encode([], out=single[:0], **arguments).shape == (0, wanted.shape[1])


# --- threads ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_that_begin_at_once(dtype: str) -> None:
    """The first calls pack the weights, all of them at the same time."""
    expected = None
    for count in (1, 2):
        model = small_model().eval()
        model.inference_dtype = dtype
        barrier = threading.Barrier(4)

        def embed(_: int, model=model, barrier=barrier) -> np.ndarray:
            barrier.wait()
            return model.encode(TEXTS)

        with threads(count), concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(embed, range(4)))
        expected = found[0] if expected is None else expected
        for embeddings in found:
            np.testing.assert_array_equal(embeddings, expected)


def test_nothing_is_waited_for_where_no_bar_is_shown(model) -> None:
    """Whoever was interrupted while tqdm took its lock has left it locked."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool, tqdm.get_lock():
        for output_value in ("sentence_embedding", "token_embeddings"):
            call = pool.submit(model.encode, TEXTS, output_value=output_value, show_progress_bar=False)
            assert len(call.result(timeout=60)) == len(TEXTS)


# --- characters ---


def test_characters_of_all_kinds_come_through(minilm_folder) -> None:
    model = SentenceTransformer(minilm_folder, device="cpu")
    texts = [
        "\x00",
        "a\x00b",
        "\x1b[31mred\x1b[0m",
        "\ufeffmark",
        "\u202eturned\u202c",
        "\U0010ffff",
        "\ud800",
        "\udc80\ud83d",
    ]
    texts += ["".join(map(chr, range(32))), "\u0301" * 300, " \t\n\r\u3000 "]
    embeddings = model.encode(texts)
    assert np.isfinite(embeddings).all()
    for text, embedding in zip(texts, embeddings, strict=True):
        np.testing.assert_array_equal(model.encode(text), embedding)
    np.testing.assert_array_equal(model.encode(texts[-1]), model.encode(""))


def test_duplicates_have_the_same_bits(model) -> None:
    embeddings = model.encode([*TEXTS[:5], *TEXTS, *TEXTS[:5]])
    np.testing.assert_array_equal(embeddings[:5], embeddings[-5:])
    np.testing.assert_array_equal(embeddings[:5], embeddings[5:10])


# --- memory ---

STREAMED = """
import gc, resource, sys
from tests.small_model import WORDS, small_model

def resident() -> float:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

def texts(n):
    for i in range(n):
        yield f"the {WORDS[i % 20]} {WORDS[i // 20 % 20]} near the {WORDS[i // 400 % 20]}"

model = small_model().eval()
if sys.argv[1] == "model":
    model.train()
sizes, rows = [], 0
for chunk in model.encode_iter(texts(50_000), chunk_size=2_000):
    rows += len(chunk)
    sizes.append(resident())
assert rows == 50_000
before, after = max(sizes[4:9]), max(sizes[-5:])
assert after < before + 3, (before, after)  # the embeddings between take 6 MiB, their texts and tokens more than that
"""


@pytest.mark.parametrize("backend_of", ["engine", "model"])
def test_a_stream_takes_no_more_memory_the_longer_it_is(backend_of: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", STREAMED, backend_of]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
