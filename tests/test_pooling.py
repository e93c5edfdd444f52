"""Pooling, dense layers and normalisation: equal to sentence-transformers' modules, saved and loaded both ways."""

from __future__ import annotations

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers.base.modules import Dense as StDense
from sentence_transformers.sentence_transformer.modules import Pooling as StPooling
from torch import Tensor

from tests.small_model import WORDS, small_model, small_tokenizer
from triton_st import SentenceTransformer
from triton_st.models.pooling import POOLING_MODES, Dense, Normalize, Pooling

LENGTHS = [3, 1, 17, 130, 2]
TEXTS = ["the boy plays", "a", " ".join(WORDS), "red ball near the old tree"]
EVERY_MODES = [*POOLING_MODES, ("mean", "max"), ("cls", "weightedmean", "lasttoken")]


def batch(dim: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Packed states [T, D], cu_seqlens [B + 1], and the same padded as sentence-transformers takes them."""
    torch.manual_seed(0)
    states = [torch.randn(n, dim).to(dtype) for n in LENGTHS]
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    cu_seqlens = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    return torch.cat(states), cu_seqlens, {"token_embeddings": padded, "attention_mask": mask.long()}


@pytest.mark.parametrize("modes", EVERY_MODES, ids=str)
@pytest.mark.parametrize("prompt_length", [0, 2])
def test_every_mode_equals_sentence_transformers(modes, prompt_length):
    hidden, cu_seqlens, features = batch()
    # A prompt is shorter than the text that it is put before.
    keep = [i for i, n in enumerate(LENGTHS) if n > prompt_length]
    theirs = StPooling(50, pooling_mode=modes, include_prompt=not prompt_length)
    expected = theirs(features | {"prompt_length": prompt_length})["sentence_embedding"]
    ours = Pooling(modes, include_prompt=not prompt_length)
    torch.testing.assert_close(ours(hidden, cu_seqlens, prompt_length)[keep], expected[keep], rtol=1e-6, atol=1e-6)
    assert ours.output_dimension(50) == expected.shape[1]
    included = Pooling(modes)(hidden, cu_seqlens, prompt_length)
    torch.testing.assert_close(included, Pooling(modes)(hidden, cu_seqlens), rtol=0, atol=0)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_gradients_equal_sentence_transformers(mode):
    hidden, cu_seqlens, features = batch()
    hidden.requires_grad_()
    features["token_embeddings"].requires_grad_()
    weight = torch.randn(len(LENGTHS), 50)
    [ours] = torch.autograd.grad((Pooling(mode)(hidden, cu_seqlens) * weight).sum(), hidden)
    theirs = StPooling(50, pooling_mode=mode)(features)["sentence_embedding"]
    [padded] = torch.autograd.grad((theirs * weight).sum(), features["token_embeddings"])
    expected = torch.cat([row[:n] for row, n in zip(padded, LENGTHS, strict=True)])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_half_precision_sums_in_float32(mode):
    hidden, cu_seqlens, _ = batch(dtype=torch.float16)
    exact = Pooling(mode)(hidden.double(), cu_seqlens)
    pooled = Pooling(mode)(hidden, cu_seqlens)
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_no_tokens(mode):
    pooled = Pooling(mode)(torch.zeros(0, 4), torch.zeros(3, dtype=torch.int32))
    assert pooled.shape == (2, 4)
    assert (pooled == (float("-inf") if mode == "max" else 0.0)).all()


@pytest.mark.parametrize("modes", ["middle", (), ("mean", "middle")])
def test_unknown_modes_are_refused(modes):
    with pytest.raises(ValueError, match="pooling_mode: expected one or more of cls, max, mean"):
        Pooling(modes)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("width", "activation"), [(50, "Tanh"), (24, "Identity"), (60, "GELU")])
def test_dense_equals_sentence_transformers(width, activation, residual):
    torch.manual_seed(0)
    kind = getattr(torch.nn, activation)
    st_dense = StDense(50, width, activation_function=kind(), use_residual=residual)
    dense = Dense(50, width, activation_function=f"{kind.__module__}.{activation}", use_residual=residual)
    dense.load_state_dict(st_dense.state_dict())
    x = torch.randn(7, 50)
    torch.testing.assert_close(dense(x), st_dense({"sentence_embedding": x})["sentence_embedding"], rtol=0, atol=0)
    assert dense(x.half()).dtype == torch.float16
    assert dense.output_dimension(50) == width


@pytest.mark.parametrize("modes", EVERY_MODES, ids=str)
def test_models_with_dense_layers_load_there_and_here(tmp_path, modes):
    encoder = small_model().encoder.eval()
    model = SentenceTransformer.from_encoder(encoder, small_tokenizer(), pooling_mode=modes)
    width = model.get_embedding_dimension()
    model.head.extend([Dense(width, 24), Dense(24, 16, bias=False, activation_function="torch.nn.ReLU"), Normalize()])
    assert model.get_embedding_dimension() == 16
    model.save_pretrained(tmp_path)
    wanted = model.encode(TEXTS)
    assert wanted.shape == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(wanted, axis=1), 1, rtol=1e-5)
    ours = SentenceTransformer(tmp_path, device="cpu")
    np.testing.assert_allclose(ours.encode(TEXTS), wanted, rtol=0, atol=1e-6)
    assert ours.pooling.modes == model.pooling.modes
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), wanted, rtol=0, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = SentenceTransformer(tmp_path / "theirs", device="cpu")
    np.testing.assert_allclose(back.encode(TEXTS), wanted, rtol=0, atol=1e-5)


def test_a_prompt_left_out_of_the_pooling(tmp_path):
    model = small_model().eval()
    model.set_pooling_include_prompt(False)
    model.prompts = {"query": "near the old "}
    model.save_pretrained(tmp_path)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    ours = SentenceTransformer(tmp_path, device="cpu")
    assert not ours.pooling.include_prompt
    wanted = theirs.encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(ours.encode(TEXTS, prompt_name="query"), wanted, rtol=0, atol=1e-5)
    assert np.abs(ours.encode(TEXTS) - wanted).max() > 1e-3
