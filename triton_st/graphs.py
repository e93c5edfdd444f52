"""Inference on a GPU: packed batches padded to a few sizes, each of them captured once as a CUDA graph, then replayed.

An encoder is a hundred short kernels, and launching them one by one takes longer than a small batch takes to compute.
A graph launches them all at once, but always with the same shapes and addresses: so a batch is padded with sequences of
its own, which no text's result depends on, and copied to where the graph of its size reads.

Reference: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_st import backend
from triton_st.engine import Parameters
from triton_st.models.encoder import PackedEncoder
from triton_st.models.packing import Features, to_device

logger = logging.getLogger(__name__)

TOKENS = (*(size << i for i in range(10) for size in (16, 24)), 16_384)
"""Sizes that the number of tokens is rounded up to, two an octave; what is larger keeps a GPU busy without a graph."""

SEQUENCES = (8, 32, 128, 512, 2048, 8192)
"""Sizes for the number of sequences, padding included: an empty one costs next to nothing, so there are few."""

_WARM_UPS = 3
"""Passes before a capture, as torch's notes have it: kernels are compiled and libraries take their memory in them."""


class Bucket(NamedTuple):
    """A size that batches are padded to."""

    tokens: int
    sequences: int


def bucket_of(tokens: int, sequences: int, longest: int) -> Bucket | None:
    """The smallest bucket for a batch, where padding too is cut into sequences of at most `longest`; None: no graph."""
    size = _round_up(TOKENS, tokens)
    if tokens == 0 or size is None:
        return None
    room = _round_up(SEQUENCES, sequences + -(-(size - tokens) // longest))
    return None if room is None else Bucket(size, room)


def _round_up(sizes: tuple[int, ...], n: int) -> int | None:
    i = bisect.bisect_left(sizes, n)
    return sizes[i] if i < len(sizes) else None


def pad(features: Features, bucket: Bucket, longest: int) -> tuple[Tensor, Tensor]:
    """`input_ids` [bucket.tokens] and `cu_seqlens` [bucket.sequences + 1] of a batch on the CPU, padded behind its end.

    Padding repeats the last token, which the model must embed anyway, in sequences of at most `longest` tokens and then
    in empty ones.
    """
    ids, offsets = features["input_ids"], features["cu_seqlens"]
    tokens = len(ids)
    padded = ids[-1:].expand(bucket.tokens).clone()
    padded[:tokens] = ids
    starts = torch.full((bucket.sequences + 1,), bucket.tokens, dtype=torch.int32)
    starts[: len(offsets)] = offsets
    ends = torch.tensor(range(tokens + longest, bucket.tokens, longest), dtype=torch.int32)
    starts[len(offsets) : len(offsets) + len(ends)] = ends
    return padded, starts


Capture = Callable[[Callable[[], None], Any, Any], Callable[[], None]]
"""From work, a stream and a memory pool to what does the work again."""


def capture(work: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> Callable[[], None]:
    """A CUDA graph of `work`, which must not wait for the GPU. To be replayed on `stream`.

    The stream is the current one. Another thread may use the GPU meanwhile: only what this one does is captured.
    """
    for _ in range(_WARM_UPS):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


class GraphedEncoder:
    """An encoder on a GPU whose passes over small batches are CUDA graphs. Threads may share it.

    Graphs are captured again where the encoder has other parameters than it had; what is written into them it sees.
    They share one pool of memory: each writes everything that it reads there, and they run one after another.

    Args:
        encoder: a `PackedEncoder` with float32 parameters.
        dtype: of the activations.
        capture: stands for `capture` above, for tests where there is no GPU.
    """

    def __init__(self, encoder: PackedEncoder, dtype: torch.dtype, capture: Capture = capture) -> None:
        self.encoder = encoder
        self.dtype = dtype
        self._capture = capture
        self._lock = threading.Lock()
        self._parameters = Parameters(encoder)
        self._failure: str | None = None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # Graphs belong to this process and this encoder: a copy captures its own.
        return {"encoder": self.encoder, "dtype": self.dtype, "capture": self._capture}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _forget(self) -> None:
        self._replays: dict[Bucket, Callable[[], None]] = {}
        self._addresses: list[int] = []
        self._input_ids = self._cu_seqlens = self._states = torch.empty(0)
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def problem(self) -> str | None:
        """Why this encoder's passes cannot be captured; None if they can."""
        if self._failure is not None:
            return self._failure
        if (selected := backend.select(self.encoder.embeddings.tables()[0])) != "triton":
            return f"backend {selected!r} serves here"
        return None

    def states(self, features: Features) -> Tensor:
        """Last hidden states [T, D] on the encoder's device of a packed batch on the CPU that is known to be right."""
        bucket = bucket_of(len(features["input_ids"]), len(features["cu_seqlens"]) - 1, self.encoder.max_length)
        if bucket is not None and self.problem() is None:
            with self._lock, torch.inference_mode():
                if (states := self._replayed(features, bucket)) is not None:
                    return states
        with torch.inference_mode():
            return eager_states(self.encoder, features, self.dtype)

    def _replayed(self, features: Features, bucket: Bucket) -> Tensor | None:
        """None where it turned out that nothing can be captured."""
        self._follow()
        tokens = len(features["input_ids"])
        input_ids, cu_seqlens = pad(features, bucket, self.encoder.max_length)
        with _running_on(self._stream) as caller:
            # One stream for all: a batch is copied to its place once the graph before it has read its own.
            self._input_ids[: bucket.tokens].copy_(input_ids, non_blocking=True)
            self._cu_seqlens[: bucket.sequences + 1].copy_(cu_seqlens, non_blocking=True)
            if bucket not in self._replays and not self._captured(bucket):
                return None
            self._replays[bucket]()
            states = self._states[:tokens].clone()
            if caller is not None:
                states.record_stream(caller)
        return states

    def _captured(self, bucket: Bucket) -> bool:
        try:
            self._replays[bucket] = self._capture(self._work(bucket), self._stream, self._pool)
        except RuntimeError as error:  # of CUDA or one of its libraries
            logger.warning("CUDA graphs are not used from here on: %s", error)
            self._failure = str(error)
            self._forget()
            return False
        self._addresses = self._current_addresses()  # the first pass lays some parameters side by side
        return True

    def _work(self, bucket: Bucket) -> Callable[[], None]:
        input_ids = self._input_ids[: bucket.tokens]
        cu_seqlens = self._cu_seqlens[: bucket.sequences + 1]
        states = self._states[: bucket.tokens]

        def work() -> None:
            states.copy_(self.encoder.states(input_ids, cu_seqlens, self.encoder.max_length, None, False, self.dtype))

        return work

    def _current_addresses(self) -> list[int]:
        return [0 if p is None else p.data_ptr() for p in self._parameters.now() or ()]

    def _follow(self) -> None:
        """Forget graphs of other parameters, and make room for batches."""
        device = self.encoder.embeddings.tables()[0].device
        if self._parameters.now() is None:
            self._parameters = Parameters(self.encoder)
            self._addresses = []
        if not self._addresses or self._current_addresses() != self._addresses:
            self._forget()
            self._input_ids = torch.empty(TOKENS[-1], dtype=torch.int64, device=device)
            self._cu_seqlens = torch.empty(SEQUENCES[-1] + 1, dtype=torch.int32, device=device)
            hidden_size = self.encoder.architecture.hidden_size
            self._states = torch.empty(TOKENS[-1], hidden_size, dtype=self.dtype, device=device)
            if device.type == "cuda":
                self._stream = torch.cuda.Stream(device)
                self._pool = torch.cuda.graph_pool_handle()


@contextlib.contextmanager
def _running_on(stream: torch.cuda.Stream | None) -> Iterator[torch.cuda.Stream | None]:
    """Work on `stream` inside the block, in its place in the order of the caller's stream, which is given."""
    if stream is None:
        yield None
        return
    with torch.cuda.device(stream.device):
        caller = torch.cuda.current_stream()
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            yield caller
        caller.wait_stream(stream)


def eager_states(encoder: PackedEncoder, features: Features, dtype: torch.dtype) -> Tensor:
    """Last hidden states [T, D] in `dtype` of a packed batch that is known to be right, without dropout."""
    features = to_device(features, encoder.embeddings.tables()[0].device)
    return encoder.states(
        features["input_ids"], features["cu_seqlens"], features["max_seqlen"], None, dropout=False, dtype=dtype
    )
