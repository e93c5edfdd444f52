"""The CPU inference engine: parity with the model's own path, batch invariance, pooling, repacking, bad input."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from lesser import lesser_forms
from serving import threads
from small_model import bert_config, random_batch
from test_extension import finish, start

from triton_st import backend
from triton_st.engine import DTYPES, Engine
from triton_st.models import BertModel, DistilBertModel, MPNetModel, RobertaModel, pack
from triton_st.models.pooling import POOLING_MODES, Pooling

every_precision = pytest.mark.parametrize("dtype", DTYPES)

# Least cosine of an embedding to the model's own in float32.
CLOSE = {"float32": 1 - 1e-6, "float16": 1 - 1e-5, "bfloat16": 1 - 1e-3, "int8": 1 - 5e-3}


def perturbed(encoder):
    """In evaluation mode, with no parameter left at its initial 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return encoder.eval()


def bert(**changes) -> BertModel:
    torch.manual_seed(0)
    return perturbed(BertModel(bert_config(**changes)))


def hidden_states(encoder, batch) -> torch.Tensor:
    with backend.use("reference"), torch.inference_mode():
        return encoder(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"], batch.get("token_type_ids"))


def assert_close_states(encoder, batch, dtype: str) -> None:
    expected = hidden_states(encoder, batch)
    actual = Engine(encoder, dtype).states(batch["input_ids"], batch["cu_seqlens"], batch.get("token_type_ids"))
    assert actual.shape == expected.shape
    if len(expected) == 0:
        return
    if dtype == "float32":
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    cosine = torch.cosine_similarity(actual, expected)
    assert cosine.min() >= CLOSE[dtype], cosine.min()


# --- parity ---


@every_precision
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_size": 7, "num_attention_heads": 7, "intermediate_size": 5},
        {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 33},
        {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "num_hidden_layers": 1},
        {"hidden_size": 48, "num_attention_heads": 1, "num_hidden_layers": 1},
        {"hidden_size": 200, "num_attention_heads": 2, "intermediate_size": 900, "num_hidden_layers": 1},
        {"num_hidden_layers": 0},
    ],
    ids=lambda sizes: ",".join(map(str, sizes.values())) or "small",
)
def test_states_are_the_model_s(dtype: str, sizes: dict) -> None:
    assert_close_states(bert(**sizes), random_batch(), dtype)


@every_precision
@pytest.mark.parametrize("lengths", [[], [0], [0, 3, 0], [1], [512], [512, 1, 300], [33] * 20])
def test_ragged_batches(dtype: str, lengths: list[int]) -> None:
    assert_close_states(bert(max_position_embeddings=512, num_hidden_layers=1), random_batch(lengths), dtype)


@every_precision
def test_token_types(dtype: str) -> None:
    batch = random_batch()
    batch["token_type_ids"] = torch.arange(len(batch["input_ids"])) % 2
    assert_close_states(bert(), batch, dtype)


FAMILIES = {
    "roberta": (RobertaModel, transformers.RobertaConfig, {"pad_token_id": 1}),
    "distilbert": (
        DistilBertModel,
        transformers.DistilBertConfig,
        {"dim": 50, "n_heads": 5, "hidden_dim": 72, "n_layers": 2},
    ),
    "mpnet": (MPNetModel, transformers.MPNetConfig, {}),
}


@every_precision
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, dtype: str) -> None:
    model, config, changes = FAMILIES[family]
    fields = {"vocab_size": 60, "max_position_embeddings": 200, "initializer_range": 0.2}
    if family != "distilbert":
        fields |= {"hidden_size": 50, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 72}
    torch.manual_seed(0)
    assert_close_states(perturbed(model(config(**fields, **changes))), random_batch([3, 1, 150, 40]), dtype)


def test_no_reading_past_the_position_table() -> None:
    """Positions and word rows at the very end of their tables."""
    encoder = bert(max_position_embeddings=17, vocab_size=5)
    assert_close_states(encoder, pack([[4] * 17, [4]]), "float32")


# --- invariance ---


