"""The folder of a sentence-transformers model: which modules it has and how they are set, in old and new spelling."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers.normalizers
import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from triton_st import __version__
from triton_st.models.checkpoint import read_weights
from triton_st.models.files import read_json, write_json
from triton_st.models.pooling import Dense, Normalize, Pooling

logger = logging.getLogger(__name__)

_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "*.md"]
_HUB_IGNORED = ["onnx/*", "openvino/*"]


@dataclass
class FolderConfig:
    """What the folder says beside the encoder's own config, weights and tokenizer."""

    encoder_path: str = ""
    """Where in the folder the encoder and its tokenizer lie."""
    max_seq_length: int | None = None
    """Truncation length, or None where the tokenizer says it."""
    do_lower_case: bool = False
    pooling: Pooling = field(default_factory=Pooling)
    head: list[Dense | Normalize] = field(default_factory=list)
    """What follows the pooling, in order."""
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None
    truncate_dim: int | None = None


def read_folder(folder: Path) -> FolderConfig:
    """Read a model folder's configuration.

    A folder without `modules.json` is taken as a plain transformers checkpoint with mean pooling, as
    sentence-transformers takes it.

    Raises:
        FileNotFoundError: no such folder, or it holds no model.
        ValueError: a module or a setting that is not served, naming it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such model folder: {folder}")
    modules_path = folder / "modules.json"
    if not modules_path.is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is no model folder: it has neither modules.json nor config.json")
        logger.warning("%s has no modules.json: a transformers checkpoint, used with mean pooling", folder)
        return FolderConfig()
    config = FolderConfig()
    served = {
        "Transformer": _read_transformer,
        "Pooling": _read_pooling,
        "Dense": _read_dense,
        "Normalize": _read_normalize,
    }
    names = []
    for path, name in _modules(modules_path):
        if name not in served:
            raise ValueError(f"{modules_path}: module {name!r} is not served; served: {', '.join(served)}")
        names.append(name)
        served[name](folder, path, config)
    if names[:2] != ["Transformer", "Pooling"] or {"Transformer", "Pooling"} & set(names[2:]):
        raise ValueError(
            f"{modules_path}: expected modules Transformer, Pooling and then any of Dense and Normalize, got {names}"
        )
    _read_model_config(folder, config)
    return config


def _modules(path: Path) -> list[tuple[str, str]]:
    """(path, class name) of each module; the class is known by its last name, whatever package path wrote it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [(str(entry["path"]), entry["type"].rsplit(".", 1)[-1]) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON list of modules with path and type ({error})") from error


def _inside(folder: Path, path: str) -> Path:
    joined = (folder / path).resolve()
    if not joined.is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}/modules.json: module path {path!r} leaves the model's folder")
    return joined


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_transformer(folder: Path, path: str, config: FolderConfig) -> None:
    settings = _optional_json(_inside(folder, path) / "sentence_bert_config.json")
    config.encoder_path = path
    config.max_seq_length = settings.get("max_seq_length")
    config.do_lower_case = bool(settings.get("do_lower_case", False))
    task = settings.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise ValueError(f"{folder}: transformer_task {task!r} is not served; served: 'feature-extraction'")


