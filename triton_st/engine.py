"""CPU inference: an encoder's weights packed once, then packed sequences in and embeddings out, one call for a batch.

The C++ side (`csrc/encoder.cpp`) takes each sequence through all layers in a thread's own cache. A sequence's result is
the same to the last bit alone, in any batch, at any place and with any number of threads, in each precision.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from triton_st import backend
from triton_st.models.encoder import LayerWeights, PackedEncoder
from triton_st.models.pooling import POOLING_MODES
from triton_st.reference.normalize import saturate

DTYPES = ("float32", "float16", "bfloat16", "int8")
"""Precisions, in the order in which the C++ side numbers them."""

_FIRST_BLOCK, _LARGEST_BLOCK = 128, 2048
"""Texts tokenized at a time: few at first, so that embedding begins at once; then as many as amortise a call."""

_BIAS_MARGIN = 64
"""Distances past the longest sequence that a table of relative biases covers: vectors reach past a sequence's end."""


_optimizer_steps = 0
"""Steps of any optimizer in this process."""


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


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
    weight = encoder.embeddings.word_embeddings.weight
    if weight.device.type != "cpu":
        return f"it serves encoders on the CPU, not on {weight.device.type!r}"
    if weight.dtype != torch.float32:
        return f"it packs float32 parameters, not {weight.dtype}"
    if (selected := backend.select(weight)) != "cpp":
        return f"backend {selected!r} serves here"
    return None


