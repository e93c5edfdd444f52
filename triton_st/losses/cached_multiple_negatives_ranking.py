"""In-batch contrastive loss of batches whose activations do not fit: gradients are cached at the embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states
from tqdm.auto import tqdm

from triton_st import util
from triton_st.losses.columns import batch_size, check_columns, embed, lengths, slice_rows
from triton_st.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss, Prefixes
from triton_st.models.packing import Features

if TYPE_CHECKING:
    from triton_st.sentence_transformer import SentenceTransformer


class CachedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` of a batch that is embedded in mini-batches, twice.

    Every mini-batch is embedded without a graph; the loss of the whole batch gives the gradient of each embedding;
    `backward` embeds each mini-batch again, with the dropout it had, and carries that gradient on. Activations are held
    of one mini-batch at a time. The loss itself holds no matrix of similarities, so that B is bound by the embeddings.

    Args:
        model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength: as `MultipleNegativesRankingLoss`.
        mini_batch_size: texts in a mini-batch.
        mini_batch_num_tokens: cut mini-batches by tokens instead: as many texts as have this many, at least one.
        show_progress_bar: show one of the mini-batches.
        ours: `margin`, `margin_strategy`, `false_negatives`, `diagnostics`, as `MultipleNegativesRankingLoss`.

    Raises:
        ValueError: also where `mini_batch_size` or `mini_batch_num_tokens` is not positive.

    Reference: Gao et al., https://arxiv.org/abs/2101.06983;
    https://sbert.net/docs/package_reference/sentence_transformer/losses.html#cachedmultiplenegativesrankingloss
    """

    def __init__(
        self,
        model: SentenceTransformer | nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        **ours: Any,
    ) -> None:
        super().__init__(
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
            **ours,
        )
        if mini_batch_size < 1:
            raise ValueError(f"mini_batch_size: expected a positive int, got {mini_batch_size}")
        if mini_batch_num_tokens is not None and mini_batch_num_tokens < 1:
            raise ValueError(f"mini_batch_num_tokens: expected a positive int or None, got {mini_batch_num_tokens}")
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None, prefixes: Prefixes | None = None
    ) -> Tensor:
        """As `MultipleNegativesRankingLoss.forward`; `backward` of the result, with any factor, may be called once."""
        columns = list(sentence_features)
        sizes = [batch_size(column) for column in columns]
        check_columns(sizes)
        ids = self.ids_of(columns)
        parts = [slice_rows(column, *part) for column in columns for part in self._parts(column)]
        wants_gradient = torch.is_grad_enabled()
        replays: list[_Replay] = []
        embedded = []
        with torch.no_grad():
            for part in tqdm(parts, desc="Embed mini-batches") if self.show_progress_bar else parts:
                replays.append(_Replay(self.model, part))
                embedded.append(embed(self.model, [part]))
        embeddings = torch.cat(embedded).requires_grad_(wants_gradient)
        loss = self.loss_of(embeddings, sizes[0], ids, prefixes)
        if not wants_gradient:
            return loss
        (gradient,) = torch.autograd.grad(loss, embeddings)
        pieces = gradient.split([len(x) for x in embedded])
        value = loss.detach().requires_grad_()
        value.register_hook(lambda factor: _carry_on(self.model, replays, pieces, factor))
        return value

    def _parts(self, column: Features) -> Iterator[tuple[int, int]]:
        """Where the mini-batches of a column begin and end."""
        size = batch_size(column)
        if self.mini_batch_num_tokens is None:
            for begin in range(0, size, self.mini_batch_size):
                yield begin, min(begin + self.mini_batch_size, size)
            return
        begin = tokens = 0
        for end, length in enumerate(lengths(column)):
            if end > begin and tokens + length > self.mini_batch_num_tokens:
                yield begin, end
                begin, tokens = end, 0
            tokens += length
        if size:
            yield begin, size

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card states them."""
        return super().get_config_dict() | {
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper that the caching comes from."""
        return """
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""


class _Replay:
    """A mini-batch, and what it takes to embed it again just so: torch's random numbers and the activations' dtype."""

    def __init__(self, model: nn.Module, part: Features) -> None:
        self.model, self.part = model, part
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(*part.values())
        self.dtype = getattr(getattr(model, "encoder", None), "activation_dtype", None)

    def embed(self) -> Tensor:
        activations = self.model.activations_in(self.dtype) if self.dtype else contextlib.nullcontext()  # type: ignore[operator]
        with torch.random.fork_rng(devices=self.devices), activations:
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states)
            return embed(self.model, [self.part])


def _carry_on(model: nn.Module, replays: Sequence[_Replay], gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Embed every mini-batch again and go backward from it with its gradient times `factor`."""
    for i, (replay, gradient) in enumerate(zip(replays, gradients, strict=True)):
        last = i == len(replays) - 1  # DistributedDataParallel averages gradients once, when all are there
        alone = isinstance(model, DistributedDataParallel) and not last
        with torch.enable_grad(), model.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            embeddings = replay.embed()
            embeddings.backward((gradient.float() * factor).to(embeddings.dtype))
