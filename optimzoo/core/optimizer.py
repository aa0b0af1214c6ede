"""ZooOptimizer: the one step loop, and the order of everything around a rule.

An optimizer of the zoo is a class with options (`hyper`) and a rule: the static functions `slots`, `direction` and,
where needed, `refresh` with `due`, or `update`, which steps a list of weights in place. A rule that lives on products
of matrices is written in stages in place of `direction`, so that several matrices of one shape go through them at once:
`prepare` returns x and what else `conclude` needs, `products(h)` is the function from x, or from a batch of them, to
what `conclude` makes a direction of.
What a rule promises:

1. `slots(shape, h)` is pure and depends on the shape and the options only.
2. `direction`, `refresh` and `prepare` change their slots in place, by operations of PyTorch, and never rebind them; no
   other stage does.
3. `g` is read-only (it may be `p.grad` itself), `w` tells its shape and dtype alone (ranks that share it do not gather
   its values); what `direction` returns is a tensor of its own. `products` uses up what it is given.
4. No tensor is read on the host. `step` may only meet `+ - * / **`.
5. `update` does what `direction` and the engine's last line do, where gradients are finite, in float32 to its last
   digits; what becomes of a weight depends on that weight and on gradients and slots, not on other weights.
6. `host_update` does what `update` does, on a CPU in float32, but for weights whose gradient is not finite, or has
   squares that are not, where `check_finite` asks; it returns which ones it has stepped. Counters are the engine's.
   `host_conclude` does what `conclude` and the engine's last line do, there, where products are in bfloat16.
7. The direction comes before the learning rate and without weight decay; the engine applies both.
8. On a device, `direction` and the stages may get several parameters of one shape at once: gradient and slots with one
   axis more before their own, and where these count, `step` (parameters, 1, ...).

In return it sees plain tensors of at least float32, matrices as (out, in) and, unless it is element-wise, whole; and
never a missing, sparse or non-finite gradient.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optimzoo.core import checkpoint, stacks
from optimzoo.core.capture import refuse_capture
from optimzoo.core.engine import run
from optimzoo.core.gradients import check_gradient
from optimzoo.core.groups import GROUP_KEYS, Routes, as_groups, named, names_of, refuse, refuse_other_names
from optimzoo.core.hyper import Hyper, dtype_name, hashable, hyper, nearest, options_of, options_type, signature
from optimzoo.core.lost import Lost
from optimzoo.core.member import Member, specs
from optimzoo.core.routing import LAYOUTS, Route, param_groups
from optimzoo.core.shards import is_sharded, local, placed
from optimzoo.core.skips import Skips
from optimzoo.core.storage import (
    ERROR,
    STATE_DTYPES,
    compute_dtype,
    fill_slot,
    is_scale,
    new_slot,
    transfer,
)
from optimzoo.functional.device_kernels import capturing
from optimzoo.functional.random import fold
from optimzoo.functional.slices import has_values, on_host
from optimzoo.memory import History, Ledger, StepMemory, ledger


class ZooOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here; use a subclass. The module's text says what a rule promises and gets."""

    lr: float = hyper(1e-3, ge=0, doc="step size")
    weight_decay: float = hyper(0.0, ge=0, doc="decoupled decay, multiplied by lr")
    maximize: bool = hyper(False, doc="ascend instead of descend")
    state_dtype: str | None = hyper(
        None,
        one_of=tuple(STATE_DTYPES),
        parse=dtype_name,
        doc="how averages are kept; None is float32, or the weight's own dtype when wider",
    )
    rounding: str = hyper(
        "nearest",
        one_of=("nearest", "stochastic", "error"),
        doc="how weights narrower than float32 are written; error keeps what is rounded off in a second tensor",
    )
    check_finite: bool = hyper(True, doc="leave weights and state alone where a gradient holds NaN or infinity")

    engine: str = hyper(
        "auto",
        one_of=("auto", "compiled"),
        doc="compiled steps by a kernel in C (float32 on a CPU) or by a graph of each shape's step (torch.compile), "
        "where they were measured to be faster",
    )

    paper: ClassVar[str] = ""
    workspace: ClassVar[float] = 1.0  # temporaries of a float32 step, in largest parameters; or DEVICE_ROOM
    needs_model: ClassVar[bool] = False  # works on a model's converted layers, so it takes the model
    elementwise: ClassVar[bool] = False  # the rule treats every element alike, so it may be run in slices
    skips_zero: ClassVar[bool] = False  # a gradient of zeros is no step at all
    decay_after: ClassVar[bool] = False  # decay the stepped weight, not the weight before the step
    releasing = False  # whether backward steps the parameters; set by `release_gradients`
    options: ClassVar[dict[str, Hyper]] = {}
    Options: ClassVar[Any] = None  # the named tuple that rules get as `h`: all options but lr

    slots: ClassVar[Any]  # (shape, h) -> name -> Slot
    direction: ClassVar[Callable[..., Tensor]]
    refresh: ClassVar[Callable[..., None] | None] = None
    update: ClassVar[Callable[..., None] | None] = None
    host_update: ClassVar[Callable[..., list[bool]] | None] = None
    prepare: ClassVar[Callable[..., tuple[Tensor, ...]] | None] = None
    products: ClassVar[Any]  # h -> function of a matrix, or of a batch of them
    conclude: ClassVar[Callable[..., Tensor]]
    host_conclude: ClassVar[Callable[..., None] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for own, host in (("update", "host_update"), ("conclude", "host_conclude")):
            if own in vars(cls) and host not in vars(cls):
                setattr(cls, host, None)  # a parent's does what the parent's own did
        cls.options = options_of(cls)
        cls.Options = options_type(f"{cls.__name__}Options", cls.options)
        cls.__signature__ = signature(cls.options)  # type: ignore[attr-defined]  # read by inspect and notebooks

    def __init__(self, params: Any, lr: float | Tensor | None = None, **options: Any) -> None:
        given = self.checked(options if lr is None else {"lr": lr, **options})
        self.memory_history = History()
        self._skips = Skips()
        self._lost = Lost()
        self._plans: dict[int, tuple[Any, list[Member]]] = {}
        self._state_bytes = 0
        params = self.default_groups(params) if isinstance(params, nn.Module) else params
        groups = as_groups(params, type(self).__name__)
        self.inspect_groups(groups)
        super().__init__(groups, {name: option.default for name, option in self.options.items()} | given)
        self._remember()

    # What a method may override beside its rule.

    @classmethod
    def default_groups(cls, model: nn.Module) -> list[dict[str, Any]]:
        """The groups that a model stands for when it is given in their place; a start for groups of one's own."""
        groups = param_groups(model)
        if not groups:
            raise ValueError(f"{cls.__name__} got a module without trainable parameters; check requires_grad")
        return groups

    @staticmethod
    def due(count: int, h: Any) -> bool:
        """Whether `refresh` runs in the step after `count` completed ones."""
        return False

    @staticmethod
    def in_place(h: Any, w: Tensor, g: Tensor) -> bool:
        """Whether `update`, where there is one, is for these options, this weight and a gradient like this."""
        return True

    @staticmethod
    def fits_host_update(shape: tuple[int, ...], h: Any) -> bool:
        """Whether `host_update` is for a parameter that rules see so, where `update` is for these options."""
        return True

    @staticmethod
    def own_kernel(w: Tensor, g: Tensor) -> bool:
        """Whether `update` steps weights like this one by a kernel of its own, which takes narrow ones as they are."""
        return False

    def route(self, p: Tensor, name: str, group: dict[str, Any], h: Any) -> Route:
        """Where a parameter goes. Asked at construction and whenever options, members or `period` change."""
        return Route(type(self), h)

    def period(self, group: dict[str, Any]) -> int:
        """A number that changes when a choice over the whole group is due: all its routes are asked for again."""
        return 0

    def extras(self, p: Tensor) -> dict[str, Tensor]:
        """Tensors beside its slots that the rule asks for by keyword, such as the indices of a sparse layer."""
        return {}

    def inspect_groups(self, groups: list[dict[str, Any]]) -> None:
        """Look at the groups once, before they are taken: refuse or warn."""

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse options of a group that do not go together: before it is taken, and when they have changed."""

    def admit_state(self, values: dict[Tensor, dict[str, Tensor]]) -> None:
        """Called with the state of a checkpoint before any of it is written; raises to refuse it."""

    def refuse_capture(self, group: dict[str, Any], members: list[Member]) -> None:
        """Called before members of a group step in a CUDA graph; raises where a replay is not their next step."""
        refuse_capture(type(self).__name__, group, members, self.state)

    def paced(self, member: Member) -> Member:
        """The member as it steps now: a method with a warm-up of its own lowers its route's `lr_scale` for a while."""
        return member

    def to_largest_period(self) -> None:
        """Turn the schedule to its period with the most state; only for an optimizer that is planned, not used."""

    def small(self) -> set[Tensor]:
        """The parameters on a device of which several may step at once, where `stacks.possible` allows it."""
        taken = {p: member for p, (_, member) in self.begin().items() if p.numel() and not on_host(p)}
        return {p for p, member in taken.items() if stacks.size(member, self.state[p]) > 1}

    def finish(self) -> None:
        """Called after all parameters have stepped; for methods that work on their layers between steps."""

    # What users call.

    @torch._disable_dynamo  # inside a compiled loop: a loop over all parameters is nothing to trace
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's value, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._remember()
            for _, plan in self._plans.values():  # refused before anything has moved
                for member in plan:
                    check_gradient(member.p, member.name)
            for index in range(len(self.param_groups)):
                self.step_members(index, self._plans[index][1])
            for group in self.param_groups:
                group["step"] += 1
            self.finish()
        done = max(group["step"] for group in self.param_groups)
        self.memory_history.append(StepMemory(done, self._state_bytes))
        return loss

    def begin(self) -> dict[Tensor, tuple[int, Member]]:
        """Make routes and slots ready for a step: every trainable parameter with its group's number and its route."""
        self._remember()
        return {member.p: (index, member) for index, (_, plan) in self._plans.items() for member in plan}

    def step_members(self, index: int, members: Iterable[Member]) -> None:
        """Step those members of a group that have a gradient; the group's count stays, it advances with `step()`."""
        group = self.param_groups[index]
        lr = group["lr"]
        if isinstance(lr, Tensor) and on_host(lr) and has_values(lr):
            lr = lr.item()
        # A parameter of which other ranks have rows may have a gradient there.
        paced = [self.paced(member) for member in members if member.p.grad is not None or is_sharded(member.p)]
        if capturing():
            self.refuse_capture(group, paced)
        with without_autocast(paced[0].p.device if paced else None):
            self._skips.note(*run(paced, self.state, lr, group["step"], self.extras, self._lost))

    @contextmanager
    def count_lost(self) -> Iterator[Lost]:
        """Inside, count the updates that rounding swallowed; weights that need no rounding are left out."""
        before = self._lost
        self._lost = Lost(
            (member.name, torch.zeros(2, dtype=torch.int64, device=p.device))
            for p, (_, member) in self.begin().items()
            if p.dtype != compute_dtype(p.dtype)
        )
        self._settle()
        try:
            yield self._lost
        finally:
            self._lost = before
            self._settle()

    def memory(self) -> Ledger:
        """Every byte held here, by parameter, group, kind, dtype and device; true before the first step."""
        self._remember()
        members = [member for _, plan in self._plans.values() for member in plan]
        names = {member.p: member.name for member in members}
        kinds = {(m.p, key): slot.kind for m in members for key, slot in specs(m).items()}
        return ledger(self, names=names, kinds=kinds)

    def routes(self) -> Routes:
        """Which parameter goes where, why, and what it costs; printable."""
        self._remember()
        rows = Routes()
        for _, members in self._plans.values():
            for m in members:
                held = _bytes(self.state[m.p].values())
                rows.append((m.name, tuple(m.p.shape), m.route.rule.__name__.lower(), m.route.reason, held))
        return rows

    def skipped(self) -> dict[str, int]:
        """Parameter name -> how many steps left it alone because of its gradient."""
        return self._skips.counts()

    def forget(self, p: Tensor) -> None:
        """Put one parameter's slots back to how they started."""
        member = next((m for _, plan in self._plans.values() for m in plan if m.p is p), None)
        if member is None:
            raise ValueError(f"{type(self).__name__} does not optimize this tensor of shape {tuple(p.shape)}")
        for key, slot in specs(member).items():
            fill_slot(slot, self.state[p][key], fold(0, member.name, key))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; the dictionary given is left as it was."""
        group = named_options(type(self), named(param_group))
        refuse_other_names(group, self.param_groups, type(self).__name__)
        taken = {p for other in self.param_groups for p in other["params"]}
        for p, name in zip(group["params"], names_of([*self.param_groups, group], len(self.param_groups)), strict=True):
            refuse(p, name, type(self).__name__)
            if p in taken:
                raise ValueError(
                    f"{type(self).__name__}: parameter {name!r} is given twice; one step would move it twice"
                )
            taken.add(p)
        self.check_group(self.defaults | group)
        super().add_param_group(group)
        *others, added = self.param_groups
        if isinstance(added["lr"], Tensor) and any(other["lr"] is added["lr"] for other in others):
            added["lr"] = added["lr"].clone()  # a schedule that multiplies would lower a shared one once a group
        if self._plans:
            try:
                self._remember()
            except Exception:  # a route may refuse a parameter
                self.param_groups.pop()
                self._remember()
                raise

    def state_dict(self) -> dict[str, Any]:
        """Groups and state as plain tensors and numbers, with an entry for every trainable parameter."""
        self._remember()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over groups and state. All is checked before anything is written; dtypes stay this optimizer's own."""
        if isinstance(state_dict, dict):
            state_dict = state_dict.copy()  # hooks may edit it, and it is the caller's
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        checkpoint.load(self, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @classmethod
    def checked(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options as they are stored; an unknown or impossible one is refused by name."""
        for name in options:
            if name not in cls.options:
                hint = nearest(name, cls.options)
                if name in ("foreach", "fused", "capturable", "differentiable"):  # what torch's own classes take
                    hint = ": leave it out, kernels are chosen by dtype and device"
                raise TypeError(f"{cls.__name__} has no option {name!r}{hint}")
        return {name: cls.options[name].check(cls.__name__, name, value) for name, value in options.items()}

    @classmethod
    def hypers(cls, group: dict[str, Any], **instead: Any) -> Any:
        """This rule's options out of a group: what rules call `h`. `instead` replaces some of them."""
        found = {n: hashable(group.get(n, option.default)) for n, option in cls.options.items() if n != "lr"}
        return cls.Options(**(found | instead))

    # Members, routes and slots.

    def members(self, index: int) -> list[Member]:
        """The parameters of a group with their routes, as options and period stand now.

        Those that are trainable, or were: a parameter frozen for a while keeps its state.
        """
        group = self.param_groups[index]
        h, names = self.hypers(group), names_of(self.param_groups, index)
        pairs = [(p, n) for p, n in zip(group["params"], names, strict=True) if p.requires_grad or p in self.state]
        return [Member(p, name, self.route(p, name, group, h)) for p, name in pairs]

    def relink(self) -> None:
        """Ask for every route again and make slots fit, keeping those that do."""
        self._plans.clear()
        self._remember()

    def _remember(self) -> None:
        """Give every trainable parameter its slots, drop those of parameters in no group; idempotent, at every step."""
        changed = len(self._plans) > len(self.param_groups)
        for index in range(len(self.param_groups), len(self._plans)):
            del self._plans[index]
        for index, group in enumerate(self.param_groups):
            known, options = self._plans.get(index), self._options(group)
            if known is not None and known[0][0] != options:  # new ones were checked when they were given
                group |= self.checked({name: group[name] for name in self.options if name != "lr"})
                self.check_group(group)
                options = self._options(group)
            token = (
                options,
                tuple((id(p), p.dtype, p.device, p.shape, p.requires_grad) for p in group["params"]),
                self.period(group),
            )
            if known is not None and known[0] == token and all(m.p in self.state for m in known[1]):
                continue
            if capturing():
                raise RuntimeError(
                    f"{type(self).__name__}: this step is being captured in a CUDA graph, and parameters or options "
                    "have changed since the last one: take a step before"
                )
            members = self.members(index)
            turned = known is not None and known[0][2] != token[2]
            left = self._left(known[1]) if known is not None else {}
            for member in members:
                have = self.state.get(member.p) or left.get((member.name, member.p.shape), {})
                if turned and member.route.periodic:  # what rounding left of the weight is no slot of the rule
                    have = {ERROR: have[ERROR]} if ERROR in have else {}
                self._fit(member, group, have)
            self._plans[index] = (token, members)
            changed = True
        if changed or len(self.state) != sum(len(plan) for _, plan in self._plans.values()):
            self._settle()

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What routes and slots depend on; the rate is none of it, and would be read from a device."""
        return tuple(hashable(group[name]) for name in self.options if name != "lr")

    def _left(self, before: list[Member]) -> dict[tuple[str, torch.Size], dict[str, Tensor]]:
        """State of parameters that are in no group any more, for those that FSDP has put in their places."""
        now = {id(p) for group in self.param_groups for p in group["params"]}
        return {(m.name, m.p.shape): self.state[m.p] for m in before if id(m.p) not in now and m.p in self.state}

    def _settle(self) -> None:
        """Drop what belongs to nobody and count what is held, so that a step need not walk."""
        members = [member for _, plan in self._plans.values() for member in plan]
        for p in self.state.keys() - {member.p for member in members}:
            del self.state[p]
        self._skips.watch(members)
        self._state_bytes = sum(_bytes(slots.values()) for slots in self.state.values())
        options = [value for group in self.param_groups for value in group.values() if isinstance(value, Tensor)]
        beside = (*options, *self._skips.tensors(), *self._lost.values())
        self._state_bytes += _bytes(beside)

    def _fit(self, member: Member, group: dict[str, Any], have: dict[str, Tensor]) -> None:
        """Make the parameter's slots what its route wants: kept, moved with their values, or new."""
        p = member.p
        slots: dict[str, Tensor] = {}
        for key, slot in specs(member).items():
            old = have.get(key)
            same = old is not None and (old.shape, old.dtype, old.device) == (slot.shape, slot.dtype, p.device)
            if old is not None and same and placed(old, p):
                slots[key] = old
                continue
            if old is not None and old.shape != slot.shape and group["step"] > 0:
                raise ValueError(
                    f"{type(self).__name__}: {key!r} of {member.name!r} would change from {tuple(old.shape)} to "
                    f"{slot.shape} after the first step; make a new optimizer for other shapes or ranks"
                )
            slots[key] = new_slot(slot, p, None, fold(0, member.name, key))
        for key in (key for key in slots if key in have and not is_scale(key, slots)):
            old = have[key]
            if old is not slots[key] and old.shape == slots[key].shape and old.device.type != "meta":
                transfer(have, slots, key, fold(0, member.name, key))
        self.state[p] = slots

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps three attributes; ours would be lost by copy and pickle without this.
        self._remember()
        kept = ("memory_history", "_skips", "_state_bytes")
        return super().__getstate__() | {name: self.__dict__[name] for name in kept} | {"_plans": {}, "_lost": Lost()}


ZooOptimizer.options = options_of(ZooOptimizer)  # `__init_subclass__` sees subclasses only


def without_autocast(device: torch.device | None) -> AbstractContextManager:
    """A step computes in the dtypes that it chooses, also where it is taken inside of a forward's autocast."""
    if device is None or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that these hold on this rank."""
    return sum(local(t).untyped_storage().nbytes() for t in tensors)


def named_options(cls: type[ZooOptimizer], param_group: dict[str, Any]) -> dict[str, Any]:
    """A copy of a user's group with its options checked; an unknown key is refused with the nearest known one."""
    for key in param_group:
        if key not in cls.options and key not in GROUP_KEYS:
            known = [*cls.options, "params", "name", "fallback"]
            raise TypeError(f"{cls.__name__} groups have no option {key!r}{nearest(key, known)}")
    if param_group.get("layout", "as is") not in LAYOUTS:
        raise ValueError(f"{cls.__name__}: layout={param_group['layout']!r} is not known; it must be one of {LAYOUTS}")
    own = cls.checked({key: value for key, value in param_group.items() if key in cls.options})
    return {"step": 0, **param_group, **own}
