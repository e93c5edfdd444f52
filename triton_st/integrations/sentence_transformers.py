"""A live `sentence_transformers.SentenceTransformer` on our kernels: it stays the object, of the type, that it was.

Two methods are shadowed on the instance: the model's `encode`, and the `forward` of its Transformer module, which is
what training calls. Both compute with the very parameters of the model, so an optimizer, `load_state_dict` or `to`
meets them where they always were.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from triton_st import backend
from triton_st.encoding import Encoding
from triton_st.models.checkpoint import family_of
from triton_st.models.encoder import PackedEncoder
from triton_st.models.folder import FolderConfig
from triton_st.models.packing import Features
from triton_st.models.pooling import Dense, Normalize, Pooling
from triton_st.sentence_transformer import SentenceTransformer

logger = logging.getLogger(__name__)

_HANDLE = "_triton_st"  # in the accelerated model's __dict__


def accelerate(model: Any) -> Accelerated:
    """Let a sentence-transformers model encode and train on our kernels, in place.

    Args:
        model: a `sentence_transformers.SentenceTransformer` of Transformer (a model family that we serve), Pooling and
            perhaps Dense and Normalize modules, in float32. Any other is left untouched, with a warning that says why,
            and so is every model where `TRITON_ST_DISABLE=1` is set.

    Returns:
        A handle. `handle.active` says whether the model was accelerated, `handle.restore()` undoes it.

    Raises:
        TypeError: not a sentence-transformers model.
    """
    if not isinstance(model, nn.Sequential) or not hasattr(model, "encode") or not hasattr(model, "similarity_fn_name"):
        raise TypeError(f"model: expected a sentence_transformers.SentenceTransformer, got {type(model).__name__}")
    if (handle := model.__dict__.get(_HANDLE)) is not None:
        return handle
    if backend.DISABLED:
        return Accelerated(model, None)
    try:
        return Accelerated(model, _Shared(model))
    except _NotServedError as error:
        logger.warning("this model is left as it is: %s", error)
        return Accelerated(model, None)


class Accelerated:
    """What `accelerate` did to a model.

    Attributes:
        active: whether the model runs on our kernels now.
    """

    def __init__(self, model: Any, shared: _Shared | None) -> None:
        self._model = model
        self._transformer = model[0] if shared is not None else None
        self.active = shared is not None
        if shared is not None:
            model.__dict__[_HANDLE] = self
            model.__dict__["encode"] = functools.partial(_encode, model, shared)
            self._transformer.__dict__["forward"] = functools.partial(_forward, model, self._transformer, shared)

    def restore(self) -> None:
        """Give the model its own methods back; it then computes what it always did, bit for bit."""
        if self.active:
            for name in (_HANDLE, "encode"):
                self._model.__dict__.pop(name, None)
            self._transformer.__dict__.pop("forward", None)
            self.active = False

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


class _NotServedError(ValueError):
    """Why a model cannot be accelerated."""


class _Shared(SentenceTransformer):
    """Our form of a model, made of the model's own parameters, which its settings follow too."""

    def __init__(self, model: Any) -> None:
        nn.Module.__init__(self)
        self._share(model)

    def _share(self, model: Any) -> None:
        names = [type(module).__name__ for module in model]
        if names[:2] != ["Transformer", "Pooling"] or not set(names[2:]) <= {"Dense", "Normalize"}:
            raise _NotServedError(f"its modules are {', '.join(names)}; served: Transformer, Pooling, Dense, Normalize")
        transformer, pooling, *head = model
        try:
            encoder = _sharing_encoder(transformer.model)
            config = FolderConfig(
                max_seq_length=model.max_seq_length,
                pooling=Pooling(pooling.pooling_mode, pooling.include_prompt),
                head=[_sharing_head(module) for module in head],
            )
            self._assemble(encoder, model.tokenizer, config)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise _NotServedError(error) from error
        self.__dict__["_parameters_shared"] = _parameters(model)

    def follow(self, model: Any) -> bool:
        """Take over what has changed in the model since the last call: settings, or whole parameters.

        Returns:
            Whether the model can still be served: not in half precision, nor with adapters, for example.
        """
        now = _parameters(model)
        before = self.__dict__["_parameters_shared"]
        try:
            if any(p.dtype != torch.float32 for p in now):
                raise _NotServedError("its parameters are no longer all torch.float32")
            _check_modules(model[0].model)
            if len(now) != len(before) or any(p is not q for p, q in zip(now, before, strict=True)):
                self._share(model)
        except _NotServedError as error:
            if not self.__dict__.get("_warned"):
                logger.warning("this model runs as sentence-transformers has it for now: %s", error)
                self.__dict__["_warned"] = True
            return False
        self.prompts = dict(model.prompts)
        self.default_prompt_name = model.default_prompt_name
        self.truncate_dim = model.truncate_dim
        self.tokenizer = model.tokenizer
        self.pooling.include_prompt = model[1].include_prompt
        if self.max_seq_length != model.max_seq_length:
            self.max_seq_length = model.max_seq_length
        self.train(model.training)
        return True


