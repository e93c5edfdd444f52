"""Data sets tokenised beside the training: what a batch holds, what it waits for, errors, and how the thread ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.serving import threads
from tests.training_runs import same_weights, tiny_data, tiny_model, trainer, weights
from triton_st.models.packing import Features, pack
from triton_st.training import tokenized
from triton_st.training.tokenized import TokenizedDataset

BAD = "a text that no tokenizer takes"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a model this small two threads only wait for each other."""
    with threads(1):
        yield


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tokenizer")]


@pytest.fixture
def four_texts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "TEXTS_AT_ONCE", 4)


def characters(texts: Sequence[str]) -> Features:
    if BAD in texts:
        raise RuntimeError("broken")
    return pack([[ord(character) for character in text] for text in texts])


class Recorded:
    """A tokenizer that waits, before a call that holds a text of `held`, for `release`; and notes what it was given."""

    def __init__(self, held: Sequence[str] = ()) -> None:
        self.held, self.release, self.calls = set(held), threading.Event(), list[list[str]]()

    def __call__(self, texts: list[str]) -> Features:
        if self.held.intersection(texts):
            assert self.release.wait(10)
        self.calls.append(texts)
        return characters(texts)


def pairs(rows: int) -> Dataset:
    return Dataset.from_dict({"anchor": [f"a{i}" for i in range(rows)], "positive": [f"p{i}" for i in range(rows)]})


def texts_of(batch: list[dict[str, Any]]) -> list[list[str]]:
    """Column by column, the texts that `characters` made the features of."""
    return [
        ["".join(map(chr, ids.tolist())) for ids in column["input_ids"].split(column["cu_seqlens"].diff().tolist())]
        for column in batch
    ]


@pytest.mark.usefixtures("four_texts_at_once")
def test_batches_are_cut_as_the_model_tokenizes_them() -> None:
    model = tiny_model()
    data = tiny_data(10).add_column("label", list(range(10)))
    ours = TokenizedDataset(data, model.tokenize, {"anchor": "query: "})
    rows = [7, 0, 7]
    for column, packed in zip(("anchor", "positive", "negative"), ours.batch(rows), strict=True):
        prompt = "query: " if column == "anchor" else ""
        expected = model.tokenize([prompt + data[row][column] for row in rows])
        assert torch.equal(packed["input_ids"], expected["input_ids"])
        assert torch.equal(packed["cu_seqlens"], expected["cu_seqlens"])
        assert packed["cu_seqlens"].dtype == torch.int32
        assert packed["max_seqlen"] == expected["max_seqlen"]
    labels = ours.labels(rows)
    assert labels is not None
    assert labels.tolist() == rows
    assert len(ours) == 10
    ours.stop()


def test_digest_tells_data_apart_and_not_the_order_of_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_model(), tiny_data(10)
    prompts = {"anchor": "query: "}
    digest = TokenizedDataset(data, model.tokenize, prompts).digest()
    assert digest != TokenizedDataset(data, model.tokenize).digest()
    assert digest != TokenizedDataset(data.select([1, 0, *range(2, 10)]), model.tokenize, prompts).digest()
    monkeypatch.setattr(tokenized, "TEXTS_AT_ONCE", 4)
    other = TokenizedDataset(data, model.tokenize, prompts)
    other.start([8, 3, 9])
    assert other.digest() == digest


@pytest.mark.usefixtures("four_texts_at_once")
def test_a_batch_waits_for_its_own_texts_alone() -> None:
    tokenize = Recorded(held=["a0", "a1", "p0", "p1"])
    data = TokenizedDataset(pairs(6), tokenize)
    data.start([4, 2, 5])
    assert texts_of(data.batch([4, 2])) == [["a4", "a2"], ["p4", "p2"]]
    assert tokenize.calls[0] == ["a4", "p4", "a2", "p2"]
    tokenize.release.set()
    assert texts_of(data.batch([0, 1, 4])) == [["a0", "a1", "a4"], ["p0", "p1", "p4"]]
    assert sorted(text for call in tokenize.calls for text in call) == sorted(f"{c}{i}" for c in "ap" for i in range(6))


@pytest.mark.usefixtures("four_texts_at_once")
def test_stopping_and_starting_again_tokenises_nothing_that_is_there() -> None:
    tokenize = Recorded()
    data = TokenizedDataset(pairs(8), tokenize)
    data.start([7, 6])
    data.batch([7, 6])
    data.stop()
    tokenize.calls.clear()
    assert texts_of(data.batch(range(8))) == [[f"{c}{i}" for i in range(8)] for c in "ap"]
    assert not {"a7", "a6", "p7", "p6"}.intersection(text for call in tokenize.calls for text in call)


@pytest.mark.parametrize("column", ["anchor", "positive"])
def test_an_error_names_column_and_row(column: str) -> None:
    texts = pairs(6).to_dict()
    texts[column][3] = BAD
    data = TokenizedDataset(Dataset.from_dict(texts), characters, name="train_dataset")
    for _ in range(2):  # it does not hang the second time
        with pytest.raises(
            ValueError, match=f"`train_dataset`, column '{column}', row 3: .*tokenised: RuntimeError: broken"
        ) as raised:
            data.batch([0])
    assert isinstance(raised.value.__cause__, RuntimeError)


# --- in the trainer ---------------------------------------------------------------------------------------------------


class Callback(TrainerCallback):
    """Calls a function before each step."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def on_step_begin(self, *arguments: Any, **settings: Any) -> None:
        self.function()


@pytest.mark.usefixtures("four_texts_at_once")
def test_training_does_not_depend_on_how_fast_texts_are_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = trainer(tmp_path / "fast", max_steps=4)
    fast.train()
    model = tiny_model()
    tokenize = model.tokenize
    calls: list[int] = []
    seen: list[int] = []

    def slow(texts: list[str]) -> Features:
        time.sleep(0.005)
        calls.append(len(texts))
        return tokenize(texts)

    monkeypatch.setattr(model, "tokenize", slow)
    run = trainer(tmp_path / "slow", model, max_steps=4, callbacks=[Callback(lambda: seen.append(len(calls)))])
    run.train()
    assert seen[0] < seen[1] < seen[-1]  # steps were taken before all was there
    assert same_weights(model, weights(fast.model))


@pytest.mark.usefixtures("four_texts_at_once")
def test_errors_of_the_thread_come_out_of_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_model(), tiny_data(48)
    bad, tokenize = data[40]["positive"], model.tokenize

    def failing(texts: list[str]) -> Features:
        if bad in texts:
            raise RuntimeError("broken")
        return tokenize(texts)

    monkeypatch.setattr(model, "tokenize", failing)
    with pytest.raises(ValueError, match="`train_dataset`, column 'positive', row 40"):
        trainer(tmp_path, model, train_dataset=data, num_train_epochs=1).train()


@pytest.mark.usefixtures("four_texts_at_once")
def test_the_thread_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    tokenize = model.tokenize
    monkeypatch.setattr(model, "tokenize", lambda texts: (time.sleep(0.02), tokenize(texts))[1])

    def fail() -> None:
        raise KeyError("a callback's own")

    with pytest.raises(KeyError, match="a callback's own"):
        trainer(tmp_path, model, callbacks=[Callback(fail)]).train()
    trainer(tmp_path, model, max_steps=1).train()
