"""The packed encoder against transformers' BertModel: outputs, gradients, checkpoints; and its inner functions."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tolerance import assert_matches_reference, assert_within_tolerance, value_and_gradients
from triton_st.models import BertModel, load_encoder, pack, save_encoder
from triton_st.models import attention as attention_module
from triton_st.models.attention import AttentionPlan, packed_attention
from triton_st.models.functional import dropout, dropout_add_layer_norm, feed_forward, keep_mask, linear

LENGTHS = [3, 1, 17, 64, 2, 18, 5, 5]
HALVES = [torch.float16, torch.bfloat16]


def _config(**changes) -> transformers.BertConfig:
    fields = {
        "vocab_size": 60,
        "hidden_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "intermediate_size": 72,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # large enough that every parameter matters
    }
    return transformers.BertConfig(**(fields | changes))


def _pair(dtype=torch.float32, **changes) -> tuple[BertModel, transformers.BertModel]:
    """Ours and transformers', with the same random weights, in evaluation mode."""
    torch.manual_seed(0)
    theirs = transformers.BertModel(_config(**changes)).to(dtype).eval()
    for parameter in theirs.parameters():  # biases and LayerNorms too
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    ours = BertModel(theirs.config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def _batch(lengths=LENGTHS, vocabulary=60, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return pack([torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths])


def _padded(features: dict, values: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch (or other values per token) padded with zeros, and its attention mask."""
    flat = features["input_ids"] if values is None else values
    lengths = features["cu_seqlens"].diff().tolist()
    padded = torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    return padded, mask


def _theirs(model: transformers.BertModel, features: dict) -> torch.Tensor:
    """transformers' last hidden states, packed [T, D]."""
    ids, mask = _padded(features)
    types = features.get("token_type_ids")
    types = None if types is None else _padded(features, types)[0]
    hidden = model(input_ids=ids, attention_mask=mask.long(), token_type_ids=types).last_hidden_state
    return hidden[mask]


def _assert_gradients(ours: torch.nn.Module, exact: torch.nn.Module) -> None:
    """The whole-model rule: the error of each parameter's gradient against float64, relative to its norm."""
    wanted = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    largest = max(grad.norm() for grad in wanted.values())
    seen = set()
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            continue
        seen.add(name)
        error = (parameter.grad.double() - wanted[name].double()).norm()
        assert error <= 1e-4 * max(wanted[name].norm(), 1e-3 * largest), f"{name}: {error:.3e}"
    assert seen == set(wanted)


# --- the whole model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [False, True])
def test_outputs_and_gradients_equal_transformers(typed):
    ours, theirs = _pair()
    features = _batch()
    if typed:
        features["token_type_ids"] = torch.arange(len(features["input_ids"])) % 2
    exact = transformers.BertModel(theirs.config).eval()
    exact.load_state_dict(theirs.state_dict())
    exact.double()
    hidden, wanted = ours(**features), _theirs(exact, features)
    torch.testing.assert_close(hidden.double(), wanted, rtol=0, atol=1e-5)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weight).sum().backward()
    (wanted * weight).sum().backward()
    _assert_gradients(ours, exact)


def test_minilm_equals_transformers_for_a_ragged_batch(minilm_folder):
    exact = transformers.BertModel.from_pretrained(minilm_folder).eval().double()
    ours = load_encoder(minilm_folder)
    features = _batch([2, 3, 9, 41, 10, 70, 3], vocabulary=30_000)
    hidden, wanted = ours(**features), _theirs(exact, features)
    lengths = features["cu_seqlens"].diff().tolist()
    pooled, wanted_pooled = (torch.stack([x.mean(0) for x in h.split(lengths)]) for h in (hidden, wanted))
    torch.testing.assert_close(pooled.double(), wanted_pooled, rtol=0, atol=1e-5)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    (pooled * weight).sum().backward()
    (wanted_pooled * weight).sum().backward()
    _assert_gradients(ours, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_activations_are_as_exact_as_a_half_model(dtype):
    ours, theirs = _pair()
    features = _batch()
    ours.activation_dtype = dtype
    with torch.no_grad():
        hidden = ours(**features)
        exact = _theirs(theirs.double(), features)
        at_dtype = _theirs(theirs.to(dtype), features)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert_within_tolerance(hidden, exact, at_dtype, "hidden")


@pytest.mark.parametrize("dtype", HALVES)
def test_half_activations_give_float32_gradients_near_the_exact_ones(dtype):
    ours, theirs = _pair()
    features = _batch()
    ours.activation_dtype = dtype
    weight = torch.randn(len(features["input_ids"]), 50, generator=torch.Generator().manual_seed(1))
    (ours(**features).float() * weight).sum().backward()
    (_theirs(theirs, features) * weight).sum().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    largest = max(grad.norm() for grad in wanted.values())
    bound = 64 * torch.finfo(dtype).eps
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            error = (parameter.grad - wanted[name]).norm()
            assert error <= bound * max(wanted[name].norm(), 1e-2 * largest), f"{name}: {error:.3e}"


def test_float64_model_runs_in_float64():
    ours, theirs = _pair(torch.float64)
    ours.activation_dtype = torch.float64
    features = _batch()
    torch.testing.assert_close(ours(**features), _theirs(theirs, features), rtol=0, atol=1e-12)


def test_a_text_is_encoded_the_same_in_any_company():
    ours, _ = _pair()
    features = _batch()
    bounds = features["cu_seqlens"].tolist()
    with torch.no_grad():
        together = ours(**features)
        for start, end in itertools.pairwise(bounds):
            alone = ours(**pack([features["input_ids"][start:end].tolist()]))
            torch.testing.assert_close(together[start:end], alone, rtol=0, atol=2e-6)


def test_nan_in_one_text_stays_there():
    ours, _ = _pair()
    with torch.no_grad():
        ours.embeddings.word_embeddings.weight[59] = float("nan")
        hidden = ours(**pack([[1, 2], [3, 59, 4], [5, 6, 7, 8]]))
    finite = hidden.isfinite().all(1)
    assert finite.tolist() == [True] * 2 + [False] * 3 + [True] * 4


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 3, 0], [4, 4, 4], [64]])
def test_odd_batches(lengths):
    ours, theirs = _pair()
    features = _batch(lengths)
    hidden = ours(**features)
    assert hidden.shape == (sum(lengths), 50)
    if sum(lengths):
        kept = pack([ids.tolist() for ids in features["input_ids"].split(lengths) if len(ids)])
        torch.testing.assert_close(hidden, _theirs(theirs, kept), rtol=0, atol=1e-5)
    hidden.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_initial_weights_have_transformers_distribution():
    torch.manual_seed(0)
    model = BertModel(_config(vocab_size=2000, initializer_range=0.02))
    words = model.embeddings.word_embeddings.weight
    assert words[0].abs().max() == 0
    assert words[1:].std().item() == pytest.approx(0.02, rel=0.02)
    layer = model.encoder.layer[0]
    assert layer.intermediate.dense.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.intermediate.dense.bias.abs().max() == 0
    assert torch.equal(layer.output.LayerNorm.weight, torch.ones(50))


