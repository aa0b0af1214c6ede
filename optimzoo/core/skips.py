"""How often a parameter was left alone because of its gradient."""

import collections

import torch
from torch import Tensor

from optimzoo.core.member import Member
from optimzoo.functional.slices import on_host

Unknown = list[tuple[list[str], Tensor]]  # names, and (names,) whether their gradients could be used, on a device


class Skips:
    """Counts by parameter name; on a device they are tensors, as asking in a step would synchronise."""

    def __init__(self) -> None:
        self._host: collections.Counter[str] = collections.Counter()
        self._device: dict[str, Tensor] = {}

    def watch(self, members: list[Member]) -> None:
        """Keep tensors for those of these that live on a device, and for no others."""
        before, there = self._device, {member.name: member.p.device for member in members if not on_host(member.p)}
        self._device = {
            name: before[name].to(device) if name in before else torch.zeros((), dtype=torch.int32, device=device)
            for name, device in there.items()
        }

    def note(self, names: list[str], unknown: Unknown) -> None:
        """Count the names skipped that the host knows of, and where only the device knows."""
        self._host.update(names)
        alike: dict[torch.device, Unknown] = collections.defaultdict(list)
        for asked, verdicts in unknown:  # one by one where ranks share parameters
            alike[verdicts.device].append((asked, verdicts))
        for entries in alike.values():
            bad: dict[str, Tensor] = {}
            every = torch.cat([verdicts for _, verdicts in entries])
            told = [name for asked, _ in entries for name in asked]
            for name, one in zip(told, (~every).to(torch.int32).unbind(), strict=True):
                if name in bad:  # nobody keeps users from giving a name twice
                    self._device[name].add_(one)
                elif name in self._device:
                    bad[name] = one
            if bad:
                torch._foreach_add_([self._device[name] for name in bad], [*bad.values()])

    def tensors(self) -> list[Tensor]:
        """What is counted on devices."""
        return [*self._device.values()]

    def counts(self) -> dict[str, int]:
        """Parameter name -> steps; reads the device."""
        return dict(self._host + collections.Counter({name: int(count) for name, count in self._device.items()}))
