"""Step inside backward: each gradient is used as soon as it is complete, and freed before the next one exists."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optimzoo.core.gradients import check_gradient
from optimzoo.core.member import Member
from optimzoo.core.optimizer import ZooOptimizer
from optimzoo.core.ranks import alone


def release_gradients(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    scaler: Any = None,
) -> "Release":
    """Let `backward()` step the parameters of `opt`, so that gradients never exist all at once.

    The loop stays as it is: `opt.step()` closes the step (groups, schedules, `memory_history`) and updates nothing
    twice; weights and state are those of a loop without release, to the bit. What needs all gradients before the first
    update cannot work: hand over the loop's `accumulate`, `max_norm` and `scaler`, and what does not fit is refused
    here. `nn.utils.clip_grad_norm_` finds no gradients and does nothing, `track(opt, workspace=True)` sees no work in
    `step()`. `.remove()` on what is returned ends it.
    """
    if not isinstance(opt, ZooOptimizer):
        raise TypeError(f"release_gradients needs an optimizer of optimzoo, not {type(opt).__name__}")
    if accumulate != 1:
        raise ValueError(
            f"accumulate={accumulate} adds gradients up over backward passes, and released ones are gone after each: "
            "use one backward a step, with a larger batch, or do not release"
        )
    if max_norm is not None:
        raise ValueError(
            f"max_norm={max_norm} needs the norm of all gradients before the first update, and released ones never "
            "exist together: leave clipping out or do not release"
        )
    if scaler is not None and getattr(scaler, "is_enabled", lambda: True)():
        raise ValueError(f"{_SCALER}: train in bfloat16, which needs no scaling, or do not release")
    if not alone():
        raise RuntimeError(
            "several processes average gradients after backward, and released ones are used inside it: run one process"
        )
    return Release(model, opt)


_SCALER = "a GradScaler looks at all gradients before it allows a step, and released ones never exist together"


class Release:
    """The hooks of one model and one optimizer; also a context manager."""

    def __init__(self, model: nn.Module, opt: ZooOptimizer) -> None:
        if opt.releasing:
            raise RuntimeError(f"this {type(opt).__name__} already releases gradients; call .remove() on the first")
        names = {p: name for name, p in model.named_parameters()}
        trained = [p for group in opt.param_groups for p in group["params"] if p.requires_grad]
        foreign = sum(p not in names for p in trained)
        if foreign:
            raise ValueError(f"{foreign} parameters of this {type(opt).__name__} are not in {type(model).__name__}")
        present = next((names[p] for p in trained if p.grad is not None), None)
        if present is not None:
            raise RuntimeError(f"{present!r} has a gradient already, which would be added to: call opt.zero_grad()")
        self.opt = opt
        self._places: dict[Tensor, tuple[int, Member]] = {}  # empty between steps
        self._done: set[Tensor] = set()
        self._undo: list[Callable[[], None]] = [opt.register_step_pre_hook(self._before_step).remove]
        self._undo += [opt.register_step_post_hook(self._after_step).remove]
        # Tensors keep hooks where the garbage collector does not look: a strong one would keep the model for ever.
        use = weakref.WeakMethod(self._use)

        def used(p: Tensor) -> None:
            if step := use():
                step(p)

        self._undo += [p.register_post_accumulate_grad_hook(used).remove for p in trained]
        opt.releasing = True
        # A GradScaler that reads this calls `step` and leaves `grad_scale`; without, it fails with words of its own.
        opt.__dict__["_step_supports_amp_scaling"] = True

    def remove(self) -> None:
        """Leave gradients to `step()` again; the second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self.opt.releasing = False
        self.opt.__dict__.pop("_step_supports_amp_scaling", None)

    def __enter__(self) -> "Release":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    @torch.no_grad()
    def _use(self, p: Tensor) -> None:
        """A gradient is complete: step its parameter and let it go."""
        if not self._places:
            self._places = self.opt.begin()
        if p not in self._places:
            return  # taken out of its group: its gradient is nobody's business here
        index, member = self._places[p]
        if p in self._done:
            raise RuntimeError(
                f"{member.name!r} got a second gradient before opt.step(), and its first is already used: with "
                "released gradients there is one backward a step, and reentrant checkpointing of a shared weight "
                "needs use_reentrant=False"
            )
        check_gradient(p, member.name)
        self._done.add(p)
        self.opt.step_members(index, [member])
        p.grad = None

    def _before_step(self, opt: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(closure is not None for closure in (*args[1:], *kwargs.values())):
            raise RuntimeError(
                "step(closure) is refused while gradients are released: the closure's backward is the step; call "
                "backward() and then step()"
            )
        if "found_inf" in vars(opt):
            del opt.__dict__["found_inf"], opt.__dict__["grad_scale"]
            raise RuntimeError(f"{_SCALER}: do not use one, and build the model anew, for it took scaled steps")
        for group in opt.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.requires_grad:
                    name = group["param_names"][i] if "param_names" in group else f"of shape {tuple(p.shape)}"
                    raise RuntimeError(
                        f"parameter {name} still has a gradient at step(): it was set by hand, or the parameter became "
                        "trainable after release_gradients; set it to None, or release again"
                    )

    def _after_step(self, opt: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self._places, self._done = {}, set()