@every_precision
@pytest.mark.parametrize(("hidden", "intermediate"), [(50, 72), (64, 800)])
def test_a_text_s_bits_do_not_depend_on_its_batch(dtype: str, hidden: int, intermediate: int) -> None:
    """Alone, in a batch that threads share, in one that is cut into runs, at any place, on one thread or two."""
    encoder = bert(
        hidden_size=hidden,
        num_attention_heads=hidden // 10 if hidden == 50 else 2,
        intermediate_size=intermediate,
        max_position_embeddings=128,
    )
    engine = Engine(encoder, dtype)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 128, (70,), generator=generator).tolist()
    lists = [torch.randint(1, 60, (n,), generator=generator).tolist() for n in lengths]

    def embedded(chosen: list[int], count: int) -> torch.Tensor:
        batch = pack([lists[i] for i in chosen])
        with threads(count):
            return engine.embed(batch["input_ids"], batch["cu_seqlens"], normalize=True)

    everything = list(range(len(lists)))
    expected = embedded(everything, 2)
    assert torch.equal(embedded(everything, 1), expected)
    assert torch.equal(embedded(everything, 3), expected)
    assert torch.equal(embedded(everything[::-1], 2).flip(0), expected)
    for i in (0, 33, 69):
        for count in (1, 2, 3):
            assert torch.equal(embedded([i], count)[0], expected[i])
    assert torch.equal(embedded([5, 6, 7], 2), expected[5:8])


# --- pooling ---


@pytest.mark.parametrize("prompt_length", [0, 2])
@pytest.mark.parametrize("modes", [*[(mode,) for mode in POOLING_MODES], ("mean", "cls"), POOLING_MODES])
def test_pooling_is_the_model_s(modes: tuple[str, ...], prompt_length: int) -> None:
    encoder, batch = bert(), random_batch([3, 5, 17, 64, 4])
    pooling = Pooling(modes, include_prompt=not prompt_length)
    expected = pooling(hidden_states(encoder, batch), batch["cu_seqlens"], prompt_length)
    engine = Engine(encoder)
    arguments = {"pooling": modes, "prompt_length": prompt_length}
    actual = engine.embed(batch["input_ids"], batch["cu_seqlens"], **arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    unit = engine.embed(batch["input_ids"], batch["cu_seqlens"], normalize=True, **arguments)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(expected), rtol=0, atol=1e-5)
    cut = engine.embed(batch["input_ids"], batch["cu_seqlens"], normalize=True, truncate_dim=9, **arguments)
    assert torch.equal(cut, unit[:, :9])


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooling_of_nothing_and_of_a_prompt_alone(mode: str) -> None:
    encoder, batch = bert(), random_batch([0, 3, 2])
    expected = Pooling(mode, include_prompt=False)(hidden_states(encoder, batch), batch["cu_seqlens"], 2)
    actual = Engine(encoder).embed(batch["input_ids"], batch["cu_seqlens"], pooling=mode, prompt_length=2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


# --- weights ---


def test_changed_parameters_are_packed_again() -> None:
    encoder, batch = bert(), random_batch()
    engine = Engine(encoder)
    before = engine.states(batch["input_ids"], batch["cu_seqlens"])
    assert torch.equal(engine.states(batch["input_ids"], batch["cu_seqlens"]), before)
    with torch.no_grad():
        encoder.encoder.layer[1].output.dense.weight.mul_(1.5)
    written = engine.states(batch["input_ids"], batch["cu_seqlens"])
    assert not torch.equal(written, before)
    torch.testing.assert_close(written, hidden_states(encoder, batch), rtol=0, atol=2e-5)
    encoder.load_state_dict(bert().state_dict(), assign=True)
    assert torch.equal(engine.states(batch["input_ids"], batch["cu_seqlens"]), before)
    encoder.embeddings.LayerNorm.bias = torch.nn.Parameter(torch.ones(50))
    replaced = engine.states(batch["input_ids"], batch["cu_seqlens"])
    torch.testing.assert_close(replaced, hidden_states(encoder, batch), rtol=0, atol=2e-5)


def test_replaced_modules_are_packed_again() -> None:
    encoder, batch = bert(), random_batch()
    engine = Engine(encoder)
    for name in ("embeddings.word_embeddings", "encoder.layer.1.output.dense", "encoder.layer.0"):
        before = engine.states(batch["input_ids"], batch["cu_seqlens"])
        owner, _, attribute = name.rpartition(".")
        other = copy.deepcopy(encoder.get_submodule(name))
        for parameter in other.parameters():
            parameter.data.mul_(1.5)
        setattr(encoder.get_submodule(owner), attribute, other)
        after = engine.states(batch["input_ids"], batch["cu_seqlens"])
        assert not torch.equal(after, before), name
        torch.testing.assert_close(after, hidden_states(encoder, batch), rtol=0, atol=2e-5)


def test_a_parametrized_weight_is_packed_again() -> None:
    encoder, batch = bert(), random_batch()
    engine = Engine(encoder)
    before = engine.states(batch["input_ids"], batch["cu_seqlens"])
    dense = encoder.encoder.layer[0].output.dense
    torch.nn.utils.parametrizations.weight_norm(dense)
    unchanged = engine.states(batch["input_ids"], batch["cu_seqlens"])
    torch.testing.assert_close(unchanged, before, rtol=0, atol=2e-5)
    with torch.no_grad():
        dense.parametrizations.weight.original0.mul_(3)
    after = engine.states(batch["input_ids"], batch["cu_seqlens"])
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, hidden_states(encoder, batch), rtol=0, atol=2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_autograd_does_not_see(fused: bool) -> None:
    encoder, batch = bert(), random_batch()
    engine = Engine(encoder)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.01, fused=fused)
    for _ in range(2):
        before = engine.states(batch["input_ids"], batch["cu_seqlens"])
        for parameter in encoder.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        after = engine.states(batch["input_ids"], batch["cu_seqlens"])
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, hidden_states(encoder, batch), rtol=0, atol=2e-5)


