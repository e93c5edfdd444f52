"""CPU inference: an encoder's weights packed once, then packed sequences in and embeddings out, one call for a batch.

The C++ side (`csrc/encoder.cpp`) takes each sequence through all layers in a thread's own cache. A sequence's result is
the same to the last bit alone, in any batch, at any place and with any number of threads, in each precision.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from triton_st import backend
from triton_st.models.encoder import LayerWeights, PackedEncoder
from triton_st.models.pooling import POOLING_MODES, Dense
from triton_st.reference.normalize import saturate

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16", "int8")
"""Precisions, in the order in which the C++ side numbers them."""

_FIRST_BLOCK, _LARGEST_BLOCK = 128, 512
"""Texts tokenized at a time: few at first, so that embedding begins at once; then as many as amortise a call."""

_BIAS_MARGIN = 64
"""Distances past the longest sequence that a table of relative biases covers: vectors reach past a sequence's end."""


_optimizer_steps = 0
"""Steps of any optimizer in this process."""


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)

_forked = False
"""Whether this process was forked from one where torch had threads, and nothing was computed here since."""


def _after_fork() -> None:
    global _forked
    _forked = torch.get_num_threads() > 1


os.register_at_fork(after_in_child=_after_fork)


def settle_after_fork() -> None:
    """Let torch have one thread in a forked process: those it had do not survive a fork, and it would wait for them."""
    global _forked
    if _forked:
        _forked = False
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are gone, too
        logger.warning("this process was forked: texts are encoded on one thread here; a spawned one has them all")


def checked_dtype(value: Any) -> str:
    """`value`, a name or a torch dtype, as one of `DTYPES`.

    Raises:
        ValueError: another one.
    """
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {value!r}")
    return name


def problem(encoder: PackedEncoder) -> str | None:
    """Why the engine cannot serve `encoder`; None if it can (compiles the C++ kernels at the first call)."""
    weight = encoder.embeddings.tables()[0]
    if weight.device.type != "cpu":
        return f"it serves encoders on the CPU, not on {weight.device.type!r}"
    if weight.dtype != torch.float32:
        return f"it packs float32 parameters, not {weight.dtype}"
    if (selected := backend.select(weight)) != "cpp":
        return f"backend {selected!r} serves here"
    return None