def _read_pooling(folder: Path, path: str, config: FolderConfig) -> None:
    source = _inside(folder, path) / "config.json"
    settings = _optional_json(source)
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _LEGACY_POOLING.items() if settings.get(key)] or ["mean"]
    try:
        config.pooling = Pooling(modes, bool(settings.get("include_prompt", True)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error


def _read_dense(folder: Path, path: str, config: FolderConfig) -> None:
    source = _inside(folder, path)
    settings = _embedding_module(source / "config.json")
    known = ("in_features", "out_features", "bias", "activation_function", "use_residual")
    try:
        dense = Dense(**{name: settings[name] for name in known if name in settings})
        dense.load_state_dict(read_weights(source))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{source}: no Dense module that can be read: {error}") from error
    config.head.append(dense.eval())


def _read_normalize(folder: Path, path: str, config: FolderConfig) -> None:
    _embedding_module(_inside(folder, path) / "config.json")
    config.head.append(Normalize())


def _embedding_module(source: Path) -> dict[str, Any]:
    """Settings of a module that works on sentence embeddings; on anything else it is not served."""
    settings = _optional_json(source)
    for name in ("module_input_name", "module_output_name"):
        value = settings.get(name) or "sentence_embedding"
        if value != "sentence_embedding":
            raise ValueError(f"{source}: {name} {value!r} is not served; served: 'sentence_embedding'")
    return settings


def _read_model_config(folder: Path, config: FolderConfig) -> None:
    settings = _optional_json(folder / "config_sentence_transformers.json")
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise ValueError(f"{folder}: prompts must be an object of texts by name, got {prompts!r}")
    config.prompts = {name: text or "" for name, text in prompts.items()}
    config.default_prompt_name = settings.get("default_prompt_name")
    config.similarity_fn_name = settings.get("similarity_fn_name")
    config.truncate_dim = settings.get("truncate_dim")


def write_folder(folder: Path, config: FolderConfig, dimension: int) -> None:
    """Write the module files of a model whose encoder lies in the folder itself.

    The spelling is the one of sentence-transformers 2 to 5, which every version since, 6.2 included, reads.
    """
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules += [(type(module).__name__, f"{i}_{type(module).__name__}") for i, module in enumerate(config.head, 2)]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(modules)
    ]
    for _, path in modules:
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", entries)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": config.max_seq_length, "do_lower_case": False})
    pooling: dict[str, Any] = {"word_embedding_dimension": dimension}
    pooling |= {key: mode in config.pooling.modes for key, mode in _LEGACY_POOLING.items()}
    if tuple(_LEGACY_POOLING[key] for key in _LEGACY_POOLING if pooling[key]) != config.pooling.modes:
        pooling["pooling_mode"] = list(config.pooling.modes)  # an order that the old spelling cannot say
    write_json(folder / "1_Pooling" / "config.json", pooling | {"include_prompt": config.pooling.include_prompt})
    for module, (_, path) in zip(config.head, modules[2:], strict=True):
        if isinstance(module, Dense):
            write_json(folder / path / "config.json", module.config())
            save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / path / "model.safetensors")
    settings: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "__version__": {
            "triton_st": __version__,
            "transformers": transformers.__version__,
            "pytorch": torch.__version__,
        },
        "prompts": config.prompts,
        "default_prompt_name": config.default_prompt_name,
        "similarity_fn_name": config.similarity_fn_name,
    }
    if config.truncate_dim is not None:
        settings["truncate_dim"] = config.truncate_dim
    write_json(folder / "config_sentence_transformers.json", settings)


def find_folder(name_or_path: str | Path, **hub: Any) -> Path:
    """The folder itself, or the local snapshot of a hub id; a bare name is looked for under `sentence-transformers/`.

    Args:
        name_or_path: folder or hub id.
        hub: `cache_dir`, `revision`, `local_files_only`, `token` of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: there is no such folder, and no such model in the cache or on the hub.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file; expected a model folder or a hub id")
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"no such model folder: {name}")
    repository = name if "/" in name else f"sentence-transformers/{name}"
    try:
        snapshot = Path(snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED, **hub))
        if not any(snapshot.rglob("*.safetensors")):
            snapshot_download(repository, allow_patterns=["*pytorch_model*"], ignore_patterns=_HUB_IGNORED, **hub)
    except Exception as error:  # huggingface_hub, its HTTP client and the network each have their own
        raise FileNotFoundError(
            f"{name!r} is no folder here, and {repository!r} could not be had from the hub: {error}"
        ) from error
    return snapshot


def load_tokenizer(folder: Path, config: FolderConfig, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The fast tokenizer in a folder, lower-casing if the model's settings say so; `kwargs` go to transformers.

    Raises:
        ValueError: the folder has no tokenizer that transformers can load.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):  # transformers would make an empty one up
        raise ValueError(f"{folder}: no tokenizer; expected one of {', '.join(_TOKENIZER_FILES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True, **kwargs)
    except Exception as error:  # transformers raises whatever its tokenizer classes do
        raise ValueError(f"{folder}: no tokenizer that transformers can load ({error})") from error
    if config.do_lower_case:
        backend = tokenizer.backend_tokenizer
        lowercase = tokenizers.normalizers.Lowercase()
        steps = [lowercase] if backend.normalizer is None else [lowercase, backend.normalizer]
        backend.normalizer = tokenizers.normalizers.Sequence(steps)
    return tokenizer