def test_writing_through_data_is_seen() -> None:
    encoder, batch = bert(), random_batch()
    engine = Engine(encoder)
    engine.states(batch["input_ids"], batch["cu_seqlens"])
    encoder.encoder.layer[0].output.dense.weight.data.mul_(1.5)
    after = engine.states(batch["input_ids"], batch["cu_seqlens"])
    torch.testing.assert_close(after, hidden_states(encoder, batch), rtol=0, atol=2e-5)


def test_memory_that_moves_under_the_parameters() -> None:
    """Shared between processes, a storage gets other memory; what it had is gone."""
    encoder, batch = bert(vocab_size=60_000), random_batch()  # large enough to be unmapped
    engine = Engine(encoder)
    before = engine.states(batch["input_ids"], batch["cu_seqlens"])
    encoder.share_memory()
    assert torch.equal(engine.states(batch["input_ids"], batch["cu_seqlens"]), before)


def test_copies_pack_for_themselves() -> None:
    batch = random_batch()
    engine = Engine(bert(), "int8")
    expected = engine.states(batch["input_ids"], batch["cu_seqlens"])
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other.dtype == "int8"
        assert other.encoder is not engine.encoder
        assert torch.equal(other.states(batch["input_ids"], batch["cu_seqlens"]), expected)


@every_precision
@pytest.mark.parametrize("factor", [1e6, 1e10])
def test_enormous_scores_stay_finite(dtype: str, factor: float) -> None:
    encoder, batch = bert(), random_batch()
    with torch.no_grad():
        encoder.encoder.layer[0].attention.self.query.weight.mul_(factor)
    assert Engine(encoder, dtype).embed(batch["input_ids"], batch["cu_seqlens"]).isfinite().all()


@every_precision
def test_autocast_of_the_caller_changes_nothing(dtype: str) -> None:
    batch = random_batch()
    expected = Engine(bert(), dtype).embed(batch["input_ids"], batch["cu_seqlens"])
    with torch.autocast("cpu", torch.bfloat16):
        actual = Engine(bert(), dtype).embed(batch["input_ids"], batch["cu_seqlens"])
    assert torch.equal(actual, expected)


