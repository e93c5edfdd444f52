"""The packed encoder against transformers' BertModel: outputs and every parameter's gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from tests.encoder_parity import assert_gradients, transformers_states
from tests.small_model import bert_config, bert_pair, random_batch
from triton_st.models import BertModel, load_encoder, pack

# --- the whole model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [False, True])
def test_outputs_and_gradients_equal_transformers(typed):
    ours, theirs = bert_pair()
    features = random_batch()
    if typed:
        features["token_type_ids"] = torch.arange(len(features["input_ids"])) % 2
    exact = transformers.BertModel(theirs.config).eval()
    exact.load_state_dict(theirs.state_dict())
    exact.double()
    hidden, wanted = ours(**features), transformers_states(exact, features)
    torch.testing.assert_close(hidden.double(), wanted, rtol=0, atol=1e-5)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert_gradients(ours, exact)


def test_minilm_equals_transformers_for_a_ragged_batch(minilm_folder):
    exact = transformers.BertModel.from_pretrained(minilm_folder).eval().double()
    ours = load_encoder(minilm_folder)
    features = random_batch([2, 3, 9, 41, 10, 70, 3], vocabulary=30_000)
    hidden, wanted = ours(**features), transformers_states(exact, features)
    lengths = features["cu_seqlens"].diff().tolist()
    pooled, wanted_pooled = (torch.stack([x.mean(0) for x in h.split(lengths)]) for h in (hidden, wanted))
    torch.testing.assert_close(pooled.double(), wanted_pooled, rtol=0, atol=1e-5)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    (pooled * weight).sum().backward()
    (wanted_pooled * weight).sum().backward()
    assert_gradients(ours, exact)


def test_float64_model_runs_in_float64():
    ours, theirs = bert_pair(torch.float64)
    ours.activation_dtype = torch.float64
    features = random_batch()
    torch.testing.assert_close(ours(**features), transformers_states(theirs, features), rtol=0, atol=1e-12)


def test_a_text_is_encoded_the_same_in_any_company():
    ours, _ = bert_pair()
    features = random_batch()
    bounds = features["cu_seqlens"].tolist()
    with torch.no_grad():
        together = ours(**features)
        for start, end in itertools.pairwise(bounds):
            alone = ours(**pack([features["input_ids"][start:end].tolist()]))
            torch.testing.assert_close(together[start:end], alone, rtol=0, atol=2e-6)


def test_nan_in_one_text_stays_there():
    ours, _ = bert_pair()
    with torch.no_grad():
        ours.embeddings.word_embeddings.weight[59] = float("nan")
        hidden = ours(**pack([[1, 2], [3, 59, 4], [5, 6, 7, 8]]))
    finite = hidden.isfinite().all(1)
    assert finite.tolist() == [True] * 2 + [False] * 3 + [True] * 4


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 3, 0], [4, 4, 4], [64]])
def test_odd_batches(lengths):
    ours, theirs = bert_pair()
    features = random_batch(lengths)
    hidden = ours(**features)
    assert hidden.shape == (sum(lengths), 50)
    if sum(lengths):
        kept = pack([ids.tolist() for ids in features["input_ids"].split(lengths) if len(ids)])
        torch.testing.assert_close(hidden, transformers_states(theirs, kept), rtol=0, atol=1e-5)
    hidden.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_initial_weights_have_transformers_distribution():
    torch.manual_seed(0)
    model = BertModel(bert_config(vocab_size=2000, initializer_range=0.02))
    words = model.embeddings.word_embeddings.weight
    assert words[0].abs().max() == 0
    assert words[1:].std().item() == pytest.approx(0.02, rel=0.02)
    layer = model.encoder.layer[0]
    assert layer.intermediate.dense.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.intermediate.dense.bias.abs().max() == 0
    assert torch.equal(layer.output.LayerNorm.weight, torch.ones(50))


@pytest.mark.filterwarnings("ignore")
def test_compiled_model_equals_eager():
    ours, _ = bert_pair()
    features = random_batch()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    wanted, hidden = ours(**features), compiled(**features)
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(hidden.square().sum(), ours.encoder.layer[0].output.dense.weight)
    (wanted_gradient,) = torch.autograd.grad(wanted.square().sum(), ours.encoder.layer[0].output.dense.weight)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)


def test_inductor_compiles_the_model(minilm_folder):
    model = load_encoder(minilm_folder)
    features = {"input_ids": torch.arange(100, 107), "cu_seqlens": torch.tensor([0, 3, 7]).int(), "max_seqlen": 4}
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model)(**features), model(**features), rtol=0, atol=1e-5)


def test_dropout_follows_the_seed_and_the_mode():
    ours, _ = bert_pair()
    features = random_batch()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(ours.train()(**features))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(ours.eval()(**features), ours(**features))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_are_refused():
    ours, _ = bert_pair()
    with pytest.raises(ValueError, match=r"input_ids: expected ids from 0 to 59 \(vocab_size 60\), got 60"):
        ours(**pack([[1, 60]]))
    with pytest.raises(ValueError, match=r"input_ids: expected ids from 0 to 59 .*, got -1"):
        ours(**pack([[1, -1]]))
    with pytest.raises(ValueError, match=r"token_type_ids: expected ids from 0 to 1 \(type_vocab_size 2\), got 2"):
        ours(**pack([[1, 2]]), token_type_ids=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"token_type_ids: expected shape \(2,\), got \(1,\)"):
        ours(**pack([[1, 2]]), token_type_ids=torch.tensor([0]))


def test_a_text_longer_than_the_position_table_is_refused():
    ours, _ = bert_pair()
    with pytest.raises(ValueError, match=r"at most 64 tokens \(max_position_embeddings\), got one of 65"):
        ours(**pack([[1] * 65]))


def test_offsets_are_checked_before_any_work():
    ours, _ = bert_pair()
    with pytest.raises(ValueError, match="cu_seqlens: expected to end at T = 3"):
        ours(torch.tensor([1, 2, 3]), torch.tensor([0, 2], dtype=torch.int32), 3)


def test_other_activation_dtypes_are_refused():
    ours, _ = bert_pair()
    ours.activation_dtype = torch.int8
    with pytest.raises(ValueError, match=r"activation_dtype: expected one of .*, got torch.int8"):
        ours(**random_batch())


@pytest.mark.parametrize(
    ("parameters", "activations"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_parameters_of_another_dtype_are_refused(parameters, activations):
    ours, _ = bert_pair()
    ours.to(parameters).activation_dtype = activations
    with pytest.raises(TypeError, match=f"parameters: expected float32 .*, got {parameters}"):
        ours(**random_batch())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "config.hidden_act: expected 'gelu' .*, got 'relu'"),
        ({"is_decoder": True}, "config.is_decoder: expected False"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: expected 'absolute', got 'relative_key'",
        ),
        ({"num_attention_heads": 0}, "config.num_attention_heads: expected at least 1, got 0"),
        ({"hidden_size": -50}, "config.hidden_size: expected at least 1, got -50"),
        ({"num_hidden_layers": -1}, "config.num_hidden_layers: expected at least 0, got -1"),
        ({"hidden_dropout_prob": 1.5}, "config.hidden_dropout_prob: expected a probability, 0 to 1, got 1.5"),
        ({"attention_probs_dropout_prob": float("nan")}, "attention_probs_dropout_prob: expected a probability"),
        ({"num_attention_heads": 7}, "config.hidden_size: expected a multiple of num_attention_heads = 7, got 50"),
    ],
)
def test_configs_that_are_not_served_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BertModel(bert_config(**changes))
