"""How many updates vanish in the rounding of narrow weights."""

from torch import Tensor


class Lost(dict[str, Tensor]):
    """Parameter name -> (2,) int64 on its device: elements that stood still, and elements that had an update.

    With rounding by chance most elements of a step stand still and a few move further instead, so nothing is lost on
    average; with an error term an element stands still only when weight and error both do.
    """

    def elements(self) -> dict[str, int]:
        """Parameter name -> elements, summed over the steps, that an update left as they were. Reads the device."""
        return {name: int(count[0]) for name, count in self.items()}

    @property
    def share(self) -> float:
        """The part of all updates that changed nothing. Reads the device."""
        pairs = [count.tolist() for count in self.values()]
        return sum(still for still, _ in pairs) / max(1, sum(wanted for _, wanted in pairs))