@every_precision
def test_enormous_hidden_activations_stay_finite(dtype: str) -> None:
    encoder, batch = bert(), random_batch()
    with torch.no_grad():
        encoder.encoder.layer[0].intermediate.dense.weight.mul_(1e22)
        encoder.encoder.layer[0].output.dense.weight.mul_(1e-22)
    assert Engine(encoder, dtype).embed(batch["input_ids"], batch["cu_seqlens"]).isfinite().all()


@every_precision
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(dtype: str, bad: float) -> None:
    encoder = bert()
    with torch.no_grad():
        encoder.encoder.layer[0].intermediate.dense.weight[3, 4] = bad
    batch = random_batch([5])
    assert Engine(encoder, dtype).embed(batch["input_ids"], batch["cu_seqlens"]).isnan().all()


@every_precision
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_word_that_is_not_finite_stays_in_its_texts(dtype: str, bad: float) -> None:
    """One row of the table spoils the texts that hold it; the others keep their bits."""
    lists = [[3, 4, 5], [7], [3, 9, 4], [5] * 40, [9], [4, 4]]
    batch = pack(lists)
    embedded = []
    for value in (0.5, bad):
        encoder = bert()
        with torch.no_grad():
            encoder.embeddings.word_embeddings.weight[9] = value
        embedded.append(Engine(encoder, dtype).embed(batch["input_ids"], batch["cu_seqlens"]))
    holds = torch.tensor([9 in ids for ids in lists])
    assert embedded[1][~holds].isfinite().all()
    if bad != 3e38:
        assert embedded[1][holds].isnan().all()
    scaled = torch.ops.triton_st_cpp.encoder_scales_rows(DTYPES.index(dtype))  # weights, by what random words do
    if not scaled:
        assert torch.equal(embedded[1][~holds], embedded[0][~holds])
    assert torch.cosine_similarity(embedded[1][~holds], embedded[0][~holds]).min() >= CLOSE[dtype]


