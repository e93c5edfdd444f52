"""Encoder checkpoints: what transformers wrote loads, what is saved transformers loads, what is neither is named."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch
import transformers

from tests.small_model import bert_config, bert_pair, random_batch
from triton_st.models import checkpoint, load_encoder, save_encoder


def test_saved_checkpoint_is_transformers_own(tmp_path):
    ours, theirs = bert_pair()
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
    ours, theirs = bert_pair()
    theirs.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    assert not loaded.training
    assert loaded.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(loaded(**random_batch()), ours(**random_batch()), rtol=0, atol=0)
    loaded.train()(**random_batch()).sum().backward()
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
    ours, _ = bert_pair()
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
    ours, theirs = bert_pair()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(load_encoder(tmp_path)(**random_batch()), ours(**random_batch()))
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
    with pytest.raises(
        ValueError, match="model type 't5' is not served; served: bert, distilbert, mpnet, roberta, xlm-roberta"
    ):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(bert_config().to_json_string())
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable weights file"):
        load_encoder(tmp_path)


def test_weights_that_do_not_fit_the_config_are_named(tmp_path):
    ours, _ = bert_pair()
    save_encoder(ours, tmp_path)
    (tmp_path / "config.json").write_text(bert_config(num_hidden_layers=3).to_json_string())
    with pytest.raises(ValueError, match=r"(?s)weights do not fit config.json: .*encoder.layer.2"):
        load_encoder(tmp_path)


def test_weights_survive_their_file_being_written_again(tmp_path):
    ours, _ = bert_pair()
    save_encoder(ours, tmp_path)
    loaded = load_encoder(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:  # the same file, not another by its name
        size = os.fstat(file.fileno()).st_size
        file.seek(size // 10)
        file.write(b"\x7f" * (size - size // 10))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("replaced_at", [1, 2, 5])
def test_weights_are_of_one_file_though_another_takes_its_place(tmp_path, monkeypatch, replaced_at):
    ours, _ = bert_pair()
    opened = 0

    def fill_and_save(value: float) -> None:
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.fill_(value)
        save_encoder(ours, tmp_path)

    def replace_and_open(*args, **kwargs):
        nonlocal opened
        opened += 1
        if opened == replaced_at:
            fill_and_save(2)
        return safe_open(*args, **kwargs)

    fill_and_save(1)
    safe_open = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", replace_and_open)
    monkeypatch.setattr(checkpoint, "_READ_AT_ONCE", 1)
    assert {value for p in load_encoder(tmp_path).parameters() for value in p.unique().tolist()} == {2}


def test_weights_that_share_memory_in_a_file_are_loaded_apart(tmp_path):
    ours, _ = bert_pair()
    save_encoder(ours, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = ours.state_dict()
    for name in state:
        if name.startswith("encoder.layer.1."):
            state[name] = state[name.replace("layer.1.", "layer.0.")]
    name = "encoder.layer.0.output.LayerNorm.bias"
    state[name] = torch.zeros(1).expand_as(state[name])
    torch.save(state, tmp_path / "pytorch_model.bin")
    parameters = list(load_encoder(tmp_path).parameters())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.is_contiguous() for p in parameters)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world, this is no model", lambda: [torch.zeros(2)], lambda: torch.zeros(2), lambda: {"a": 1}],
)
def test_pickled_weights_that_are_none(tmp_path, content):
    ours, _ = bert_pair()
    save_encoder(ours, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content(), path)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a (readable )?weights file"):
        load_encoder(tmp_path)
