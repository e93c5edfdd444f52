"""The encoder's modes: encoding while another thread trains, gradient checkpointing, and what each layer keeps."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.small_model import bert_config, random_batch, small_model
from tests.training_runs import trainer
from triton_st.models import BertModel

TEXTS = ["the boy plays", "a small red ball in the park", "old dog", "happy girl runs near the river"]


def test_threads_encode_without_dropout_while_the_model_trains():
    model = small_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    wanted = model.eval().encode(TEXTS)
    model.train()
    batch = model.tokenize(TEXTS)
    torch.manual_seed(0)
    alone = model(batch)["sentence_embedding"]
    stop, wrong, calls = threading.Event(), [], [0]

    def encode() -> None:
        while not stop.is_set():
            found = model.encode(TEXTS)
            calls[0] += 1
            if not model.training or abs(found - wanted).max() > 1e-5:
                wrong.append(found)

    threads = [threading.Thread(target=encode) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            torch.manual_seed(0)  # encode draws no random number, so the same seed gives the same step
            assert torch.equal(model(batch)["sentence_embedding"], alone)
            assert model.training
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert calls[0] > 0
    assert wrong == []
    assert all(module.training for module in model.encoder.modules())


def test_the_trainer_checkpoints_activations_and_ends_at_the_same_weights(tmp_path: Path):
    weights = []
    for checkpointing in (False, True):
        made = trainer(
            tmp_path / str(checkpointing), max_steps=3, activation_checkpointing=checkpointing, save_strategy="no"
        )
        assert made.model.encoder.gradient_checkpointing == checkpointing
        made.train()
        weights.append({name: p.clone() for name, p in made.model.named_parameters()})
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def _kept(layers: int, tokens: int, checkpointing: bool) -> int:
    """Bytes that a training forward has allocated and not freed while its result is held."""
    model = BertModel(bert_config(num_hidden_layers=layers), add_pooling_layer=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    features = random_batch([32] * (tokens // 32))
    model(**features)  # what is made once: parameters side by side
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        hidden = model(**features)
    assert hidden.requires_grad
    return sum(event.self_cpu_memory_usage for event in recorded.key_averages())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_memory_of_a_layer_is_what_its_docstring_says(checkpointing: bool):
    tokens, hidden, heads, inner = 1024, 50, 5, 72
    a_layer = (_kept(5, tokens, checkpointing) - _kept(1, tokens, checkpointing)) / 4
    numbers = hidden if checkpointing else 7 * hidden + inner + heads + 2
    assert 0.85 * 4 * numbers * tokens < a_layer < 1.05 * 4 * numbers * tokens