class Engine:
    """An encoder ready for inference on the CPU.

    Weights are packed at the first call, and again whenever a parameter has changed since.

    Args:
        encoder: a `PackedEncoder` with float32 parameters on the CPU.
        dtype: "float32"; "float16": weights are stored in half, everything is computed in float32; "bfloat16": products
            of bfloat16, sums and everything between products in float32; "int8": products of bytes (activations with a
            scale and a zero point for each token, weights with a scale for each output; nothing to calibrate).

    Raises:
        TypeError: `encoder` is none. ValueError: an unknown dtype.
    """

    def __init__(self, encoder: PackedEncoder, dtype: str | torch.dtype = "float32") -> None:
        if not isinstance(encoder, PackedEncoder):
            raise TypeError(f"encoder: expected a triton_st.models.PackedEncoder, got {type(encoder).__name__}")
        self.encoder = encoder
        self.dtype = checked_dtype(dtype)
        self._packed: Tensor | None = None
        self._tables: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
        self._state: list[Any] = []
        self._owners: list[tuple[dict[str, Any], str]] = []
        self._values: list[memoryview] = []  # of every parameter
        self._children: list[tuple[dict[str, nn.Module | None], list[nn.Module | None]]] = []

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

    def _current_state(self) -> list[Any]:
        """What changes when a module or a parameter is replaced, moved or written to.

        A version counts what autograd sees. It sees neither a fused optimizer, whose steps are counted apart, nor what
        is written through `.data`, of which a few numbers of each parameter tell.
        """
        if any(list(children.values()) != before for children, before in self._children):
            return []  # the parameters below may be nobody's
        parameters = [owner.get(name) for owner, name in self._owners]
        state: list[Any] = [
            None if p is None else (0 if p.is_inference() else p._version, p.data_ptr()) for p in parameters
        ]
        state.append(_optimizer_steps)
        state += [values[i] for values in self._values for i in (0, len(values) // 2, -1)]
        return state

    def prepare(self) -> None:
        """Pack the weights unless that is done and no parameter has changed since."""
        if self._packed is not None and self._current_state() == self._state:
            return
        if reason := problem(self.encoder):
            raise RuntimeError(f"the CPU engine cannot serve this encoder: {reason}")
        modules = list(self.encoder.modules())
        self._children = [(m._modules, list(m._modules.values())) for m in modules]
        self._owners = [(m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None]
        parameters = [owner[name] for owner, name in self._owners]
        self._values = [memoryview(p.detach().contiguous().numpy().reshape(-1)) for p in parameters if p.numel()]
        state = self._current_state()
        a = self.encoder.architecture
        embeddings = self.encoder.embeddings
        weights: list[Tensor] = [embeddings.LayerNorm.weight, embeddings.LayerNorm.bias]
        for layer in self.encoder.layers():
            weights += layer.weights()
        plain = [weight.detach().contiguous() for weight in weights]
        if self.dtype == "float16":  # a finite weight stays finite
            plain = [saturate(weight, torch.float16).float() for weight in plain]
        if self.dtype == "int8":
            plain = _with_spreads(plain, self.encoder)
        self._packed = torch.ops.triton_st_cpp.encoder_pack(
            DTYPES.index(self.dtype), a.layers, a.hidden_size, a.heads, a.intermediate_size, a.eps, plain
        )
        types: Tensor | None = None
        if a.token_types:
            types = embeddings.token_type_embeddings.weight.detach().contiguous()
        word, position = embeddings.word_embeddings.weight, embeddings.position_embeddings.weight
        self._tables = (word.detach().contiguous(), position.detach().contiguous(), types, self._position_bias())
        self._state = state

    def _position_bias(self) -> Tensor | None:
        """[H, 2 P - 1], by query minus key from 1 - P on; None for a family without."""
        reach = self.encoder.max_length + _BIAS_MARGIN
        with torch.no_grad():
            biased = self.encoder.biased_attention(torch.tensor([0, reach], dtype=torch.int32), reach)
        return None if biased is None else biased.bias.flip(1).contiguous()

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

    def _checked(
        self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        a = self.encoder.architecture
        for name, tensor in (("input_ids", input_ids), ("cu_seqlens", cu_seqlens), ("token_type_ids", token_type_ids)):
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{name}: expected an integer tensor, got {getattr(tensor, 'dtype', type(tensor))}")
            if tensor.dim() != 1:
                raise ValueError(f"{name}: expected one dimension, got shape {tuple(tensor.shape)}")
        offsets = cu_seqlens.int().contiguous()
        lengths = offsets.diff()
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(input_ids) or (lengths < 0).any():
            raise ValueError(f"cu_seqlens: expected ascending offsets from 0 to {len(input_ids)}, the number of tokens")
        if len(lengths) and (longest := int(lengths.max())) > a.longest:
            raise ValueError(f"cu_seqlens: expected sequences of at most {a.longest} tokens, got one of {longest}")
        if token_type_ids is not None and (not a.token_types or token_type_ids.shape != input_ids.shape):
            what = f"shape {tuple(input_ids.shape)}" if a.token_types else "None, as the model has no token types"
            raise ValueError(f"token_type_ids: expected {what}, got shape {tuple(token_type_ids.shape)}")
        for name, ids, size in (
            ("input_ids", input_ids, a.vocab_size),
            ("token_type_ids", token_type_ids, a.token_types),
        ):
            if ids is not None and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < size):
                raise ValueError(f"{name}: expected ids from 0 to {size - 1}, got {ids.min()} to {ids.max()}")
        types = None if token_type_ids is None else token_type_ids.int().contiguous()
        return input_ids.int().contiguous(), offsets, types

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
        self.prepare()
        assert self._tables is not None
        pooling = 0
        for mode in reversed(modes):
            pooling = pooling * 8 + 1 + POOLING_MODES.index(mode)
        torch.ops.triton_st_cpp.encoder_forward(
            self._packed, *self._tables, self.encoder.architecture.position_offset, ids, offsets, types, pooling,
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
        if len(blocks) == 1:  # no thread for a few texts
            embed(blocks[0], packed(blocks[0]))
            return
        with ThreadPoolExecutor(1) as tokenizing:
            coming = [tokenizing.submit(packed, block) for block in blocks[:1]]
            for i, block in enumerate(blocks):
                batch = coming.pop().result()
                coming += [tokenizing.submit(packed, following) for following in blocks[i + 1 : i + 2]]
                embed(block, batch)


def _with_spreads(weights: list[Tensor], encoder: PackedEncoder) -> list[Tensor]:
    """Put behind each LayerNorm's gain and shift the factors of its normalised features before they become bytes.

    Some features of a trained encoder are many times larger than the others, in every token, and would leave those few
    of the 256 steps. Each is divided by a power of two, by which the weights that it meets are multiplied: the root of
    how large it gets over how large those weights are (Xiao et al., "SmoothQuant", https://arxiv.org/abs/2211.10438).
    Which features these are shows on random tokens, so that nothing has to be calibrated.
    """
    a = encoder.architecture
    gain, shift, *rest = weights
    embeddings = encoder.embeddings
    length = min(16, a.longest)
    ids = torch.randint(a.vocab_size, (16, length), generator=torch.Generator().manual_seed(0))
    result: list[Tensor] = []

    def add_norm(gain: Tensor, shift: Tensor, hidden: Tensor, *fed: Tensor) -> None:
        sizes = (hidden - shift).abs().amax((0, 1)).clamp(min=1e-3)
        met = torch.stack([weight.abs().amax(0) for weight in fed]).amax(0).clamp(min=1e-4)
        result.extend((gain, shift, gain / (sizes / met).sqrt().log2().round().exp2()))

    with torch.no_grad():
        positions = embeddings.position_embeddings.weight[a.position_offset :][:length]
        hidden = embeddings.word_embeddings.weight[ids] + positions
        if a.token_types:
            hidden = hidden + embeddings.token_type_embeddings.weight[0]
        norm = gain, shift
        hidden = F.layer_norm(hidden, (a.hidden_size,), *norm, a.eps)
        for i in range(0, len(rest), len(LayerWeights._fields)):
            w = LayerWeights(*rest[i : i + len(LayerWeights._fields)])
            add_norm(*norm, hidden, w.query_weight, w.key_weight, w.value_weight)
            projected = [
                F.linear(hidden, weight, bias).unflatten(-1, (a.heads, -1)).transpose(1, 2)
                for weight, bias in (w[0:2], w[2:4], w[4:6])
            ]
            attended = F.scaled_dot_product_attention(*projected).transpose(1, 2).flatten(2)
            hidden = hidden + F.linear(attended, w.projection_weight, w.projection_bias)
            hidden = F.layer_norm(hidden, (a.hidden_size,), w.attention_norm_weight, w.attention_norm_bias, a.eps)
            result.extend(w[:8])
            add_norm(w.attention_norm_weight, w.attention_norm_bias, hidden, w.up_weight)
            fed = F.linear(F.gelu(F.linear(hidden, w.up_weight, w.up_bias)), w.down_weight, w.down_bias)
            norm = w.output_norm_weight, w.output_norm_bias
            hidden = F.layer_norm(hidden + fed, (a.hidden_size,), *norm, a.eps)
            result.extend(w[10:14])
    return [*result, *norm, norm[0]]  # the last LayerNorm feeds no product


def _blocks(n: int) -> Iterator[slice]:
    """Cut n texts into growing blocks."""
    start, size = 0, _FIRST_BLOCK
    while start < n:
        stop = n if n - start <= size else start + size
        yield slice(start, stop)
        start, size = stop, min(2 * size, _LARGEST_BLOCK)