@pytest.mark.filterwarnings("ignore")
def test_compiled_model_equals_eager():
    ours, _ = _pair()
    features = _batch()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    wanted, hidden = ours(**features), compiled(**features)
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(hidden.square().sum(), ours.encoder.layer[0].output.dense.weight)
    (wanted_gradient,) = torch.autograd.grad(wanted.square().sum(), ours.encoder.layer[0].output.dense.weight)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_are_refused():
    ours, _ = _pair()
    with pytest.raises(ValueError, match=r"input_ids: expected ids from 0 to 59 \(vocab_size 60\), got 60"):
        ours(**pack([[1, 60]]))
    with pytest.raises(ValueError, match=r"input_ids: expected ids from 0 to 59 .*, got -1"):
        ours(**pack([[1, -1]]))
    with pytest.raises(ValueError, match=r"token_type_ids: expected ids from 0 to 1 \(type_vocab_size 2\), got 2"):
        ours(**pack([[1, 2]]), token_type_ids=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"token_type_ids: expected shape \(2,\), got \(1,\)"):
        ours(**pack([[1, 2]]), token_type_ids=torch.tensor([0]))


def test_a_text_longer_than_the_position_table_is_refused():
    ours, _ = _pair()
    with pytest.raises(ValueError, match=r"at most 64 tokens \(max_position_embeddings\), got one of 65"):
        ours(**pack([[1] * 65]))


def test_offsets_are_checked_before_any_work():
    ours, _ = _pair()
    with pytest.raises(ValueError, match="cu_seqlens: expected to end at T = 3"):
        ours(torch.tensor([1, 2, 3]), torch.tensor([0, 2], dtype=torch.int32), 3)


def test_other_activation_dtypes_are_refused():
    ours, _ = _pair()
    ours.activation_dtype = torch.int8
    with pytest.raises(ValueError, match=r"activation_dtype: expected one of .*, got torch.int8"):
        ours(**_batch())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "config.hidden_act: expected 'gelu' .*, got 'relu'"),
        ({"is_decoder": True}, "config.is_decoder: expected False"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: expected 'absolute', got 'relative_key'",
        ),
        ({"num_attention_heads": 7}, "config.hidden_size: expected a multiple of num_attention_heads = 7, got 50"),
    ],
)
def test_configs_that_are_not_served_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BertModel(_config(**changes))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_saved_checkpoint_is_transformers_own(tmp_path):
    ours, theirs = _pair()
    save_encoder(ours, tmp_path / "model")
    loaded, report = transformers.BertModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    assert config["model_type"] == "bert"
    assert config["dtype"] == "float32"


