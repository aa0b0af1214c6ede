"""`NormCache`: how large each sample's output gradients were when it was last seen, for better draws next time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimzoo.modules.sampled import SampledLinear
from optimzoo.modules.sampled_site import Site

MODES = ("none", "position", "sample", "token")
NEW = 0.1  # share of the last batch in what is typical of a position


class NormCache:
    """Sizes of dy by layer, and by sample or position or both, on the CPU; layers that share an input share a row.

    `with cache.batch(ids): loss = ...; loss.backward()` makes sampled layers draw in proportion to |x| |dy|, with |dy|
    of the last visit of these samples, and stores the new one at the end, with one copy from the device. The estimate
    is unbiased however old the sizes are; a sample never seen counts as a typical one, position by position.

    "token" knows each sample's tokens, "sample" their mean, and "position" only what is typical, of which it needs no
    more of `ids` than how many there are. A classifier that reads one token of a text needs "token" or "position": its
    gradients lie in the rows of that token, of which draws by |x| alone keep no more than of others. "none" does
    nothing. Bytes: 2 a sample, position or token, and a layer. Under torch.distributed every rank enters the block
    equally often, and all end with the same cache. Not for compiled models.

    Liu et al., 2023, arXiv 2305.15265.
    """

    def __init__(
        self,
        model: nn.Module,
        num_samples: int,
        mode: str = "sample",
        length: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"NormCache: mode={mode!r} is not one of {', '.join(map(repr, MODES))}")
        if (mode in ("token", "position")) != (length is not None):
            raise ValueError(
                "NormCache: length is the padded sequence length of mode='token' and 'position', and of no other mode"
            )
        self.mode = mode
        self.sites: dict[str, Site] = {}
        for name, module in model.named_modules():
            if isinstance(module, SampledLinear) and module.site not in self.sites.values():
                self.sites[name] = module.site
        if not self.sites:
            raise ValueError("NormCache finds no SampledLinear: convert the model first")
        samples = {"none": 0, "position": 0}.get(mode, num_samples)
        self.norms = torch.full((len(self.sites), samples, length or 1), -1.0, dtype=dtype)  # below 0: not known
        self.typical = torch.full((len(self.sites), length or 1), -1.0)

    @contextmanager
    def batch(self, ids: Tensor | Sequence[int]) -> Iterator[None]:
        """Forward and backward of one micro-batch, whose first dimension is the samples `ids`."""
        if self.mode == "none":
            yield
            return
        ids = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        numbered = self.mode != "position"
        if numbered and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.norms.shape[1]:
            raise IndexError(
                f"sample ids must lie in 0..{self.norms.shape[1] - 1}: make NormCache(num_samples=) larger"
            )
        found: dict[int, Tensor] = {}
        try:
            for i, site in enumerate(self.sites.values()):
                norms = _known(self.typical[i], _mean(self.typical[i])).expand(len(ids), -1)
                norms = _known(self.norms[i, ids].float(), norms) if numbered else norms
                site.norms = norms.to(site.members[0].weight.device)
                site.record = partial(self._record, found, i)
            yield
        finally:
            for site in self.sites.values():
                site.norms = site.record = None
        for rank_ids, values in _of_all_ranks(ids, {i: total.sqrt().cpu() for i, total in found.items()}):
            for i, norms in values.items():
                norms = torch.where(norms.isfinite(), norms, -1.0)  # an overflowed step tells nothing
                if numbered:
                    self.norms[i, rank_ids, : norms.shape[1]] = norms.to(self.norms.dtype)
                typical, known = self.typical[i, : norms.shape[1]], norms >= 0
                new = torch.where(known, norms, 0.0).sum(0) / known.sum(0)
                new = torch.where(typical < 0, new, typical.lerp(new, NEW))
                typical.copy_(torch.where(known.any(0), new, typical))

    def _record(self, found: dict[int, Tensor], i: int, squares: Tensor) -> None:
        squares = squares.reshape(squares.shape[0], -1).to(torch.float32)
        squares = squares.mean(1, keepdim=True) if self.mode == "sample" else squares
        found[i] = found[i] + squares if i in found else squares

    def state_dict(self) -> dict[str, Any]:
        return {"mode": self.mode, "layers": list(self.sites), "norms": self.norms, "typical": self.typical}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["mode"] != self.mode or state_dict["layers"] != list(self.sites):
            raise ValueError("the saved NormCache is of another mode or other layers: build it as it was saved")
        for name, own in (("norms", self.norms), ("typical", self.typical)):
            if state_dict[name].shape != own.shape:
                saved = tuple(state_dict[name].shape)
                raise ValueError(f"the saved NormCache has shape {saved}, this one {tuple(own.shape)}")
        self.norms.copy_(state_dict["norms"])
        self.typical.copy_(state_dict["typical"])


def _known(norms: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(norms >= 0, norms, otherwise)


def _mean(norms: Tensor) -> Tensor:
    """The mean of what is known, 1 where that is nothing."""
    known = norms >= 0
    mean = torch.where(known, norms, 0.0).sum() / known.sum().clamp_min(1)
    return torch.where(mean > 0, mean, 1.0)


def _of_all_ranks(ids: Tensor, values: dict[int, Tensor]) -> list[tuple[Tensor, dict[int, Tensor]]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [(ids, values)]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (ids, values))
    return gathered