class Adapted(torch.nn.Module):
    """A layer with something added to it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1


class Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Named(torch.nn.Linear):
    """Computes as any other."""


@pytest.mark.parametrize(
    ("where", "made", "message"),
    [
        ("encoder.layer.0.output.dense", Adapted, "a torch.nn.Linear with nothing about it, got a Adapted"),
        ("encoder.layer.1.attention.self.key", lambda _: Doubled(50, 50), "got a Doubled with a forward of its own"),
        ("encoder.layer.1.output.LayerNorm", Adapted, "a torch.nn.LayerNorm with nothing about it, got a Adapted"),
        ("embeddings.word_embeddings", Adapted, "a torch.nn.Embedding with nothing about it, got a Adapted"),
        ("encoder.layer.0.output.dense", lambda _: torch.nn.Linear(72, 50, bias=False), "got one without a bias"),
        ("encoder.layer.0.intermediate.dense", "hook", "got one with forward hooks, which would not be called"),
        ("encoder.layer.0.intermediate.dense", "forward", "got a Linear with a forward of its own"),
    ],
)
def test_wrapped_modules_are_refused(where: str, made: object, message: str) -> None:
    """Their parameters alone would give other numbers, in silence."""
    encoder, batch = bert(), random_batch()
    engine = Engine(encoder)
    engine.embed(batch["input_ids"], batch["cu_seqlens"])
    module = encoder.get_submodule(where)
    if made == "hook":
        module.register_forward_hook(lambda module, inputs, output: output + 1)
        engine = Engine(encoder)
    elif made == "forward":
        module.forward = lambda x: x  # as some libraries shadow it
        engine = Engine(encoder)
    else:
        encoder.set_submodule(where, made(module))
    with pytest.raises(TypeError, match=message):
        engine.embed(batch["input_ids"], batch["cu_seqlens"])
    with pytest.raises(TypeError, match=message):
        encoder(**batch)


def test_a_subclass_that_computes_the_same_is_served() -> None:
    encoder, batch = bert(), random_batch()
    engine = Engine(encoder)
    before = engine.embed(batch["input_ids"], batch["cu_seqlens"])
    dense = encoder.encoder.layer[0].output.dense
    dense.__class__ = Named
    assert torch.equal(engine.embed(batch["input_ids"], batch["cu_seqlens"]), before)


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], [0, 1]), TypeError, "input_ids: expected int64, got torch.float32"),
        (([[1]], [0, 1]), ValueError, "input_ids: expected a flat run of tokens"),
        (([1, 2], [0, 1]), ValueError, "cu_seqlens: expected to end at T = 2"),
        (([1, 2], [0, 2, 1, 2]), ValueError, "cu_seqlens: expected ascending"),
        (([1, 2], []), ValueError, r"cu_seqlens: expected shape \[B\+1\]"),
        (([1] * 65, [0, 65]), ValueError, "at most 64 tokens .*, got one of 65"),
        (([60], [0, 1]), ValueError, "input_ids: expected ids from 0 to 59 .*, got 60"),
        (([-1], [0, 1]), ValueError, "input_ids: expected ids from 0 to 59 .*, got -1"),
        (([1], [0, 1], [2]), ValueError, "token_type_ids: expected ids from 0 to 1"),
        (([1], [0, 1], [0, 0]), ValueError, "token_type_ids: expected shape"),
        (([1], [0, 1], [0.5]), TypeError, "token_type_ids: expected int64, got torch.float32"),
    ],
)
def test_bad_batches(arguments: tuple, error: type[Exception], message: str) -> None:
    """The engine's words are the model's own."""
    tensors = [torch.tensor(x) if x else torch.zeros(0, dtype=torch.int64) for x in arguments]
    encoder = bert()
    with pytest.raises(error, match=message):
        Engine(encoder).embed(*tensors)
    with pytest.raises(error, match=message):
        encoder(*tensors[:2], 100, *tensors[2:])
    with pytest.raises(TypeError, match="input_ids: expected int64, got list"):
        Engine(encoder).embed([1], torch.tensor([0, 1]))  # type: ignore[arg-type]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="dtype: expected one of float32, float16, bfloat16, int8, got 'int4'"):
        Engine(bert(), "int4")
    with pytest.raises(TypeError, match="encoder: expected a triton_st"):
        Engine(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    batch = random_batch()
    with pytest.raises(ValueError, match="pooling: expected one or more"):
        Engine(bert()).embed(batch["input_ids"], batch["cu_seqlens"], pooling="middle")
    with pytest.raises(RuntimeError, match="packs float32 parameters"):
        Engine(bert().double()).embed(batch["input_ids"], batch["cu_seqlens"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_without_a_token(dtype: str) -> None:
    ids, offsets = torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0, 0])
    for number in (1, 2):
        with threads(number):
            embeddings = Engine(bert(), dtype).embed(ids, offsets, normalize=True)
        assert embeddings.shape == (2, bert().config.hidden_size)
        assert not embeddings.any()


# --- instruction sets ---

PARITY = """
import sys
sys.path.insert(0, {tests!r})
from triton_st import extension
sources = [path for path in extension.sources() if path.suffix == ".h" or path.stem in ("encoder", "bias_gelu")]
extension.sources = lambda: sources  # the other operators have forms of their own to test
import test_engine as t
for dtype in t.DTYPES:
    for sizes in ({{}}, {{"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 33}}):
        t.assert_close_states(t.bert(**sizes), t.random_batch(), dtype)
    t.test_families("mpnet", dtype)
    t.test_a_text_s_bits_do_not_depend_on_its_batch(dtype, 50, 72)
    t.test_what_is_not_finite_is_not_hidden(dtype, float("nan"))
import test_engine_accuracy as accuracy
for change in accuracy.EXTREMES:
    accuracy.test_sums_of_int8_hold_what_is_as_large_as_it_gets(change)
"""


def test_forms_for_lesser_processors(tmp_path: Path) -> None:
    """No AMX, AVX-512 without bf16 and int8 products, AVX2 with int8 products and without, portable."""
    code = PARITY.format(tests=str(Path(__file__).parent))
    forms = lesser_forms("x86-64-v4", "alderlake", "x86-64-v3", "x86-64")
    for process in [start(code, tmp_path, TRITON_ST_CXXFLAGS=flags) for flags in forms]:
        finish(process)
