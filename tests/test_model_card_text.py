"""Any text in a model card shows as itself and leaves the card and its metadata valid."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.card_runs import OtherArguments, evaluator, metadata, new_model, section, tables, train
from triton_st import backend
from triton_st.model_card import SentenceTransformerModelCardData
from triton_st.model_card_text import clean, escape
from triton_st.sentence_transformer import SentenceTransformer

HOSTILE = [
    "pipes | in | cells || and \\| escaped",
    "`code` and ```\nfences\n``` and ``",
    "\"quotes\" 'single' {{ jinja }} {% raw %} ${x}",
    "key: value # comment\n- list\n---\nfront: matter\n...",
    "<script>alert(1)</script> <b>bold</b> &amp; <!-- comment",
    "**bold** _em_ __dunder__ ~~gone~~ [link](http://x) ![img](y) [^1]: note",
    "emoji 👩‍👩‍👧 🇩🇪 日本語 עברית ‮rtl\u202c",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n# heading",
    "\x00null \x1b[31mred\x07 \ufeffbom \x85 \u2028 sep",
    "lone \ud800 surrogate",
    "  spaces around  \t tab\r\nwindows\rmac",
    "yes",
    "123",
    "~",
    "? !tag &anchor *alias @at %percent",
    "x" * 50_000,
]


@pytest.fixture(autouse=True)
def plain_backend() -> Iterator[None]:
    with backend.use("reference"):  # no numbers of kernels are in question here
        yield


@pytest.fixture(scope="module")
def encoder() -> SentenceTransformer:
    return new_model()


@pytest.fixture
def model(encoder: SentenceTransformer) -> SentenceTransformer:
    encoder.model_card_data = SentenceTransformerModelCardData()
    return encoder


# Hostile text -------------------------------------------------------------------------------------------------------


def visible(html: str) -> str:
    """The text that a browser shows for a table cell."""
    import html as entities

    assert not re.search(r"<(?!/?code>|br>)", html), html
    return entities.unescape(re.sub(r"</?code>", "", html.replace("<br>", "\n")))


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_samples_show_as_themselves(text: str, model: SentenceTransformer) -> None:
    texts = [text, "plain", "other"]
    columns = {"anchor": texts, "positive": texts[::-1], "negative": ["n1", "n2", "n3"]}
    # Arrow cannot hold a lone surrogate; a data set of another kind could.
    data = InMemory(columns) if "\ud800" in text else Dataset.from_dict(columns)
    card = train(model, train_dataset=data, eval_dataset=None).to_card(model)
    card.encode("utf-8")
    metadata(card)
    block = section(card, "### Training Dataset")
    _, samples = tables(block)
    assert {len(row) for row in samples} == {3}
    assert len(samples) == 4
    shown = clean(text if len(text) <= 1000 else text[:1000] + "...").strip("\n")
    assert visible(samples[1][0]).split() == shown.split()
    assert visible(samples[3][1]).split() == shown.split()
    # What follows is still a card: later sections are not swallowed.
    assert section(card, "## Citation")
    assert re.findall(r"^# .*$", card, re.MULTILINE)[0] == "# SentenceTransformer"


class InMemory:
    """A data set that holds what Arrow would refuse."""

    info = None

    def __init__(self, columns: dict[str, list[str]]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return {name: values[key] for name, values in self.columns.items()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=3, max_size=6), st.text(min_size=1, max_size=20))
def test_any_text_leaves_the_metadata_valid(texts: list[str], name: str) -> None:
    model = StandIn()
    data = SentenceTransformerModelCardData(model_name=name, license=None, language=[])
    made, metrics = evaluator(name, {"spearman_cosine": 0.5})
    data.set_evaluation_metrics(made, metrics)
    rows = InMemory({"anchor": texts, "positive": texts[1:] + texts[:1]})
    data.set_training_run(
        args=OtherArguments(name, names=texts), train_dataset={name: rows}, loss=StandInLoss(), log_history=[]
    )
    card = data.to_card(model)
    found = metadata(card)
    one_line = {" ".join(clean(text).split()) for text in texts}
    for widget in found.get("widget", []):
        assert {widget["source_sentence"], *widget["sentences"]} <= one_line
    assert found["model-index"][0]["results"][0]["dataset"]["type"] == (clean(name) or "unknown")
    assert json.loads(json.dumps(data.to_state(), allow_nan=False))


class StandInLoss:
    def get_config_dict(self) -> dict[str, Any]:
        return {"scale": 1.0, "function": math.sqrt, "other": object}


class StandIn:
    """The little of a model that a card needs."""

    max_seq_length, similarity_fn_name, training = 16, "dot", False

    def get_embedding_dimension(self) -> int:
        return 4

    def parameters(self) -> list[Any]:
        return []

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        import torch

        return {"cu_seqlens": torch.tensor([0, *(2 for _ in texts)]).cumsum(0)}

    def encode(self, texts: list[str], **_: Any) -> Any:
        import torch

        return torch.zeros(len(texts), 4)

    def similarity(self, a: Any, b: Any) -> Any:
        return a @ b.T


@given(st.text(max_size=80))
def test_escaped_text_shows_as_itself(text: str) -> None:
    markdown = (
        pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    )
    html = markdown.renderInline(f"<code>{escape(text)}</code>")
    assert visible(html).split() == clean(text).split()