def _parameters(model: Any) -> list[nn.Parameter]:
    """What a model and its form of ours share."""
    transformer, _, *head = model
    modules = (m for module in (transformer.model, *head) for m in module.modules())
    return [p for m in modules for p in m._parameters.values() if p is not None]


_KNOWN = ("transformers.", "torch.nn.modules.")


def _check_modules(source: nn.Module) -> None:
    """What computes something of its own, an adapter for one, would be passed over: only parameters are shared."""
    for module in source.modules():
        if not type(module).__module__.startswith(_KNOWN):
            what = f"is a {type(module).__name__}"
        elif module._forward_hooks or module._forward_pre_hooks:
            what = "has forward hooks"
        elif "forward" in module.__dict__:
            what = "has a forward of its own"
        else:
            continue
        name = next(name for name, m in source.named_modules() if m is module)
        raise _NotServedError(f"its {name or type(source).__name__} {what}")


def _sharing_encoder(source: nn.Module) -> PackedEncoder:
    """An encoder of ours whose parameters are those of a transformers model."""
    config: Any = source.config
    family = family_of(config.model_type)
    _check_modules(source)
    if config.output_hidden_states or config.output_attentions:
        raise _NotServedError("its config asks for hidden states or attentions of every layer")
    dtypes = {parameter.dtype for parameter in source.parameters()}
    if dtypes != {torch.float32}:
        raise _NotServedError(f"its parameters are {', '.join(map(str, dtypes))}; served: torch.float32")
    with torch.device("meta"):
        encoder = family(config)
    if getattr(source, "pooler", None) is None:
        encoder.pooler = None
    encoder.load_state_dict(dict(source.named_parameters()), strict=True, assign=True)
    return encoder


def _sharing_head(module: Any) -> Dense | Normalize:
    for name in ("module_input_name", "module_output_name"):
        if getattr(module, name, "sentence_embedding") != "sentence_embedding":
            raise _NotServedError(f"{type(module).__name__} works on {getattr(module, name)!r}")
    if type(module).__name__ == "Normalize":
        return Normalize()
    activation = type(module.activation_function)
    with torch.device("meta"):
        dense = Dense(
            module.in_features,
            module.out_features,
            module.linear.bias is not None,
            f"{activation.__module__}.{activation.__qualname__}",
            module.use_residual,
        )
    dense.load_state_dict(dict(module.named_parameters()), strict=True, assign=True)
    return dense


def _encode(model: Any, shared: _Shared, *args: Any, **kwargs: Any) -> Any:
    """`encode` of an accelerated model."""
    model.eval()  # as sentence-transformers' own does
    if not shared.follow(model):
        return type(model).encode(model, *args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name != "processing_kwargs" or value is not None}
    return Encoding.encode(shared, *args, **kwargs)


def _forward(model: Any, transformer: Any, shared: _Shared, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """`forward` of an accelerated model's Transformer module: padded features in, padded token states out."""
    mask = features.get("attention_mask")
    if (
        mask is None
        or "input_ids" not in features
        or kwargs.keys() - {"task"}
        or not _padded_right(mask)
        or not shared.follow(model)
    ):
        return type(transformer).forward(transformer, features, **kwargs)
    shared.encoder.train(transformer.training)
    device = mask.device.type
    autocast = torch.is_autocast_enabled(device)
    with shared.activations_in(torch.get_autocast_dtype(device) if autocast else torch.float32):
        hidden = shared.encoder(**_pack(features, mask))
    states = hidden.new_zeros(*mask.shape, hidden.shape[1], dtype=torch.float32)
    features["token_embeddings"] = states.masked_scatter(mask.bool().unsqueeze(-1), hidden.float())
    return features


def _padded_right(mask: Tensor) -> bool:
    return mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all())


def _pack(features: dict[str, Any], mask: Tensor) -> Features:
    kept = mask.bool()
    lengths = kept.sum(1)
    packed: Features = {
        "input_ids": features["input_ids"][kept],
        "cu_seqlens": nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        "max_seqlen": int(lengths.max()) if len(lengths) else 0,
    }
    if features.get("token_type_ids") is not None:
        packed["token_type_ids"] = features["token_type_ids"][kept]
    return packed
