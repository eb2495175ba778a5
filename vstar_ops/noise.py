"""Counter-based Gumbel noise: the same number for the same (seed, node, token), everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(seed: Tensor, node: Tensor, token: Tensor) -> Tensor:
    """First 32-bit word of Philox4x32-10 with key ``seed`` and counter ``(node, token, 0, 0)``.

    Philox is the generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    All arguments are int64 and broadcast; the result is int64 in ``[0, 2^32)``.
    """
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = node & _MASK, token & _MASK, torch.zeros_like(node), torch.zeros_like(node)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wrap around, the low 64 bits are right
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ key0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0


def gumbel(seed: Tensor, node: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise in float64: ``-log(-log(1 - u))`` with ``u = (philox + 1/2) / 2^32``."""
    uniform = (philox(seed, node, token).to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def derive_seeds(seed: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 ``[count]``: the first ``count`` outputs of SplitMix64 from the state ``seed``."""
    state = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB + seed
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return state ^ ((state >> 31) & 0x1FFFFFFFF)
