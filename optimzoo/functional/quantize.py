"""Eight bits an element: codes, and one float32 scale for every block of them.

A block is `BLOCK` neighbours in row-major order, s the largest magnitude in it.

    signed    x = s sign(c) (|c| / 127)^2      c in -127..127
    unsigned  x = s (c / 255)^4                c in 0..255, and 0 only where x is 0

Powers, because averages of gradients span decades within a block: the steps of a straight line are as large as most of
its elements. Two codes are neighbours of x, and chance picks one so that x is the mean: rounded to nearest, an average
that changes by a thousandth a step would stand still. Blocks: Dettmers et al. 2022, arXiv:2110.02861.
"""

import torch
from torch import Tensor

from optimzoo.functional.random import hash16
from optimzoo.functional.slices import pieces

BLOCK = 128
_CHUNK = 1 << 16  # elements handled at a time, whole blocks: temporaries do not grow with the tensor


def blocks(n: int) -> int:
    """The number of scales that n elements need."""
    return -(-n // BLOCK)


def block_part(part: slice) -> slice:
    """The scales of a part of a tensor that begins with a block."""
    return slice(part.start // BLOCK, blocks(part.stop))


def quantize_(codes: Tensor, scale: Tensor, source: Tensor, seed: int | Tensor, first: int = 0) -> None:
    """codes (...) int8 (signed) or uint8, scale (blocks,) <- source (...); the draw is a function of (seed, position).

    The first element has position `first`, a multiple of `BLOCK`: pieces of a tensor are rounded like the whole.

    A block with an infinity or NaN gets a scale that is none either, so nothing finite comes out of it.
    """
    line, exact = codes.view(-1), source.reshape(-1)
    for part in pieces(line, _CHUNK):
        found, scales = _encode(exact[part].to(torch.float32), codes.dtype == torch.int8, seed, first + part.start)
        line[part].copy_(found)
        scale[block_part(part)].copy_(scales)


def _encode(x: Tensor, signed: bool, seed: int | Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(n,) float32 -> codes (n,) as numbers, scales (blocks,)."""
    rows = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    size = rows.abs()
    scale = size.amax(1)
    size.div_(torch.where(scale > 0, scale, 1)[:, None])
    top = 127 if signed else 255
    low = (size.sqrt() if signed else size.sqrt().sqrt_()).mul_(top).floor_().clamp_(0, top - 1)
    below, above = _level(low / top, signed), _level((low + 1) / top, signed)
    chance = (size - below).div_(above.sub_(below))
    drawn = hash16(rows.numel(), seed, x.device, first).view_as(rows).to(torch.float32).add_(0.5)
    codes = low.add_(chance.mul_(2**16) > drawn)
    # An unsigned zero would be a division by almost nothing where its root divides.
    codes = codes.mul_(rows.sign()) if signed else torch.where(size > 0, codes.clamp_(min=1), 0)
    return codes.view(-1)[: x.numel()], scale


def _level(x: Tensor, signed: bool) -> Tensor:
    return x.square() if signed else x.square().square_()


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes (...), scale (blocks,) -> (...), a tensor of its own."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    line, values = codes.view(-1), out.view(-1)
    for part in pieces(line, _CHUNK):
        piece, scales = values[part], scale[block_part(part)]
        piece.copy_(line[part])
        if codes.dtype == torch.int8:
            piece.mul_(piece.abs()).div_(127**2)
        else:
            piece.div_(255).square_().square_()
        whole = piece.numel() // BLOCK * BLOCK
        piece[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None])
        piece[whole:].mul_(scales[-1:])
    return out
