"""One record of bytes for every step of an optimizer, ours or anybody else's."""

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch

from optimzoo.memory.ledger import ledger
from optimzoo.memory.reach import Opaque, plain_tensors
from optimzoo.memory.workspace import DeviceWorkspace, Workspace, measure


@dataclass(frozen=True, slots=True)
class StepMemory(Opaque):
    """Bytes of one step: state held after it, and the peak of its temporaries where that was measured."""

    step: int
    state_bytes: int
    workspace_bytes: int | None = None


class History(Opaque, Sequence[StepMemory]):
    """The last `maxlen` records, oldest first. Made by `track`, it ends the tracking with `.remove()`."""

    def __init__(self, records: Iterable[StepMemory] = (), maxlen: int | None = 10_000) -> None:
        self._records = deque(records, maxlen)
        self._undo: list[Callable[[], None]] = []
        self._measured = False  # whether a wrapper adds the workspace to records that the optimizer makes itself

    def append(self, record: StepMemory) -> None:
        """Add the newest record; the oldest falls out when there are `maxlen`."""
        self._records.append(record)

    def remove(self) -> None:
        """Give the optimizer its own `step` back; the records stay. Without tracking this does nothing."""
        self._measured = False
        while self._undo:
            self._undo.pop()()

    @overload
    def __getitem__(self, index: int) -> StepMemory: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepMemory]: ...
    def __getitem__(self, index: int | slice) -> StepMemory | list[StepMemory]:
        return list(self._records)[index] if isinstance(index, slice) else self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[StepMemory]:
        return iter(self._records)

    def __repr__(self) -> str:
        return f"History({list(self._records)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return History, (list(self._records), self._records.maxlen)  # a copy is not tracked by anyone


def track(optimizer: torch.optim.Optimizer, workspace: bool = False) -> History:
    """Record every step of any torch optimizer from now on; `.remove()` on what is returned ends it.

    An optimizer that keeps its own `memory_history` goes on doing so, and that object is returned. `workspace=True`
    also measures the peak of temporaries, without the closure's. That slows the step several times on CPU and is blind
    to compiled graphs there; on CUDA it resets the device's peak counter. A step that raises leaves no record.
    """
    own = getattr(optimizer, "memory_history", None)
    if isinstance(own, History):
        if workspace and not own._measured:
            own._measured = True
            _wrap_step(optimizer, own, functools.partial(_complete, own), workspace=True)
        return own
    history, count = History(), 0

    def record(optimizer: torch.optim.Optimizer, peak: int | None, _: StepMemory | None) -> None:
        nonlocal count
        count += 1
        history.append(StepMemory(count, ledger(optimizer).total, peak))

    _wrap_step(optimizer, history, record, workspace=workspace)
    return history


def log_memory(optimizer: torch.optim.Optimizer, run: Any, workspace: bool = False) -> History:
    """Send every step's bytes to a wandb run, as `memory/state_bytes`: one line after the optimizer is made.

    They join the row of your own next `run.log(...)`. `workspace=True` adds `memory/workspace_bytes` at the price that
    `track` names; `.remove()` on what is returned ends it. `run` is anything with wandb's `log(row, commit=False)`.
    """
    history = track(optimizer, workspace=workspace)

    def send(_: torch.optim.Optimizer, peak: int | None, last: StepMemory | None) -> None:
        if history and history[-1] is not last:
            found = history[-1]
            row = {"memory/state_bytes": found.state_bytes, "memory/workspace_bytes": found.workspace_bytes}
            run.log({name: nbytes for name, nbytes in row.items() if nbytes is not None}, commit=False)

    _wrap_step(optimizer, history, send, workspace=False)
    return history


def _complete(history: History, _: torch.optim.Optimizer, peak: int | None, last: StepMemory | None) -> None:
    """Add the workspace to the record that the optimizer has just made, if it made one."""
    if history and history[-1] is not last:
        history._records[-1] = replace(history[-1], workspace_bytes=peak)


Record = Callable[[torch.optim.Optimizer, int | None, StepMemory | None], None]


def _wrap_step(optimizer: torch.optim.Optimizer, history: History, record: Record, *, workspace: bool) -> None:
    """Replace `optimizer.step` by one that calls it and then `record`. Not step hooks: those do not run when it raises.

    The new step is a plain function that holds the optimizer weakly, as schedulers' are: a bound method would make a
    cycle that keeps the state alive until the collector runs. Schedulers ask for `__func__` and copy its attributes.
    """
    before = vars(optimizer).get("step")
    inner = before or type(optimizer).step
    active = True

    def func(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        call = inner if before else functools.partial(inner, self)
        if not active:
            return call(*args, **kwargs)
        last = history[-1] if history else None
        if workspace:
            meter = measure(_device(self))
            args, kwargs = _paused_closure(meter, args, kwargs)
            with meter:
                result = call(*args, **kwargs)
            record(self, meter.peak, last)
        else:
            result = call(*args, **kwargs)
            record(self, None, last)
        return result

    ref = weakref.ref(optimizer)

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        return func(ref(), *args, **kwargs)  # type: ignore[arg-type]  # whoever calls step holds the optimizer

    def undo() -> None:
        nonlocal active
        active = False  # somebody may have wrapped this step since; then it stays where it is and only passes on
        owner = ref()
        if owner is None or vars(owner).get("step") is not step:
            return
        if before:
            owner.step = before  # type: ignore[method-assign]
        else:
            del owner.step

    step.__func__ = functools.wraps(inner)(func)  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]
    history._undo.append(undo)


def _paused_closure(meter: Workspace | DeviceWorkspace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of `step` with a closure that runs outside of the measurement."""
    closure = kwargs.get("closure", args[0] if args else None)
    if closure is None:
        return args, kwargs

    @functools.wraps(closure)
    def paused() -> Any:
        with meter.paused():
            return closure()

    return ((paused, *args[1:]), kwargs) if args else (args, {**kwargs, "closure": paused})


def _device(optimizer: torch.optim.Optimizer) -> torch.device:
    """Where the optimizer's first parameter lives."""
    group = next((group for group in optimizer.param_groups if group["params"]), None)
    return next(iter(plain_tensors(group["params"][0]))).device if group else torch.device("cpu")
