"""Every served family against transformers' own model: names, outputs, gradients, checkpoints, dropout."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from tests.encoder_parity import assert_gradients, transformers_states
from tests.small_model import random_batch
from tests.tolerance import assert_within_tolerance
from triton_st import models, ops
from triton_st.models import load_encoder, pack, save_encoder
from triton_st.models.checkpoint import SERVED_TYPES

SIZES = {
    "vocab_size": 60,
    "hidden_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
DISTILBERT = {
    "vocab_size": 60,
    "dim": 50,
    "n_layers": 2,
    "n_heads": 5,
    "hidden_dim": 72,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(**DISTILBERT),
    "mpnet": lambda: transformers.MPNetConfig(**SIZES | {"max_position_embeddings": 66}),
    "roberta": lambda: transformers.RobertaConfig(**SIZES | {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(
        **SIZES | {"max_position_embeddings": 69, "type_vocab_size": 1, "pad_token_id": 4, "layer_norm_eps": 1e-5}
    ),
}
"""Small configs that all serve sequences of up to 64 tokens."""
FAMILIES = sorted(CONFIGS)


def _pair(family: str) -> tuple[models.PackedEncoder, transformers.PreTrainedModel]:
    """Ours and transformers' model of one family, with the same random weights, in evaluation mode."""
    torch.manual_seed(0)
    theirs = transformers.AutoModel.from_config(CONFIGS[family]()).eval()
    for parameter in theirs.parameters():  # biases and LayerNorms too
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    ours = getattr(models, type(theirs).__name__)(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def _batch() -> dict:
    """Ragged, and without the ids that some family takes for padding, which move positions there."""
    features = random_batch()
    features["input_ids"] = features["input_ids"].clamp(min=5)
    return features


def test_these_are_the_families_that_are_served():
    assert set(SERVED_TYPES) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_transformers(family):
    ours, theirs = _pair(family)
    exact = theirs.double()
    features = _batch()
    hidden, wanted = ours(**features), transformers_states(exact, features)
    torch.testing.assert_close(hidden.double(), wanted, rtol=0, atol=1e-5)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert_gradients(ours, exact)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_pools_by_itself(family, checkpointing):
    ours, _ = _pair(family)
    if checkpointing:
        ours.gradient_checkpointing_enable()
    batch = _batch()
    results = []
    for pool in (False, True):
        pooled = ours(**batch, pool=pool)
        if not pool:
            pooled = ops.packed_mean_pool(pooled, batch["cu_seqlens"])
        ours.zero_grad()
        pooled.square().sum().backward()
        gradients = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
        results.append([pooled.detach(), *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(float(one.abs().max()), 1e-3))


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_padding_in_a_text_gets_no_gradient_as_in_transformers(family):
    """Families whose positions do not skip padding; in the others a text with that id has other positions."""
    ours, theirs = _pair(family)
    exact = theirs.double()
    features = pack([[7, 0, 8], [9, 0]])
    hidden, wanted = ours(**features), transformers_states(exact, features)
    torch.testing.assert_close(hidden.double(), wanted, rtol=0, atol=1e-5)
    hidden.square().sum().backward()
    wanted.square().sum().backward()
    assert_gradients(ours, exact)
    assert ours.embeddings.word_embeddings.weight.grad[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_activations_are_as_exact_as_a_half_model(family, dtype):
    ours, theirs = _pair(family)
    features = _batch()
    ours.activation_dtype = dtype
    with torch.no_grad():
        hidden = ours(**features)
        exact = transformers_states(theirs.double(), features)
        at_dtype = transformers_states(theirs.to(dtype), features)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert_within_tolerance(hidden, exact, at_dtype, "hidden")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_activations_give_float32_gradients_near_the_exact_ones(family, dtype):
    ours, theirs = _pair(family)
    features = _batch()
    ours.activation_dtype = dtype
    weight = torch.randn(len(features["input_ids"]), 50, generator=torch.Generator().manual_seed(1))
    (ours(**features).float() * weight).sum().backward()
    (transformers_states(theirs, features) * weight).sum().backward()
    assert_gradients(ours, theirs, bound=8 * torch.finfo(dtype).eps, floor=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_go_both_ways(family, tmp_path):
    ours, theirs = _pair(family)
    save_encoder(ours, tmp_path / "ours")
    back, report = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(back) is type(theirs)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [type(theirs).__name__]
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_encoder(tmp_path / "theirs")
    assert type(loaded) is type(ours)
    assert torch.equal(loaded(**_batch()), ours(**_batch()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_sequence_is_what_the_position_table_serves(family):
    ours, theirs = _pair(family)
    assert ours.max_length == 64
    features = pack([[7] * 64])
    torch.testing.assert_close(ours(**features), transformers_states(theirs, features), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"at most 64 tokens \(max_position_embeddings.*\), got one of 65"):
        ours(**pack([[7] * 65]))


def test_mpnets_distances_fall_into_transformers_buckets():
    """Up to past the last, which the short batches of the other tests do not reach."""
    distances = torch.arange(-600, 601)
    encoder = transformers.models.mpnet.modeling_mpnet.MPNetEncoder
    wanted = encoder.relative_position_bucket(distances, num_buckets=32)
    model = models.MPNetModel(CONFIGS["mpnet"]())
    rows = model.encoder.relative_attention_bias.weight
    assert torch.equal(model.relative_bias(601), rows[wanted].t())


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_have_transformers_distribution(family):
    torch.manual_seed(0)
    theirs = transformers.AutoModel.from_config(CONFIGS[family]())
    ours = getattr(models, type(theirs).__name__)(theirs.config)
    for name, wanted in theirs.named_parameters():
        found = ours.get_parameter(name)
        assert found.shape == wanted.shape
        if wanted.numel() > 1000:
            assert found.std().item() == pytest.approx(wanted.std().item(), rel=0.1), name
        assert found.abs().sum(-1).eq(0).sum() == wanted.abs().sum(-1).eq(0).sum(), name  # rows for padding, biases


@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
def test_families_without_token_types_refuse_them(family):
    ours, _ = _pair(family)
    with pytest.raises(ValueError, match=f"token_type_ids: expected None, {family} has no token types"):
        ours(**pack([[7, 8]]), token_type_ids=torch.zeros(2, dtype=torch.int64))


def test_configs_of_other_families_are_refused_by_their_own_field_names():
    with pytest.raises(ValueError, match=r"config.activation: expected 'gelu' .*, got 'relu'"):
        models.DistilBertModel(transformers.DistilBertConfig(**DISTILBERT | {"activation": "relu"}))
    with pytest.raises(ValueError, match=r"config.dropout: expected a probability, 0 to 1, got 2"):
        models.DistilBertModel(transformers.DistilBertConfig(**DISTILBERT | {"dropout": 2}))
    with pytest.raises(ValueError, match=r"config.pad_token_id: expected an id"):
        models.RobertaModel(transformers.RobertaConfig(**SIZES | {"pad_token_id": None}))
    with pytest.raises(ValueError, match=r"config.relative_attention_num_buckets: expected at least 32, got 8"):
        models.MPNetModel(transformers.MPNetConfig(**SIZES, relative_attention_num_buckets=8))


# --- dropout, gradient checkpointing, torch.compile ------------------------------------------------------------------


def _step(model: models.PackedEncoder, seed: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Outputs and gradients of one training step whose random numbers come from `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    hidden = model(**_batch())
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weight).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_repeats_the_same_bits(family, dtype):
    ours, _ = _pair(family)
    ours.train().activation_dtype = dtype
    hidden, gradients = _step(ours)
    ours.gradient_checkpointing_enable()
    again, gradients_again = _step(ours)
    assert torch.equal(hidden, again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    ours.gradient_checkpointing_disable()
    assert not ours.gradient_checkpointing


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_follows_the_generator_and_the_mode(family):
    ours, _ = _pair(family)
    evaluated = ours(**_batch())
    ours.train()
    (first, gradients), (same, same_gradients), (other, _) = _step(ours), _step(ours), _step(ours, seed=4)
    assert torch.equal(first, same)
    assert all(torch.equal(gradient, same_gradients[name]) for name, gradient in gradients.items())
    assert not torch.equal(first, other)
    assert not torch.equal(first, evaluated)
    state = torch.get_rng_state()
    assert torch.equal(ours(**_batch(), dropout=False), evaluated)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_under_dropout_are_distributed_as_transformers(family):
    """Mean and deviation of every output number over many draws: other random numbers, the same distribution."""
    ours, theirs = _pair(family)
    features, draws = pack([[7, 8, 9, 10], [11, 12]]), 400
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack([ours.train()(**features) for _ in range(draws)])
        theirs.train()
        wanted = torch.stack([transformers_states(theirs, features) for _ in range(draws)])
    error = (samples.var(0) / draws + wanted.var(0) / draws).sqrt()
    z = (samples.mean(0) - wanted.mean(0)) / error
    assert z.square().mean() < 1.5  # 1 in expectation; 300 numbers, not independent
    assert z.abs().max() < 5
    assert (samples.std(0) / wanted.std(0)).log().abs().mean() < 0.06


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_model_equals_eager(family):
    ours, _ = _pair(family)
    features = _batch()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    wanted, hidden = ours(**features), compiled(**features)
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=1e-5)
    weights = [p for p in ours.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(hidden.square().sum(), weights, allow_unused=True)
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), weights, allow_unused=True)
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        assert (gradient is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)