def test_transformers_checkpoint_loads_and_trains(tmp_path):
    ours, theirs = _pair()
    theirs.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    assert not loaded.training
    assert loaded.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(loaded(**_batch()), ours(**_batch()), rtol=0, atol=0)
    loaded.train()(**_batch()).sum().backward()
    assert loaded.encoder.layer[0].output.dense.weight.grad is not None


def _variant(state: dict, kind: str) -> dict:
    if kind == "prefixed, with a head":
        return {f"bert.{name}": t for name, t in state.items()} | {"cls.predictions.bias": torch.zeros(60)}
    if kind == "old LayerNorm names":
        return {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in state.items()}
    if kind == "position buffer":
        return state | {"embeddings.position_ids": torch.arange(64)[None]}
    if kind == "half":
        return {name: t.half() for name, t in state.items()}
    return {name: t for name, t in state.items() if not name.startswith("pooler")}


@pytest.mark.parametrize(
    "kind", ["prefixed, with a head", "old LayerNorm names", "position buffer", "half", "no pooler"]
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_checkpoint_variants(tmp_path, kind, file):
    ours, _ = _pair()
    save_encoder(ours, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = _variant(ours.state_dict(), kind)
    save = safetensors.torch.save_file if file.endswith("safetensors") else torch.save
    save(state, tmp_path / file)
    loaded = load_encoder(tmp_path)
    assert (loaded.pooler is None) == (kind == "no pooler")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, ours.state_dict()[name], rtol=1e-3 if kind == "half" else 0, atol=1e-6)


def test_sharded_checkpoint(tmp_path):
    ours, theirs = _pair()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(load_encoder(tmp_path)(**_batch()), ours(**_batch()))
    shard = next(tmp_path.glob("model-00002*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"missing weights file: .*{shard.name}"):
        load_encoder(tmp_path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such model folder: .*absent"):
        load_encoder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"is no model folder: it has no config.json"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"config.json: not a JSON file"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="model type 't5' is not served; served: bert"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(_config().to_json_string())
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable weights file"):
        load_encoder(tmp_path)


def test_weights_that_do_not_fit_the_config_are_named(tmp_path):
    ours, _ = _pair()
    save_encoder(ours, tmp_path)
    (tmp_path / "config.json").write_text(_config(num_hidden_layers=3).to_json_string())
    with pytest.raises(ValueError, match=r"(?s)weights do not fit config.json: .*encoder.layer.2"):
        load_encoder(tmp_path)


def test_weights_survive_their_file_being_written_again(tmp_path):
    ours, _ = _pair()
    save_encoder(ours, tmp_path)
    loaded = load_encoder(tmp_path)
    before = loaded.embeddings.word_embeddings.weight.clone()
    with torch.no_grad():
        ours.embeddings.word_embeddings.weight.zero_()
    save_encoder(ours, tmp_path)
    assert torch.equal(loaded.embeddings.word_embeddings.weight, before)


# --- inner functions --------------------------------------------------------------------------------------------------


def _reference_linear(x, weight, bias):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), bias.to(wide)).to(x.dtype)


def _reference_feed_forward(x, w1, b1, w2, b2):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(F.gelu(F.linear(x.to(wide), w1.to(wide), b1.to(wide))), w2.to(wide), b2.to(wide)).to(x.dtype)


def _reference_add_layer_norm(x, residual, weight, bias):
    wide = torch.promote_types(residual.dtype, torch.float32)
    total = x.to(wide) + residual.to(wide)
    return F.layer_norm(total, weight.shape, weight.to(wide), bias.to(wide), 1e-12).to(residual.dtype)


def _add_layer_norm(x, residual, weight, bias):
    return dropout_add_layer_norm(x, residual, weight, bias, 1e-12)


def _assert_function(function, reference, inputs, dtype):
    """The tolerance rule; for half storage its forward, and each gradient to a few roundings of that storage.

    What is kept for backward is rounded to half, which the float32 gradient of a parameter shows.
    """
    if dtype == torch.float32:
        assert_matches_reference(function, reference, inputs)
        return
    wide = [x.double() for x in inputs]
    exact = reference(*wide)
    assert_within_tolerance(function(*inputs), exact, reference(*inputs), "result")
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    _, grads = value_and_gradients(function, inputs, grad)
    _, exact_grads = value_and_gradients(reference, wide, grad)
    for x, actual, wanted in zip(inputs, grads, exact_grads, strict=True):
        assert actual.dtype == x.dtype
        assert (actual.double() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("tokens", "k", "n"), [(1, 50, 150), (37, 7, 1), (200, 384, 400)])
def test_linear(dtype, tokens, k, n):
    torch.manual_seed(0)
    inputs = [torch.randn(tokens, k).to(dtype), torch.randn(n, k) * k**-0.5, torch.randn(n)]
    _assert_function(linear, _reference_linear, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_feed_forward(dtype):
    torch.manual_seed(0)
    shapes = [(37, 50), (200, 50), (200,), (50, 200), (50,)]
    x, *parameters = (torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1) for shape in shapes)
    inputs = [x.to(dtype), *parameters]
    _assert_function(feed_forward, _reference_feed_forward, inputs, dtype)
    with torch.no_grad():  # the path without a backward
        assert_within_tolerance(
            feed_forward(*inputs),
            _reference_feed_forward(*(t.double() for t in inputs)),
            _reference_feed_forward(*inputs),
            "inference",
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_add_layer_norm(dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(9, 50), torch.randn(9, 50).to(dtype), torch.randn(50), torch.randn(50)]
    _assert_function(_add_layer_norm, _reference_add_layer_norm, inputs, dtype)


def test_gradients_with_dropout_are_those_of_the_drawn_mask():
    torch.manual_seed(0)
    plan = AttentionPlan.build([3, 0, 2], torch.device("cpu"))
    qkv = torch.randn(5, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    x, residual = torch.randn(2, 5, 8, dtype=torch.float64).unbind()
    x.requires_grad_()
    residual.requires_grad_()
    weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def seeded(function):
        def run(*args):
            torch.manual_seed(5)
            return function(*args)

        return run

    assert torch.autograd.gradcheck(seeded(lambda t: packed_attention(t, plan, 0.3)), (qkv,))
    assert torch.autograd.gradcheck(seeded(lambda t: dropout(t, 0.3)), (x,))
    add_norm = seeded(lambda *args: dropout_add_layer_norm(*args, 1e-5, 0.3))
    assert torch.autograd.gradcheck(add_norm, (x, residual, weight, bias))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_mask_has_its_rate_and_keeps_the_mean(p):
    torch.manual_seed(0)
    mask, factor = keep_mask((1000, 1001), p, torch.device("cpu"))
    assert mask.double().mean().item() == pytest.approx(1 - p, abs=0.002)
    assert mask.double().mean(0).std() < 0.03  # no column is special: every one of a word's 16-bit parts is used
    if p < 1:
        assert factor == pytest.approx(1 / (1 - p), rel=1e-4)
    dropped = dropout(torch.ones(1000, 1001), p)
    assert dropped.mean().item() == pytest.approx(0.0 if p == 1 else 1.0, abs=0.005)


def test_dropout_follows_the_seed_and_the_mode():
    ours, _ = _pair()
    features = _batch()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(ours.train()(**features))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(ours.eval()(**features), ours(**features))


@given(st.lists(st.integers(0, 40), max_size=12))
@settings(max_examples=50, deadline=None)
def test_attention_plan_covers_every_token_once(lengths):
    plan = AttentionPlan.build(lengths, torch.device("cpu"))
    total = sum(lengths)
    assert plan.restore.shape == (total,)
    if total:
        laid = torch.cat([bucket.index for bucket in plan.buckets])
        assert torch.equal(laid[plan.restore], torch.arange(total))
        assert int((laid == total).sum()) == len(laid) - total  # the rest is padding
    for bucket in plan.buckets:
        real = bucket.index.view(bucket.rows, bucket.length) < total
        assert bool(real[:, 0].all())
        bias = torch.zeros(real.shape) if bucket.key_bias is None else bucket.key_bias[:, 0, 0]
        assert torch.equal(bias == 0, real)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(0, 2000))
@settings(max_examples=60, deadline=None)
def test_buckets_have_least_cost(lengths, bucket_cost):
    lengths = sorted(lengths)

    def cost(runs):
        return sum((end - start) * lengths[end - 1] ** 2 + bucket_cost for start, end in runs)

    def all_cuts():
        n = len(lengths)
        for bits in itertools.product([0, 1], repeat=n - 1):
            ends = [i + 1 for i, bit in enumerate(bits) if bit] + [n]
            yield list(itertools.pairwise([0, *ends]))

    previous = attention_module._BUCKET_COST
    attention_module._BUCKET_COST = bucket_cost
    try:
        runs = attention_module._cut(np.array(lengths))
    finally:
        attention_module._BUCKET_COST = previous
    assert cost(runs) == min(cost(cuts) for cuts in all_cuts())
    assert [i for start, end in runs for i in range(start, end)] == list(range(len(lengths)))
