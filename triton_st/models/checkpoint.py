"""Encoder checkpoints: read from and written as what transformers' `from_pretrained` reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from triton_st.models.bert import BertModel, RobertaModel, XLMRobertaModel
from triton_st.models.distilbert import DistilBertModel
from triton_st.models.encoder import PackedEncoder
from triton_st.models.files import read_json, replacing_folder
from triton_st.models.mpnet import MPNetModel

_FAMILIES: dict[str, type[PackedEncoder]] = {
    model.config_class.model_type: model
    for model in (BertModel, DistilBertModel, MPNetModel, RobertaModel, XLMRobertaModel)
}
SERVED_TYPES = tuple(_FAMILIES)

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PREFIXES = ("bert.", "distilbert.", "mpnet.", "roberta.", "model.", "module.")
_PARTS = ("embeddings.", "encoder.", "transformer.", "pooler.")
_READ_AT_ONCE = 16 << 20  # bytes of a mapped file that may be resident beside the tensors made of them
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class _Uninitialised(TorchFunctionMode):
    """Parameters get no initial values: to draw normal ones on no device, torch imports its whole compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_encoder(folder: str | Path, **config_kwargs: Any) -> PackedEncoder:
    """Load a transformers checkpoint.

    Args:
        folder: holds `config.json` and `model.safetensors` or `pytorch_model.bin`, whole or in indexed shards. Weights
            of any floating dtype become float32; prefixes such as `bert.` and the heads of task models are dropped.
        config_kwargs: fields that replace those of `config.json`.

    Returns:
        The encoder in evaluation mode, as `from_pretrained` leaves it; with a pooler if the checkpoint has one.

    Raises:
        FileNotFoundError: no such folder, or it holds no checkpoint.
        ValueError: a model type that is not served (the error says which are), a config or weights that do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such model folder: {folder}")
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json")
    config_fields = read_json(config_path)
    model_type = config_fields.get("model_type")
    try:
        family = family_of(model_type)
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from None
    try:
        config = family.config_class.from_dict(config_fields | config_kwargs)
    except Exception as error:  # transformers' validation has error types of its own
        raise ValueError(f"{config_path}: not a configuration of type {model_type} ({error})") from error
    state = _canonical(read_weights(folder))
    with torch.device("meta"), _Uninitialised():
        model = family(config)
    if "pooler.dense.weight" not in state:
        model.pooler = None
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from error
    model.requires_grad_(True)
    return model.eval()


def family_of(model_type: str | None) -> type[PackedEncoder]:
    """The encoder class for a transformers config's `model_type`; ValueError for a type that is not served."""
    if model_type not in _FAMILIES:
        raise ValueError(f"model type {model_type!r} is not served; served: {', '.join(SERVED_TYPES)}")
    return _FAMILIES[model_type]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors` or `pytorch_model.bin` in a folder, whole or in indexed shards."""
    for name in _WEIGHTS:
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return _read_file(whole)
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(f"{index}: expected an object of file names named weight_map, got {shards!r}")
            state: dict[str, Tensor] = {}
            for shard in sorted(set(shards.values())):
                state |= _read_file(folder / Path(shard).name)
            return state
    raise FileNotFoundError(f"{folder} is no model folder: it has neither {' nor '.join(_WEIGHTS)}")


def _read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, each contiguous in memory of its own.

    A model must survive its folder being written again, and parameters that share memory would be trained twice.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"missing weights file: {path}") from None
    except OSError:
        raise
    except Exception as error:  # pickle raises whatever a wrong file makes it come upon
        raise ValueError(f"{path}: not a readable weights file ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path}: not a weights file: expected tensors by name")
    return {str(name): tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """safetensors maps a file, and what was read of it stays resident: it is opened anew for every few tensors.

    They are all of one file: if another has taken its place meanwhile, they are read again.
    """
    while True:
        with path.open("rb") as held:  # while it is open no other file gets its number
            try:
                state = _read_in_parts(path)
            except safetensors.SafetensorError:
                if _is_at(held, path):
                    raise
                continue
            if _is_at(held, path):
                return state


def _read_in_parts(path: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        names = list(file.keys())
    state: dict[str, Tensor] = {}
    while len(state) < len(names):
        read = 0
        with safetensors.safe_open(path, "pt") as file:
            for name in names[len(state) :]:
                state[name] = file.get_tensor(name).clone()
                read += state[name].nbytes
                if read >= _READ_AT_ONCE:
                    break
    return state


def _is_at(file: BinaryIO, path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


def _canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, which it empties, by the names of a bare model, in float32, without heads of task models and buffers."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(f"{p}embeddings.") for name in state)), "")
    tensors = {}
    for name in list(state):
        tensor = state.pop(name)  # what has another dtype is not needed any longer than its float32
        if not name.startswith(prefix):
            continue
        bare = name.removeprefix(prefix)
        if not bare.startswith(_PARTS) or bare == "embeddings.position_ids":
            continue
        for old, new in _OLD_NAMES.items():
            bare = bare.replace(old, new)
        tensors[bare] = tensor.float()
    return tensors


def save_encoder(model: PackedEncoder, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` (float32) as the `save_pretrained` of transformers' model does.

    Both files are written in full before either takes its place; the folder is made if it does not exist.

    Raises:
        OSError: the folder cannot be written.
    """
    config = model.config_class.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing_folder(folder) as temporary:
        (temporary / "config.json").write_text(config.to_json_string(use_diff=True), encoding="utf-8")
        safetensors.torch.save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
