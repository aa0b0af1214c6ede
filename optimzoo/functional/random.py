"""Random numbers that depend on their arguments alone: the same on every rank, after a resume, under `torch.compile`.

Nothing here reads or moves a global generator. Host-side choices (which columns, which block) take a private
`generator`; draws inside a compiled or fake step take `uniform`, an integer hash of (seed, position).
"""

import zlib
from typing import Any

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def fold(seed: int, *parts: int | str) -> int:
    """Mix `seed` with numbers and names into one non-negative 63-bit seed.

    Strings enter by CRC-32, never by `hash()`, which differs from process to process.
    """
    state = _scramble(seed & _MASK64)
    for part in parts:
        state = _scramble(state ^ (zlib.crc32(part.encode()) if isinstance(part, str) else part & _MASK64))
    return state >> 1


def _scramble(x: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit numbers in which every input bit moves every output bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def generator(seed: int) -> torch.Generator:
    """A private CPU generator."""
    return torch.Generator().manual_seed(seed)


def hash32(n: int, seed: int | Tensor, device: torch.device | None = None, first: int = 0) -> Tensor:
    """(n,) int64 holding independent-looking 32-bit unsigned numbers of (seed, position), positions from `first` on.

    `seed` may be a 0-dim int64 tensor, so that a compiled step does not recompile when it changes.
    """
    # Scrambled first: neighbouring seeds would otherwise give the same numbers in another order.
    low = _finalise(seed & 0xFFFFFFFF)
    high = _finalise(((seed >> 32) & 0x7FFFFFFF) ^ low ^ 0x5BD1E995)  # unlike what position 0 makes of `low`
    x = torch.arange(first, first + n, dtype=torch.int64, device=device)
    x = _finalise(x.bitwise_xor_(low))
    return _finalise(x.bitwise_xor_(high))


def _finalise(x: Any) -> Any:
    """A 32-bit finaliser of an int or int64 tensor; multipliers below 2^31, so that no product overflows."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return x ^ (x >> 16)


def hash16(n: int, seed: int | Tensor, device: torch.device | None = None, first: int = 0) -> Tensor:
    """(n,) int64 holding 16-bit unsigned numbers of (seed, position), positions from `first` on.

    Two from each hash, which is what costs time.
    """
    start, odd = divmod(first, 2)
    pairs = hash32(-(-(n + odd) // 2), seed, device, start)
    return torch.stack([pairs & 0xFFFF, pairs >> 16], 1).view(-1)[odd : odd + n]


def uniform(n: int, seed: int | Tensor, device: torch.device | None = None) -> Tensor:
    """(n,) float32 in [0, 1), a function of (seed, position) alone."""
    return (hash32(n, seed, device) >> 8).to(torch.float32).mul_(2.0**-24)
