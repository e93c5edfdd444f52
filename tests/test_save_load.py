"""Model folders: saved here and loaded in sentence-transformers, and the reverse; nothing is ever half-written."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentence_transformers

from tests.small_model import WORDS, small_model
from triton_st import SentenceTransformer
from triton_st.models.files import replacing_folder


@pytest.mark.parametrize("normalize", [False, True])
def test_saved_model_loads_in_sentence_transformers_and_here(tmp_path, normalize):
    model = small_model(normalize=normalize).eval()
    model.prompts = {"query": "near the "}
    model.similarity_fn_name = "dot"
    model.max_seq_length = 20
    model.save_pretrained(tmp_path / "saved")
    texts = ["the boy plays", "", " ".join(WORDS * 2)]
    wanted = model.encode(texts)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    ours = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for loaded in (theirs, ours):
        np.testing.assert_allclose(loaded.encode(texts), wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            loaded.encode(["river"], prompt_name="query"), model.encode(["near the river"]), rtol=0, atol=1e-5
        )
        assert loaded.max_seq_length == 20
        assert loaded.similarity_fn_name == "dot"
        assert loaded.prompts["query"] == "near the "
    assert (tmp_path / "saved" / "README.md").stat().st_size > 100
    assert not list(tmp_path.glob(".*"))


def test_model_that_sentence_transformers_saved(tmp_path, minilm_folder):
    theirs = sentence_transformers.SentenceTransformer(str(minilm_folder), device="cpu")
    theirs.save_pretrained(str(tmp_path))
    ours = SentenceTransformer(tmp_path, device="cpu")
    assert [type(module).__name__ for module in ours.head] == ["Normalize"]
    assert ours.max_seq_length == 256
    texts = ["A boy plays in the grass.", "", "word " * 400]
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), rtol=0, atol=1e-5)


def test_a_loaded_card_is_kept_until_the_model_is_evaluated(tmp_path, minilm_folder):
    minilm = SentenceTransformer(minilm_folder, device="cpu")
    minilm.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_bytes() == (minilm_folder / "README.md").read_bytes()
    minilm.save_pretrained(tmp_path / "b", create_model_card=False)
    assert not (tmp_path / "b" / "README.md").exists()


def test_plain_transformers_checkpoint_gets_mean_pooling(tmp_path, caplog):
    model = small_model().eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "modules.json").unlink()
    with caplog.at_level(logging.WARNING):
        loaded = SentenceTransformer(tmp_path, device="cpu")
    assert "used with mean pooling" in caplog.text
    np.testing.assert_array_equal(loaded.encode(["the boy"]), model.encode(["the boy"]))


def test_constructor_settings_override_saved_ones(tmp_path):
    model = small_model()
    model.prompts = {"query": "a ", "document": "the "}
    model.save(tmp_path)
    loaded = SentenceTransformer(
        tmp_path,
        device="cpu",
        prompts={"query": "near "},
        default_prompt_name="document",
        similarity_fn_name="euclidean",
        truncate_dim=8,
        trust_remote_code=True,
    )
    assert loaded.prompts == {"query": "near ", "document": "the "}
    assert loaded.similarity_fn_name == "euclidean"
    assert loaded.encode("cat").shape == (8,)
    with pytest.raises(ValueError, match=r"default_prompt_name: expected one of \['query', 'document'\], got 'other'"):
        SentenceTransformer(tmp_path, device="cpu", default_prompt_name="other")


def test_lower_casing_setting(tmp_path):
    model = small_model().eval()
    model.save_pretrained(tmp_path)
    settings = tmp_path / "sentence_bert_config.json"
    settings.write_text(json.dumps({"max_seq_length": 32, "do_lower_case": True}))
    loaded = SentenceTransformer(tmp_path, device="cpu")
    np.testing.assert_array_equal(loaded.encode(["The BOY"]), model.encode(["the boy"]))
    loaded.save_pretrained(tmp_path / "again")
    again = SentenceTransformer(tmp_path / "again", device="cpu")
    np.testing.assert_array_equal(again.encode(["The BOY"]), model.encode(["the boy"]))


@pytest.fixture
def saved(tmp_path) -> Path:
    small_model(normalize=True).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_modules_that_are_not_served_are_named(saved):
    modules = json.loads((saved / "modules.json").read_text())
    lstm = {"idx": 2, "name": "2", "path": "2_LSTM", "type": "sentence_transformers.models.LSTM"}
    (saved / "modules.json").write_text(json.dumps([*modules[:2], lstm]))
    with pytest.raises(ValueError, match=r"modules.json: module 'LSTM' is not served; served: Transformer, Pooling"):
        SentenceTransformer(saved)
    (saved / "modules.json").write_text(json.dumps(modules[::-1]))
    with pytest.raises(ValueError, match="expected modules Transformer, Pooling and then any of Dense and Normalize"):
        SentenceTransformer(saved)
    (saved / "modules.json").write_text('{"idx": 0}')
    with pytest.raises(ValueError, match=r"modules.json: expected a JSON list of modules"):
        SentenceTransformer(saved)
    modules[1]["path"] = "../elsewhere"
    (saved / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"module path '../elsewhere' leaves the model's folder"):
        SentenceTransformer(saved)


def test_a_pooling_mode_that_nobody_knows_is_named(saved):
    _edit(saved / "1_Pooling" / "config.json", pooling_mode="middle")
    with pytest.raises(ValueError, match=r"1_Pooling/config.json: pooling_mode: expected one or more of cls, max"):
        SentenceTransformer(saved)


@pytest.mark.parametrize(
    ("activation", "message"),
    [("os.system", "full name of a module in torch.nn, got 'os.system'"), ("torch.nn.functional.relu", "got 'torch")],
)
def test_a_dense_module_runs_no_foreign_code(saved, activation, message):
    (saved / "2_Normalize").rename(saved / "2_Dense")
    modules = json.loads((saved / "modules.json").read_text())
    modules[2] |= {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (saved / "modules.json").write_text(json.dumps(modules))
    settings = {"in_features": 50, "out_features": 8, "activation_function": activation}
    (saved / "2_Dense" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        SentenceTransformer(saved)


def test_model_types_that_are_not_served_are_named(saved):
    _edit(saved / "config.json", model_type="t5")
    with pytest.raises(ValueError, match="model type 't5' is not served; served: bert"):
        SentenceTransformer(saved)


def test_what_is_no_model_is_named(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"no such model folder: ./absent/model"):
        SentenceTransformer("./absent/model")
    with pytest.raises(FileNotFoundError, match=r"'no/such-model' is no folder here, and 'no/such-model' could not"):
        SentenceTransformer("no/such-model")
    with pytest.raises(FileNotFoundError, match="'sentence-transformers/no-such-model' could not be had from the hub"):
        SentenceTransformer("no-such-model", local_files_only=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is no model folder: it has neither modules.json nor config.json"):
        SentenceTransformer(tmp_path / "empty")
    with pytest.raises(NotADirectoryError, match=r"config.json is a file; expected a model folder"):
        SentenceTransformer(saved / "config.json")
    with pytest.raises(TypeError, match="model_name_or_path: expected a folder or a hub id, got None;"):
        SentenceTransformer(None)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor pytorch_model.bin"):
        SentenceTransformer(saved)


def test_a_folder_without_tokenizer_is_named(saved):
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer that transformers can load"):
        SentenceTransformer(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer; expected one of tokenizer.json, vocab.txt"):
        SentenceTransformer(saved)


# --- nothing half-written ---------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    model = small_model()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match=r"cannot write to .*file: it is a file, not a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot write to .*below"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_while_saving_leaves_the_old_model(saved, monkeypatch):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    model = small_model(seed=1)
    monkeypatch.setattr(model.model_card_data, "to_card", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(saved)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(saved.parent / "new")
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_saving_over_a_model_replaces_it_and_keeps_other_files(saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "checkpoint-8").mkdir()
    model = small_model(seed=1).eval()
    model.save_pretrained(saved)
    loaded = SentenceTransformer(saved, device="cpu")
    np.testing.assert_array_equal(loaded.encode(["the boy"]), model.encode(["the boy"]))
    assert len(loaded.head) == 0
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "checkpoint-8").is_dir()
    loaded.save_pretrained(saved)  # onto the very folder it came from
    np.testing.assert_array_equal(SentenceTransformer(saved, device="cpu").encode("cat"), model.encode("cat"))


def test_an_empty_working_directory_stays_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_model().save_pretrained(".")
    assert Path("config.json").is_file()


def test_settings_of_the_wrong_kind_are_named(saved):
    path = saved / "config_sentence_transformers.json"
    settings = json.loads(path.read_text())
    for change, message in [
        ({"prompts": ["query"]}, r"prompts must be an object of texts by name, got \['query'\]"),
        ({"truncate_dim": "x"}, "truncate_dim: expected a positive int or None, got 'x'"),
    ]:
        path.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            SentenceTransformer(saved, device="cpu")
    path.write_text(json.dumps(settings))
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"vocab_size": "many"}))
    with pytest.raises(ValueError, match=r"config.json: not a configuration of type bert .*vocab_size"):
        SentenceTransformer(saved, device="cpu")
    with pytest.raises(TypeError, match="model_name_or_path: expected a folder or a hub id, got ''"):
        SentenceTransformer("")


def test_a_new_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "er"
    with replacing_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    with contextlib.suppress(RuntimeError), replacing_folder(target) as folder:
        (folder / "a.txt").write_text("b")
        raise RuntimeError("stopped")
    assert (target / "a.txt").read_text() == "a"
    shutil.rmtree(target)
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("has_card", [False, True])
def test_push_to_hub(monkeypatch, has_card, tmp_path):
    """Against a hub that only notes what it is asked for."""
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repo_id, **settings):
            calls.append(("create_repo", repo_id, settings))
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def create_branch(self, repo_id, **settings):
            calls.append(("create_branch", repo_id, settings))

        def file_exists(self, repo_id, name, revision):
            return has_card

        def upload_folder(self, *, folder_path, **settings):
            calls.append(("upload", sorted(p.name for p in Path(folder_path).iterdir()), settings))
            return SimpleNamespace(commit_url="commit", pr_url="pull")

    monkeypatch.setattr("triton_st.sentence_transformer.HfApi", Hub)
    model = small_model().eval()
    assert model.push_to_hub("encoder", token="secret", private=True, revision="new") == "commit"
    token, repository, branch, (_, uploaded, settings) = calls
    assert token == ("token", "secret")
    assert repository == ("create_repo", "encoder", {"private": True, "exist_ok": False})
    assert branch == ("create_branch", "someone/encoder", {"branch": "new", "exist_ok": True})
    assert ("README.md" in uploaded) != has_card
    assert {"config.json", "model.safetensors", "modules.json", "tokenizer.json"} <= set(uploaded)
    assert settings["repo_id"] == "someone/encoder"
    assert settings["revision"] == "new"
    assert model.push_to_hub("encoder", create_pr=True, replace_model_card=True) == "pull"
    assert "README.md" in calls[-1][1]
    assert calls[-2] == ("create_repo", "encoder", {"private": None, "exist_ok": True})
    (tmp_path / "as it is.txt").touch()
    assert model.push_to_hub("encoder", local_model_path=tmp_path, exist_ok=True) == "commit"
    assert calls[-1][1] == ["as it is.txt"]
