"""Every method of sentence-transformers' class: ours takes the same arguments, or the difference is listed here."""

from __future__ import annotations

import inspect

import pytest
import sentence_transformers
import torch

import triton_st
from tests.small_model import small_model

THEIRS = sentence_transformers.SentenceTransformer
OURS = triton_st.SentenceTransformer
VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)

# Arguments of ours that come behind theirs.
ADDED = {
    "__init__": {"dtype", "tokenizer_kwargs"},  # the latter is taken there, too, by a decorator
    "encode": {"sentences", "task", "out", "ranges", "calibration_embeddings"},
}
# Arguments of theirs that ours has not: a model is built of parts by `from_encoder`.
MISSING = {"__init__": {"modules"}}
# The model is required; there, None builds an empty one.
DEFAULTS = {("__init__", "model_name_or_path")}

# Methods with a contract of their own: batches here are packed, without padding.
OTHER_CONTRACT = {"forward", "tokenize"}

# What ours has not, and why.
ABSENT = {
    "padded batches and other modalities": {
        "preprocess", "get_sentence_features", "smart_batching_collate", "is_singular_input", "modalities", "supports",
        "processor",
    },
    "training, which is the trainer's": {"fit", "old_fit"},
    "adapters": {
        "active_adapter", "active_adapters", "add_adapter", "check_peft_compatible_model", "delete_adapter",
        "disable_adapters", "enable_adapters", "get_adapter_state_dict", "has_peft_compatible_model", "load_adapter",
        "set_adapter", "merge",
    },
    "how it is made inside": {
        "SUPPORTED_SIMILARITY_FN_NAMES", "clear_placement_cache", "config", "default_huggingface_organization",
        "dtype", "get_model_kwargs", "load", "model_card_data_class", "model_type", "transformers_model",
    },
    "names that are deprecated there": {"save_to_hub", "truncate_sentence_embeddings"},
}  # fmt: skip

METHODS = [
    "__init__", "encode", "encode_query", "encode_document", "encode_multi_process", "similarity",
    "similarity_pairwise", "start_multi_process_pool", "stop_multi_process_pool", "truncate_embeddings", "evaluate",
    "get_embedding_dimension", "get_sentence_embedding_dimension", "get_max_seq_length", "get_backend",
    "set_pooling_include_prompt", "save_pretrained", "save", "push_to_hub",
]  # fmt: skip


def parameters(cls: type, method: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(inspect.unwrap(getattr(cls, method))).parameters)


@pytest.mark.parametrize("method", METHODS)
def test_arguments_are_theirs(method: str) -> None:
    theirs, ours = parameters(THEIRS, method), parameters(OURS, method)
    if any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in ours.values()):  # hands the rest over, in order
        whole = {"encode_query": "encode", "encode_document": "encode", "save": "save_pretrained"}[method]
        named = {name: p for name, p in ours.items() if p.kind not in VARIADIC}
        assert list(named) == list(parameters(OURS, whole))[: len(named)]
        ours = parameters(OURS, whole)
        method = whole
    theirs = {name: p for name, p in theirs.items() if p.kind not in VARIADIC}
    ours = {name: p for name, p in ours.items() if p.kind not in VARIADIC}
    assert theirs.keys() - ours.keys() == MISSING.get(method, set())
    assert ours.keys() - theirs.keys() == ADDED.get(method, set())
    shared = [name for name in theirs if name in ours]
    positional = [name for name in shared if theirs[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [name for name, p in ours.items() if p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD] == positional
    for name in shared:
        if (method, name) not in DEFAULTS and name not in ("inputs", "self"):  # whose older name may be given instead
            assert ours[name].default == theirs[name].default, name


def test_every_public_name_is_there_or_listed() -> None:
    base = set(dir(torch.nn.Sequential))
    theirs = {name for name in dir(THEIRS) if not name.startswith("_")} - base
    missing = theirs - set(dir(small_model()))
    absent = [name for names in ABSENT.values() for name in names]
    assert missing == set(absent)
    assert len(absent) == len(set(absent))
    assert theirs & OTHER_CONTRACT - base == {"tokenize"}


def test_positional_arguments_go_where_theirs_do() -> None:
    model = small_model().eval()
    model.prompts = {"query": "near the ", "document": "a "}
    expected = model.encode(["river", "park"], prompt="near the ", normalize_embeddings=True)
    for found in (
        model.encode(
            ["river", "park"], "query", None, 8, False, "sentence_embedding", "float32", True, False, None, True
        ),
        model.encode_document(
            ["river", "park"], "query", None, 8, False, "sentence_embedding", "float32", True, False, None, True
        ),
        model.encode_query(["river", "park"], None, None, 8, normalize_embeddings=True),
        model.encode_query(sentences=["river", "park"], normalize_embeddings=True),
    ):
        assert (found == expected).all()


def test_evaluate(tmp_path) -> None:
    model = small_model().eval()
    assert model.evaluate(lambda m, path: (m is model, path.is_dir()), tmp_path / "deep" / "results") == (True, True)
    assert model.evaluate(lambda m, path: path) is None
    assert model.get_backend() == "torch"


def test_older_names_of_the_constructor(tmp_path) -> None:
    small_model().eval().save_pretrained(tmp_path, train_datasets=["some/pairs"])
    assert "some/pairs" in (tmp_path / "README.md").read_text()
    model = OURS(tmp_path, device="cpu", use_auth_token="secret", tokenizer_kwargs={"truncation_side": "left"})
    assert model.tokenizer.truncation_side == "left"
    with pytest.raises(ValueError, match="safe_serialization: expected True"):
        model.save(tmp_path / "other", safe_serialization=False)
