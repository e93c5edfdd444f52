"""A live sentence-transformers model on our kernels: same numbers, same object, and back again bit for bit."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import sentence_transformers
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer import losses

import triton_st
from tests.small_model import WORDS, small_model

TEXTS = ["A boy plays in the grass.", "", "Rain.", "The grass is where a boy is playing, says a longer sentence."]


@pytest.fixture
def minilm(minilm_folder) -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(minilm_folder), device="cpu")


@pytest.fixture
def small(tmp_path) -> sentence_transformers.SentenceTransformer:
    small_model().eval().save_pretrained(tmp_path)
    return sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")


def test_encode_and_back(minilm):
    before = minilm.encode(TEXTS)
    own_method = minilm.encode
    handle = triton_st.accelerate(minilm)
    assert handle.active
    assert type(minilm) is sentence_transformers.SentenceTransformer
    assert triton_st.accelerate(minilm) is handle
    assert minilm.encode != own_method
    np.testing.assert_allclose(minilm.encode(TEXTS), before, rtol=0, atol=1e-5)
    np.testing.assert_allclose(minilm.encode_query(TEXTS), before, rtol=0, atol=1e-5)
    assert minilm.encode("Rain.", convert_to_tensor=True).shape == (384,)
    handle.restore()
    handle.restore()
    assert not handle.active
    assert minilm.encode == own_method
    np.testing.assert_array_equal(minilm.encode(TEXTS), before)
    with triton_st.accelerate(minilm):
        assert minilm.encode != own_method
    assert minilm.encode == own_method


def test_settings_follow_the_model(minilm):
    plain = copy.deepcopy(minilm)
    triton_st.accelerate(minilm)
    for model in (minilm, plain):
        model.max_seq_length = 6
        model.prompts["query"] = "asked: "
        model.truncate_dim = 100
    expected = plain.encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(minilm.encode(TEXTS, prompt_name="query"), expected, rtol=0, atol=1e-5)


def test_parameters_follow_the_model(minilm):
    """Changed in place, loaded, or replaced by other tensors."""
    plain = copy.deepcopy(minilm)
    triton_st.accelerate(minilm)
    first = minilm.encode(TEXTS)
    for change in (
        lambda model: model[0].model.embeddings.word_embeddings.weight.data.mul_(1.5),
        lambda model: model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}),
        lambda model: setattr(
            model[0].model.encoder.layer[0].output.dense, "weight", torch.nn.Parameter(torch.full((384, 1536), 0.01))
        ),
    ):
        for model in (minilm, plain):
            with torch.no_grad():
                change(model)
        now = minilm.encode(TEXTS)
        assert np.abs(now - first).max() > 1e-3
        np.testing.assert_allclose(now, plain.encode(TEXTS), rtol=0, atol=1e-5)
        first = now


def test_gradients(small):
    """Sentence-transformers' own forward and ours, through its own loss, in the model's own parameters."""
    plain = copy.deepcopy(small)
    triton_st.accelerate(small)
    columns = [["the boy plays", "a red ball"], ["the boy runs", "a ball"], ["a cat sleeps near the old tree", "dog"]]
    found = []
    for model in (plain, small):
        model.train()
        features = [model.preprocess(column) for column in columns]
        loss = losses.MultipleNegativesRankingLoss(model)(features, torch.tensor([]))
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (expected, expected_grads), (actual, grads) = found
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert expected_grads.keys() == grads.keys()
    for name, grad in expected_grads.items():
        if grad is None:
            assert grads[name] is None, name
        else:
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max() + 1))


def test_its_own_trainer_trains_it(small, tmp_path):
    rows = [f"the {a} {b}" for a in WORDS[:8] for b in WORDS[8:16]]
    data = Dataset.from_dict({"anchor": rows, "positive": [row[::-1] for row in rows]})
    plain = copy.deepcopy(small)
    triton_st.accelerate(small)
    curves = []
    for model in (plain, small):
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"), per_device_train_batch_size=16, max_steps=6, learning_rate=1e-3,
            logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, seed=1,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model)
        )
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    assert curves[0][-1] != curves[0][0]
    np.testing.assert_allclose(small.encode(rows), plain.encode(rows), rtol=0, atol=1e-3)


def test_copies_and_pickles(small):
    handle = triton_st.accelerate(small)
    wanted = small.encode(TEXTS)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        np.testing.assert_array_equal(other.encode(TEXTS), wanted)
        with torch.no_grad():
            next(other.parameters()).mul_(2)
        assert np.abs(other.encode(TEXTS) - wanted).max() > 1e-3
    np.testing.assert_array_equal(small.encode(TEXTS), wanted)
    handle.restore()
    pickle.dumps(small)


def test_dense_modules_are_shared(small):
    small.append(Dense(50, 8))
    plain = copy.deepcopy(small)
    assert triton_st.accelerate(small).active
    for model in (small, plain):
        torch.manual_seed(0)
        torch.nn.init.normal_(model[2].linear.weight)
    np.testing.assert_allclose(small.encode(TEXTS), plain.encode(TEXTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["half", "modules", "family"])
def test_models_that_are_not_served_are_left_alone(small, caplog, change):
    if change == "half":
        small.bfloat16()
        reason = "its parameters are torch.bfloat16"
    elif change == "modules":
        small.append(torch.nn.Dropout())
        reason = "its modules are Transformer, Pooling, Dropout"
    else:
        small[0].model.config.model_type = "electra"
        reason = "model type 'electra' is not served"
    before = dict(small.__dict__)
    assert not triton_st.accelerate(small).active
    assert reason in caplog.text
    assert small.__dict__ == before
    with pytest.raises(TypeError, match=r"model: expected a sentence_transformers.SentenceTransformer, got Linear"):
        triton_st.accelerate(torch.nn.Linear(2, 2))


class Doubled(torch.nn.Linear):
    """Has the parameters of any other."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("subclass", "its encoder.layer.1.output.dense is a Doubled"),
        ("hook", "its encoder.layer.1.output.dense has forward hooks"),
        ("forward", "its encoder.layer.1.output.dense has a forward of its own"),
        ("adapter", "its encoder.layer.1.output.dense is a Adapter"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_with_something_about_them_compute_what_they_did(small, caplog, change, reason, when):
    """An adapter, merged by nobody: its parameters alone would give other numbers."""
    plain = copy.deepcopy(small)
    if when == "after":
        assert triton_st.accelerate(small).active
    for model in (small, plain):
        output = model[0].model.encoder.layer[1].output
        if change == "subclass":
            output.dense.__class__ = Doubled
        elif change == "hook":
            output.dense.register_forward_hook(lambda module, inputs, result: 2 * result)
        elif change == "forward":
            own = output.dense.forward
            output.dense.forward = lambda x, own=own: 2 * own(x)
        else:
            output.dense = Adapter(output.dense)
    assert triton_st.accelerate(small).active == (when == "after")
    np.testing.assert_array_equal(small.encode(WORDS), plain.encode(WORDS))
    assert reason in caplog.text


class Adapter(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down, self.up = torch.nn.Linear(72, 2, bias=False), torch.nn.Linear(2, 50, bias=False)
        for module in (self.down, self.up):
            torch.nn.init.constant_(module.weight, 0.1)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


SWITCHED_OFF = """
import sentence_transformers, sys, torch, triton_st
model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
handle = triton_st.accelerate(model)
print(handle.active, "encode" in model.__dict__, triton_st.backend.select(torch.zeros(1)))
handle.restore()
"""


def test_the_kill_switch(small, tmp_path):
    environment = {**os.environ, "TRITON_ST_DISABLE": "1", "TRITON_ST_BACKEND": "cpp"}
    command = [sys.executable, "-c", SWITCHED_OFF, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["False", "False", "reference"]


def test_a_model_that_trains_after_it_encoded_drops_out(tmp_path):
    small_model(hidden_dropout_prob=0.5).eval().save_pretrained(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    triton_st.accelerate(model)
    expected = model.encode(WORDS)
    model.train()
    features = model.tokenize(WORDS)
    first, second = (model(dict(features))["sentence_embedding"] for _ in range(2))
    assert not torch.equal(first, second)
    np.testing.assert_array_equal(model.encode(WORDS), expected)
    assert not model.training
    torch.testing.assert_close(
        model(dict(features))["sentence_embedding"].detach().numpy(), expected, rtol=0, atol=1e-5
    )


def test_what_can_no_longer_be_served_runs_as_it_did(small, caplog):
    plain = copy.deepcopy(small)
    handle = triton_st.accelerate(small)
    expected = small.encode(WORDS)
    small.double()
    np.testing.assert_array_equal(small.encode(WORDS), plain.double().encode(WORDS))
    assert "no longer all torch.float32" in caplog.text
    features = small.tokenize(WORDS)
    actual = small(dict(features))["sentence_embedding"]
    assert torch.equal(actual, plain(dict(features))["sentence_embedding"])
    small.float()
    np.testing.assert_array_equal(small.encode(WORDS), expected)
    assert handle.active


def test_training_follows_a_replaced_parameter(small):
    plain = copy.deepcopy(small)
    triton_st.accelerate(small)
    features = small.tokenize(WORDS)
    for model in (small, plain):
        model(dict(features))
        model[0].model.embeddings.LayerNorm.bias = torch.nn.Parameter(torch.ones(50))
    actual, expected = (model(dict(features))["sentence_embedding"] for model in (small, plain))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    actual.sum().backward()
    assert small[0].model.embeddings.LayerNorm.bias.grad is not None
