"""Dropout's random bits: the published generator, the layout of elements, the same bits everywhere, the right share."""

from __future__ import annotations

import pytest
import torch
from operator_checks import seed
from serving import every_backend, serving

from triton_st import ops
from triton_st.reference import philox

SEED_NEGATIVE = -(2**62) - 12345


def test_known_answers() -> None:
    """The vectors that come with Random123, as far as our counters reach: the fourth word of ours is always 0."""
    words = philox.philox(torch.tensor(0), 0, torch.tensor([0]))
    assert [hex(word) for word in words[0].tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def plain(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox-4x32-10 in Python's integers."""
    low, high = key & 0xFFFFFFFF, key >> 32
    a, b, c, d = counter
    for _ in range(10):
        even, odd = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (odd >> 32) ^ b ^ low, odd & 0xFFFFFFFF, (even >> 32) ^ d ^ high, even & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


@pytest.mark.parametrize("key", [0, 1, 2**32, 2**63 - 1, -1, -(2**63), -987654321])
def test_every_bit_of_seed_stream_and_group_counts(key: int) -> None:
    groups = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3]
    for stream in (0, 1, 2**31 + 5):
        words = philox.philox(torch.tensor(key), stream, torch.tensor(groups))
        for group, row in zip(groups, words.tolist(), strict=True):
            assert row == plain(key & (2**64 - 1), (group & 0xFFFFFFFF, group >> 32, stream, 0))


def test_a_row_begins_with_a_group() -> None:
    mask = philox.keep_mask(seed(), 3, torch.tensor([0, 1]), 6, 6, 0.5)
    words = philox.philox(seed(), 3, torch.arange(4)).view(2, 8)
    assert torch.equal(mask, words[:, :6] >= 2**31)


def kept(rows: int, columns: int, dropout_p: float, key: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Which elements an operator keeps. The embeddings' dropout is its last step; here all that precedes it is 1."""
    device = key.device
    zeros, ones = torch.zeros(1, columns, device=device), torch.ones(columns, device=device)
    out = ops.embedding_layer_norm(
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.tensor([0, *range(1, rows + 1)], device=device),
        zeros,
        zeros,
        None,
        ones,
        ones,
        1e-12,
        dropout_p=dropout_p,
        seed=key,
        stream=stream,
    )
    assert torch.equal(out, torch.where(out != 0, torch.tensor(1 / (1 - dropout_p), device=device).float(), out))
    return out != 0


@every_backend
@pytest.mark.parametrize("columns", [1, 3, 4, 50, 63, 64, 65, 130])
def test_the_same_bits_on_every_backend(name: str, columns: int, device: torch.device) -> None:
    rows = torch.arange(70)
    for key, stream in ((SEED_NEGATIVE, 0), (7, 9)):
        expected = philox.keep_mask(torch.tensor(key), stream, rows, columns, columns, 0.3)
        with serving(name, "embedding_layer_norm_forward", device=device):
            assert torch.equal(kept(70, columns, 0.3, torch.tensor(key, device=device), stream).cpu(), expected)


@every_backend
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_right_share_is_kept(name: str, dropout_p: float, device: torch.device) -> None:
    rows, columns = 64, 512
    with serving(name, "embedding_layer_norm_forward", device=device):
        mask = kept(rows, columns, dropout_p, seed(device)).double()
        other = kept(rows, columns, dropout_p, seed(device), stream=1).double()
    deviation = (dropout_p * (1 - dropout_p) / (rows * columns)) ** 0.5
    assert abs(mask.mean().item() - (1 - dropout_p)) < 5 * deviation
    both = (mask * other).mean().item()  # two streams are independent
    assert abs(both - (1 - dropout_p) ** 2) < 5 * ((1 - dropout_p) ** 2 / (rows * columns)) ** 0.5


@every_backend
def test_probabilities_at_the_ends(name: str, device: torch.device) -> None:
    x = torch.randn(5, 6, device=device)
    weight, bias = torch.ones(6, device=device), torch.zeros(6, device=device)

    def run(dropout_p: float) -> torch.Tensor:
        return ops.dropout_add_layer_norm(x, x.flip(0), weight, bias, 1e-12, dropout_p=dropout_p, seed=seed(device))

    with serving(name, "dropout_add_layer_norm_forward", device=device):
        expected = torch.nn.functional.layer_norm(x.flip(0), (6,), eps=1e-12)
        torch.testing.assert_close(run(1.0), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            run(2.0**-40), torch.nn.functional.layer_norm(x + x.flip(0), (6,), eps=1e-12), rtol=1e-4, atol=1e-5
        )