class Parameters:
    """An encoder's parameters in a list, for as long as none of its modules is replaced."""

    def __init__(self, encoder: nn.Module) -> None:
        modules = list(encoder.modules())
        self._children = [m._modules for m in modules if m._modules]
        self._modules = [list(children.values()) for children in self._children]
        self._owners = [(m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None]

    def now(self) -> list[Tensor | None] | None:
        """The parameters as they are now; None where a module was replaced: they may then be nobody's."""
        if [list(children.values()) for children in self._children] != self._modules:
            return None
        return [owner.get(name) for owner, name in self._owners]


def _watch(encoder: nn.Module) -> Callable[[], bool]:
    """A function that tells whether all parameters, on the CPU, are still what they are at this call."""
    parameters = Parameters(encoder)
    tensors = [p for p in parameters.now() or () if p is not None]
    # A version counts what autograd sees of writing. It does not see a fused optimizer, whose steps are counted, nor
    # what is written through `.data`, which the bits of a few numbers of each parameter tell of.
    counted = [p for p in tensors if not p.is_inference()]
    views: list[Any] = [p.detach().contiguous().numpy().reshape(-1).view(np.int32) for p in tensors if p.numel()]
    numbers = [(memoryview(view), len(view) // 2) for view in views]

    def addresses() -> list[int]:
        return [p.data_ptr() for p in tensors]

    def versions() -> list[int]:
        return [_optimizer_steps, *[p._version for p in counted]]

    def samples() -> list[int]:
        return [bits for view, middle in numbers for bits in (view[0], view[middle], view[-1])]

    before = addresses(), versions(), samples()

    def unchanged() -> bool:
        if (now := parameters.now()) is None or not all(map(operator.is_, now, tensors)):
            return False
        # In this order: numbers are where they were only if the parameter is. A storage that is given other memory, to
        # be shared between processes for one, leaves views of the memory that it had, which may be gone.
        return addresses() == before[0] and versions() == before[1] and samples() == before[2]

    return unchanged


class Engine:
    """An encoder ready for inference on the CPU.

    Weights are packed at the first call, and again whenever a parameter has changed since.

    Args:
        encoder: a `PackedEncoder` with float32 parameters on the CPU.
        dtype: "float32"; "float16": weights take two bytes, everything is computed in float32; "bfloat16": products
            of bfloat16, sums and everything between products in float32; "int8": products of bytes (activations with a
            scale and a zero point for each token, weights with a scale for each output; nothing to calibrate). On
            processors with AMX "float32" multiplies fixed-point numbers of 24 bits with such scales and sums them
            exactly: errors are relative to a token's largest feature and to an output's largest weight. The weights of
            "float16" are then fixed-point numbers of 16 bits.

    Raises:
        TypeError: `encoder` is none. ValueError: an unknown dtype.
    """

    def __init__(self, encoder: PackedEncoder, dtype: str | torch.dtype = "float32") -> None:
        if not isinstance(encoder, PackedEncoder):
            raise TypeError(f"encoder: expected a triton_st.models.PackedEncoder, got {type(encoder).__name__}")
        self.encoder = encoder
        self.dtype = checked_dtype(dtype)
        self._prepared: tuple[Callable[[], bool], tuple[Tensor | None, ...]] | None = None

    @property
    def hidden_size(self) -> int:
        """Dimension of a token's state."""
        return self.encoder.architecture.hidden_size

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are made anew where a copy of the engine is used.
        return {"encoder": self.encoder, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["encoder"], state["dtype"])  # type: ignore[misc]

    # --- weights ------------------------------------------------------------------------------------------------------

    def _weights(self) -> tuple[Tensor | None, ...]:
        """Packed weights and embedding tables; made anew where a parameter has changed since they were."""
        if self._prepared is not None:
            unchanged, prepared = self._prepared
            if unchanged():
                return prepared
        if reason := problem(self.encoder):
            raise RuntimeError(f"the CPU engine cannot serve this encoder: {reason}")
        unchanged = _watch(self.encoder)
        a = self.encoder.architecture
        weights: list[Tensor] = list(self.encoder.embeddings.norm())
        for layer in self.encoder.layers():
            weights += layer.weights()
        plain = [weight.detach().contiguous() for weight in weights]
        if torch.ops.triton_st_cpp.encoder_scales_rows(DTYPES.index(self.dtype)):
            plain = _with_spreads(plain, self.encoder)
        elif self.dtype == "float16":  # a finite weight stays finite
            plain = [saturate(weight, torch.float16).float() for weight in plain]
        packed = torch.ops.triton_st_cpp.encoder_pack(
            DTYPES.index(self.dtype), a.layers, a.hidden_size, a.heads, a.intermediate_size, a.eps, plain
        )
        word, position, types = self.encoder.embeddings.tables()
        types = None if types is None else types.detach().contiguous()
        prepared = packed, word.detach().contiguous(), position.detach().contiguous(), types, self._position_bias()
        self._prepared = unchanged, prepared
        return prepared

    def _position_bias(self) -> Tensor | None:
        """[H, 2 P - 1], by query minus key from 1 - P on; None for a family without."""
        reach = self.encoder.max_length + _BIAS_MARGIN
        with torch.no_grad():
            bias = self.encoder.relative_bias(reach)
        return None if bias is None else bias.flip(1).contiguous()

    # --- batches ------------------------------------------------------------------------------------------------------

    def embed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        pooling: str | Sequence[str] = "mean",
        prompt_length: int = 0,
        normalize: bool = False,
        truncate_dim: int | None = None,
    ) -> Tensor:
        """Embed a packed batch.

        Args:
            input_ids: [T], integers. cu_seqlens: [B + 1], integers: 0, then the running total of lengths, ending at T.
            token_type_ids: [T]; all 0 by default.
            pooling: one of `triton_st.models.pooling.POOLING_MODES`, or several, whose vectors are laid side by side.
            prompt_length: leading tokens of every sequence that do not take part in pooling.
            normalize: scale each embedding to length 1, before it is truncated.
            truncate_dim: keep the first dimensions only.

        Returns:
            float32 [B, modes * D], or [B, truncate_dim].

        Raises:
            TypeError, ValueError: the batch is not packed as above, or an id or a length is out of range.
        """
        modes = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        if not modes or not set(modes) <= set(POOLING_MODES):
            raise ValueError(f"pooling: expected one or more of {', '.join(POOLING_MODES)}, got {pooling!r}")
        ids, offsets, types = self._checked(input_ids, cu_seqlens, token_type_ids)
        whole = len(modes) * self.encoder.architecture.hidden_size
        out = torch.empty(len(offsets) - 1, min(whole, truncate_dim or whole))
        self._forward(ids, offsets, types, modes, prompt_length, normalize, out)
        return out

    def states(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The last hidden states, float32 [T, D], of a packed batch. Arguments and errors as `embed`."""
        ids, offsets, types = self._checked(input_ids, cu_seqlens, token_type_ids)
        out = torch.empty(len(ids), self.encoder.architecture.hidden_size)
        self._forward(ids, offsets, types, (), 0, False, out)
        return out

    def dense(self, module: Dense, x: Tensor) -> Tensor:
        """`module` of embeddings x, float32 [B, in_features], each of which has the bits that it has alone."""
        return module.row_by_row(x, torch.ops.triton_st_cpp.encoder_dense)

    def _checked(
        self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        self.encoder.check_batch(input_ids, cu_seqlens, None, token_type_ids)
        types = None if token_type_ids is None else token_type_ids.int().contiguous()
        return input_ids.int().contiguous(), cu_seqlens.int().contiguous(), types

    def _forward(
        self,
        ids: Tensor,
        offsets: Tensor,
        types: Tensor | None,
        modes: Sequence[str],
        prompt_length: int,
        normalize: bool,
        out: Tensor,
    ) -> None:
        settle_after_fork()
        weights = self._weights()  # loads the kernels, too
        pooling = 0
        for mode in reversed(modes):
            pooling = pooling * 8 + 1 + POOLING_MODES.index(mode)
        torch.ops.triton_st_cpp.encoder_forward(
            *weights, self.encoder.architecture.position_offset, ids, offsets, types, pooling,
            prompt_length, normalize, out,
        )  # fmt: skip

    # --- texts --------------------------------------------------------------------------------------------------------

    def embed_texts(
        self,
        texts: Sequence[str],
        token_ids: Callable[[list[str]], list[list[int]]],
        out: Tensor,
        *,
        pooling: Sequence[str] = ("mean",),
        prompt_length: int = 0,
        normalize: bool = False,
        done: Callable[[int], object] | None = None,
    ) -> None:
        """Embed texts into the rows of `out`; while some are embedded, a thread tokenizes those that come next.

        Args:
            texts: n texts.
            token_ids: tokenizes a list of texts.
            out: float32 [n, at most modes * D], rows dense: truncated embeddings if it has fewer columns.
            pooling, prompt_length, normalize: as `embed`.
            done: called with the number of texts that were embedded, block by block.
        """

        def packed(block: slice) -> tuple[Tensor, Tensor]:
            lists = token_ids(list(texts[block]))
            offsets = np.zeros(len(lists) + 1, np.int32)
            np.cumsum([len(ids) for ids in lists], out=offsets[1:])
            flat = np.fromiter(itertools.chain.from_iterable(lists), np.int32, int(offsets[-1]))
            return torch.from_numpy(flat), torch.from_numpy(offsets)

        def embed(block: slice, batch: tuple[Tensor, Tensor]) -> None:
            self._forward(*batch, None, pooling, prompt_length, normalize, out[block])
            if done is not None:
                done(block.stop - block.start)

        blocks = list(_blocks(len(texts)))
        with contextlib.closing(ahead(packed, blocks)) as batches:
            for block, batch in zip(blocks, batches, strict=True):
                embed(block, batch)


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def ahead(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Generator[_Result]:
    """function(item) of each item in turn; while the caller works with one result, a thread makes the next.

    The thread ends with the iterator: close it where the loop may be left early.
    """
    if len(items) < 2:  # no thread for a few texts
        yield from map(function, items)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(function, items[0])
        for item in items[1:]:
            result, coming = coming.result(), thread.submit(function, item)
            yield result
        yield coming.result()


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def _with_spreads(weights: list[Tensor], encoder: PackedEncoder) -> list[Tensor]:
    """Put among the weights the factors of features that become numbers of few bits, as the C++ side expects them.

    Some features of a trained encoder are many times larger than the others, in every token, and would leave those few
    of a token's steps. Each is divided by a power of two, by which the weights that it meets are multiplied: the root
    of how large it gets over how large those weights are (Xiao et al., "SmoothQuant",
    https://arxiv.org/abs/2211.10438). Which features these are shows on random tokens, so that nothing has to be
    calibrated. Tokens whose embeddings are not finite show nothing: they must not reach the texts that do not hold
    them.
    """
    a = encoder.architecture
    gain, shift, *rest = weights
    word, position, types = encoder.embeddings.tables()
    length = min(16, a.longest)
    ids = torch.randint(a.vocab_size, (16, length), generator=torch.Generator().manual_seed(0))
    result: list[Tensor] = []
    linear = torch.ops.triton_st_cpp.encoder_dense  # libraries' products keep more memory than all these weights take

    def factors(features: Tensor, *fed: Tensor) -> Tensor:
        """By how much features [tokens, K] are to be divided before they meet weights [N, K]."""
        sizes = features.abs().amax(0).clamp(min=1e-3)
        met = torch.stack([torch.maximum(w.amax(0), -w.amin(0)) for w in fed]).amax(0).clamp(min=1e-4)
        factor = (sizes / met).sqrt().log2().round().exp2()
        return torch.where(factor.isfinite() & (factor > 0), factor, 1.0)

    def outlying_factors(features: Tensor, fed: Tensor) -> Tensor:
        """The same where every token has large features of its own: of those alone that are far from the others'."""
        factor = factors(features, fed)
        factor = factor / factor.median()
        return torch.where((factor > 8) | (factor < 1 / 8), factor, 1.0)

    def add_norm(gain: Tensor, shift: Tensor, hidden: Tensor, *fed: Tensor) -> None:
        result.extend((gain, shift, gain / factors(hidden - shift, *fed)))

    hidden = word[ids] + position[a.position_offset :][:length]
    if types is not None:
        hidden = hidden + types[0]
    norm = gain, shift
    hidden = F.layer_norm(hidden, (a.hidden_size,), *norm, a.eps).nan_to_num(0.0, 0.0, 0.0).flatten(0, 1)
    for i in range(0, len(rest), len(LayerWeights._fields)):
        w = LayerWeights(*rest[i : i + len(LayerWeights._fields)])
        add_norm(*norm, hidden, w.query_weight, w.key_weight, w.value_weight)
        projected = [
            linear(hidden, weight, bias).view(*ids.shape, a.heads, -1).transpose(1, 2)
            for weight, bias in (w[0:2], w[2:4], w[4:6])
        ]
        attended = F.scaled_dot_product_attention(*projected).transpose(1, 2).reshape(hidden.shape)
        result.extend((outlying_factors(attended, w.projection_weight), *w[:8]))
        hidden = hidden + linear(attended, w.projection_weight, w.projection_bias)
        hidden = F.layer_norm(hidden, (a.hidden_size,), w.attention_norm_weight, w.attention_norm_bias, a.eps)
        add_norm(w.attention_norm_weight, w.attention_norm_bias, hidden, w.up_weight)
        fed = torch.ops.triton_st_cpp.bias_gelu(linear(hidden, w.up_weight, None), w.up_bias)
        result.extend((outlying_factors(fed, w.down_weight), *w[10:14]))
        norm = w.output_norm_weight, w.output_norm_bias
        hidden = hidden + linear(fed, w.down_weight, w.down_bias)
        hidden = F.layer_norm(hidden, (a.hidden_size,), *norm, a.eps)
    return [*result, *norm, norm[0]]  # the last LayerNorm feeds no product


def _blocks(n: int) -> Iterator[slice]:
    """Cut n texts into growing blocks."""
    start, size = 0, _FIRST_BLOCK
    while start < n:
        stop = n if n - start <= size else start + size
        yield slice(start, stop)
        start, size = stop, min(2 * size, _LARGEST_BLOCK)
