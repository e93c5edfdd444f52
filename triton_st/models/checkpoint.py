"""Encoder checkpoints: read from and written as what transformers' `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
            if not isinstance(shards, dict):
                raise ValueError(f"{index}: expected an object named weight_map, got {shards!r}")
            state: dict[str, Tensor] = {}
            for shard in sorted(set(shards.values())):
                state |= _read_file(folder / Path(shard).name)
            return state
    raise FileNotFoundError(f"{folder} is no model folder: it has neither {' nor '.join(_WEIGHTS)}")


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"missing weights file: {path}") from None
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: not a readable weights file ({error})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own: a model must survive its folder being written again.

    safetensors maps the file, and what was read of it stays resident while it is open. Opened anew for each tensor, a
    file costs no more memory than its largest one beside the result.
    """
    with safetensors.safe_open(path, "pt") as file:
        names = list(file.keys())
    state = {}
    for name in names:
        with safetensors.safe_open(path, "pt") as file:
            state[name] = file.get_tensor(name).clone()
    return state


def _canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, which it empties, by the names of a bare model, float32; heads of task models and buffers are left out."""
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
