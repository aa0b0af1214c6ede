"""Where sampled layers read: who shares an input, the sample they keep between them, what a `NormCache` knows."""

import re
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from optimzoo.modules.sampled import SampledLinear

SHARED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)

Sample = tuple[Tensor, Tensor, Tensor]  # rows (k, n) in the compute dtype, index (k,) int32, scale (k,) float32


def row_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


class Site:
    """One input of one or more sampled layers: who reads it, the sample they share, what is known of the gradient.

    The sample is handed on only for the very same tensor, and let go with the last reader of a round, so that neither
    it nor the input outlives the forward pass here.
    """

    def __init__(self, members: "list[SampledLinear] | None" = None) -> None:
        self.members = members or []
        self.seen = 0  # one bit a member
        self.input: Tensor | None = None
        self.shared: Sample | None = None
        self.norms: Tensor | None = None  # (B, 1 or more) expected sizes of the gradient, of a NormCache
        self.record: Callable[[Tensor], None] | None = None
        self.warned = False

    def sample(self, layer: "SampledLinear", x: Tensor) -> Sample:
        bit = 1 << self.members.index(layer)
        if self.seen & bit:
            self.seen, self.input, self.shared = 0, None, None
        self.seen |= bit
        found = self.shared if self.input is x else None
        found = found or layer.draw(x, None if self.norms is None else self._spread(layer, x))
        waiting = any(member.active() and not self.seen & (1 << i) for i, member in enumerate(self.members))
        self.input, self.shared = (x, found) if waiting else (None, None)
        self.seen = self.seen if waiting else 0
        return found

    def _spread(self, layer: "SampledLinear", x: Tensor) -> Tensor:
        """Cached norms as one number a token."""
        assert self.norms is not None
        batch, per_sample = self.norms.shape
        length = x.shape[:-1].numel() // max(x.shape[0], 1)
        if x.shape[0] != batch or (per_sample > 1 and length > per_sample):
            raise ValueError(
                f"SampledLinear {layer.name!r} got {tuple(x.shape)}, but its NormCache was entered with {batch} ids"
                f" and holds {per_sample} norms each: samples must come first, and longer or packed sequences need"
                " mode='sample'"
            )
        return self.norms[:, :length].expand(batch, length).reshape(-1)

    def observer(self, layer: "SampledLinear", x: Tensor) -> Callable[[Tensor], None] | None:
        """What backward does besides gradients: report their sizes, and find out whether anything was saved at all."""
        if torch.compiler.is_compiling():
            return None
        alive = None if self.warned or x.grad_fn is None else weakref.ref(x.untyped_storage())
        record, shape = self.record, x.shape[:-1]

        def notify(dy: Tensor) -> None:
            if record is not None:
                record(row_norms(dy).reshape(shape).square())
            if alive is not None and alive() is not None:
                self._warn(layer.name)

        return notify if record is not None or alive is not None else None

    def _warn(self, name: str) -> None:
        self.warned = True
        warnings.warn(
            f"sampling {any_block(name)!r} saves no memory: another operation (a norm or activation that keeps its"
            " output) or the caller holds the layer's input until backward; exclude it from convert, whose batch= tells"
            " who holds it",
            stacklevel=2,
        )


def any_block(name: str) -> str:
    """The name with stars for numbers: one text, and so one warning, for all blocks."""
    blocks = re.sub(r"\b\d+\b", "*", name)
    return blocks if re.search(r"\w", blocks) else name


def shared_site(name: str, share: tuple[tuple[str, ...], ...], sites: dict[tuple[str, int], Site]) -> Site:
    """The site of `name`: one for all that differ from it by a single part, where both parts are in one tuple."""
    parts = name.split(".")
    for i in reversed(range(len(parts))):
        for group, names in enumerate(share):
            if parts[i] in names:
                return sites.setdefault((".".join([*parts[:i], "", *parts[i + 1 :]]), group), Site())
    return Site()
