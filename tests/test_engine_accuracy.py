"""The CPU engine's float32 against float64 and its int8 against float32, where numbers get as large as they can."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_model import random_batch
from test_engine import bert, hidden_states
from tolerance import assert_within_tolerance

from triton_st import SentenceTransformer
from triton_st.engine import Engine
from triton_st.models import BertModel, pack


def wide() -> BertModel:
    """With more hidden activations than are summed in one run."""
    return bert(hidden_size=192, num_attention_heads=6, intermediate_size=800, num_hidden_layers=2)


def many_outliers(encoder: BertModel) -> None:
    for name, parameter in encoder.named_parameters():
        if name.endswith("LayerNorm.weight"):
            parameter[[5, 77]] *= 30
        elif name.endswith("dense.weight"):
            parameter[::7, 3] *= 20


def large_hidden_activation(encoder: BertModel) -> None:
    layer = encoder.encoder.layer[0]
    layer.intermediate.dense.bias[3] = 1e4
    layer.output.dense.weight[:, 3] *= 1e-4


def large_value(encoder: BertModel) -> None:
    layer = encoder.encoder.layer[0]
    layer.attention.self.value.bias[3] = 1e4
    layer.attention.output.dense.weight[:, 3] *= 1e-4


def large_weights_that_nothing_meets(encoder: BertModel) -> None:
    layer = encoder.encoder.layer[0]
    layer.intermediate.dense.bias[3] = -20
    layer.output.dense.weight[:, 3] *= 1e5


def tiny_weights(encoder: BertModel) -> None:
    for layer in encoder.encoder.layer:
        for first, second in (
            (layer.attention.self.value, layer.attention.output.dense),
            (layer.intermediate.dense, layer.output.dense),
        ):
            first.weight *= 1e-31
            first.bias *= 1e-31
            second.weight *= 1e31


def assert_as_accurate_as_pytorch(encoder, batch) -> None:
    states = Engine(encoder).states(batch["input_ids"], batch["cu_seqlens"])
    double = copy.deepcopy(encoder).double()
    double.activation_dtype = torch.float64
    exact = hidden_states(double, batch)
    assert_within_tolerance(states, exact, hidden_states(encoder, batch), "states")


@pytest.mark.parametrize(
    "change",
    [many_outliers, large_hidden_activation, large_value, large_weights_that_nothing_meets, tiny_weights],
    ids=lambda change: change.__name__,
)
def test_float32_obeys_the_tolerance_rule(change: Callable[[BertModel], None]) -> None:
    """Also where features or weights are many times larger than the others."""
    encoder = wide()
    with torch.no_grad():
        change(encoder)
    assert_as_accurate_as_pytorch(encoder, random_batch())


def test_float32_obeys_the_tolerance_rule_with_trained_weights(minilm_folder: Path) -> None:
    model = SentenceTransformer(str(minilm_folder), device="cpu")
    texts = ["", "a", "Nobody had told the lighthouse keeper that the ferry was late.", "Seven geese, two foxes."]
    assert_as_accurate_as_pytorch(model.encoder, pack(model.tokenizer(texts)["input_ids"]))


def states_of_one_size(encoder: BertModel) -> None:
    """All features of what the feed-forward layers are fed are 1 or -1."""
    layer = encoder.encoder.layer[0]
    encoder.embeddings.word_embeddings.weight.sign_()
    for ignored in (encoder.embeddings.position_embeddings, encoder.embeddings.token_type_embeddings):
        ignored.weight.zero_()
    layer.attention.output.dense.weight.zero_()
    for norm in (encoder.embeddings.LayerNorm, layer.attention.output.LayerNorm):
        norm.weight.fill_(1)
        norm.bias.zero_()
    layer.attention.output.dense.bias.zero_()


def hidden_activations_of_one_size(encoder: BertModel) -> None:
    """All hidden activations are 20 or 0."""
    up = encoder.encoder.layer[0].intermediate.dense
    up.weight.zero_()
    up.bias.sign_().mul_(20)


def negative_hidden_activations(encoder: BertModel) -> None:
    """All hidden activations are -0.17."""
    up = encoder.encoder.layer[0].intermediate.dense
    up.weight.zero_()
    up.bias.fill_(-0.75)


def negative_values(encoder: BertModel) -> None:
    """All that attention gives is -20."""
    value = encoder.encoder.layer[0].attention.self.value
    value.weight.zero_()
    value.bias.fill_(-20)


EXTREMES = [states_of_one_size, hidden_activations_of_one_size, negative_hidden_activations, negative_values]


@pytest.mark.parametrize("change", EXTREMES, ids=lambda change: change.__name__)
def test_sums_of_int8_hold_what_is_as_large_as_it_gets(change: Callable[[BertModel], None]) -> None:
    encoder = bert(hidden_size=192, num_attention_heads=6, intermediate_size=800, num_hidden_layers=1)
    with torch.no_grad():
        change(encoder)
    batch = random_batch()
    states = Engine(encoder, "int8").states(batch["input_ids"], batch["cu_seqlens"])
    cosine = torch.cosine_similarity(states, hidden_states(encoder, batch))
    assert cosine.min() > 0.999, cosine.min()
