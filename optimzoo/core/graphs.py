"""`engine="compiled"`: one graph for a rule, its options and a shape, in place of many passes over memory.

Learning rate, step number and seeds go in as tensors, so that no schedule makes a new graph. Each graph is code of its
own, as torch counts recompilations by code. What it does is what `steps` does, by the same functions, with matrices
whole in place of pieces: a graph has loops of its own. Products of matrices stay calls into libraries.
"""

import itertools
import types
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import lookup_backend
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.fx.passes.split_module import split_module

from optimzoo.core import shards, stacks
from optimzoo.core.apply import apply_update
from optimzoo.core.member import Task
from optimzoo.core.routing import Route, as_matrix, from_matrix
from optimzoo.core.stages import first_stage, keywords, run_first
from optimzoo.core.storage import ERROR, compute_dtype, is_coarse, slot_names
from optimzoo.functional.slices import has_values, on_host

BACKEND = "inductor"
MOST = 8  # sets of options that a shape is compiled for: a schedule of `betas` must not compile at every step

_graphs: dict[tuple, dict[Any, dict[Callable, Callable]]] = defaultdict(dict)
_number = itertools.count()
_failed = False  # whether this machine has shown that it cannot compile


def wanted(task: Task) -> bool:
    """Whether a graph takes this step: not where ranks share it, nothing has values or a refresh is due.

    A graph gains where numbers are widened, worked on and rounded in many passes. Elsewhere it was measured to be as
    slow as the eager engine or slower: with wide numbers on a CPU, in stages there, whose time goes into products, and
    on a device where several parameters step as one tensor.
    """
    p, rule, h = task.member.p, task.rule, task.h
    if h.engine != "compiled" or _failed or shards.is_sharded(p) or not has_values(p):
        return False
    if not (p.is_contiguous() and task.g.is_contiguous()):  # strides that change would each make a graph
        return False
    if stacks.possible(task) or (rule.refresh is not None and rule.due(task.count, h)):
        return False
    dtype = compute_dtype(p.dtype)
    narrow = p.dtype != dtype or any(is_coarse(task.state, name, dtype) for name in slot_names(task.state))
    if on_host(p) and (not narrow or rule.prepare is not None):
        return False
    known = _graphs.get(_place(task), {})
    return h in known or len(known) < MOST


def step(task: Task, given: dict[str, Any]) -> None:
    """The whole step, by a rule that is written in one function."""
    _graph(task, _step)(_first(task, given), _last(task))


def prepare(task: Task, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """The first stage of a rule in stages."""
    return _graph(task, _prepare)(_first(task, given))


def conclude(task: Task, x: Tensor, kept: list[Tensor]) -> None:
    """Its last stage, and the change of the weight."""
    _graph(task, _conclude)(x, kept, _last(task))


def _first(task: Task, given: dict[str, Any]) -> tuple:
    """What `_prepare` takes apart."""
    names = keywords(first_stage(task.rule))
    numbers = {name: _tensor(value) for name, value in given.items() if name in names}
    dtype = compute_dtype(task.member.p.dtype)
    seeds = {
        number: _tensor(task.rounding_seed(number))
        for number, name in enumerate(slot_names(task.state))
        if is_coarse(task.state, name, dtype)
    }
    slots = {name: t for name, t in task.state.items() if name not in ("step", ERROR)}
    return task.member.p, task.g, slots, numbers, seeds, task.ok


def _last(task: Task) -> tuple:
    """What `_move` takes apart."""
    seed = _tensor(task.rounding_seed("weight")) if task.h.rounding == "stochastic" else None
    return task.member.p, task.ok, _tensor(task.lr), task.state.get(ERROR), seed, task.lost


def _tensor(value: float | Tensor) -> Tensor:
    """A number as 0 dimensions on the host: float64 or int64."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


# The graphs.


def _step(route: Route, names: frozenset[str], first: tuple, last: tuple) -> None:
    _move(route, _prepare(route, names, first), last)


def _prepare(route: Route, names: frozenset[str], first: tuple) -> Any:
    p, g, slots, given, seeds, ok = first
    g, w = as_matrix(g, route.layout), as_matrix(p, route.layout)
    return run_first(route.rule, route.h, names, g, w, slots, given, seeds.__getitem__, ok)


def _conclude(route: Route, names: frozenset[str], x: Tensor, kept: list[Tensor], last: tuple) -> None:
    _move(route, route.rule.conclude(x, route.h, *kept), last)


def _move(route: Route, u: Tensor, last: tuple) -> None:
    p, ok, lr, error, seed, lost = last
    u = from_matrix(u, p, route.layout)
    apply_update(p, u, lr, route.h.weight_decay, ok, route.rule.decay_after, error=error, seed=seed, lost=lost)


# Making and keeping them.


def _place(task: Task) -> tuple:
    p, route = task.member.p, task.member.route
    about = (tuple(p.shape), p.dtype, task.g.dtype, p.device, task.ok is None, task.lost is None)
    return route.rule, route.layout, *about


def _graph(task: Task, function: Callable) -> Callable:
    kept = _graphs[_place(task)].setdefault(task.h, {})
    if function not in kept:
        kept[function] = _compiled(function, task.member.route)
    return kept[function]


def _numbers_first(graph: fx.GraphModule, examples: list[Tensor]) -> Callable:
    """Compile a graph without what it does to single numbers, which is done before: a power of the step number, say.

    A code generator would do that again for every element.
    """
    single: set[fx.Node] = set()
    for node in graph.graph.nodes:
        value = node.meta.get("example_value")
        number = isinstance(value, Tensor) and (value.ndim, value.dtype, value.device.type) == (0, torch.float64, "cpu")
        if number and single.issuperset(node.all_input_nodes) and node.op != "get_attr":
            single.add(node)
    if not any(node.op != "placeholder" for node in single):
        return lookup_backend(BACKEND)(graph, examples)
    parts = split_module(graph, graph, lambda node: int(node not in single))
    numbers, rest = parts.get_submodule("submod_0"), parts.get_submodule("submod_1")
    values: dict[Any, Any] = {}
    given = iter(examples)
    for node in parts.graph.nodes:
        arguments = [values.get(argument, argument) for argument in node.args]
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.target == "submod_1":
            del parts.submod_1  # a module's child must be a module, an attribute need not
            parts.submod_1 = lookup_backend(BACKEND)(rest, arguments)  # type: ignore[arg-type, assignment]
            break
        else:
            values[node] = numbers(*arguments) if node.op == "call_module" else node.target(*arguments)
    return parts


def _compiled(function: Callable, route: Route) -> Callable:
    names = keywords(first_stage(route.rule))

    def graph(*args: Any) -> Any:
        return function(route, names, *args)

    name = f"{route.rule.__name__}{function.__name__}_{next(_number)}"
    own = types.FunctionType(graph.__code__.replace(co_name=name), graph.__globals__, name, None, graph.__closure__)
    made = torch.compile(own, backend=_numbers_first, dynamic=False, fullgraph=True)

    def call(*args: Any) -> Any:
        global _failed
        if not _failed:
            try:
                return made(*args)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # nothing has been written yet
                _failed = True
                reason = " ".join(str(error).split("\n\n")[0].split())
                warnings.warn(
                    f"engine='compiled': {route.rule.__name__} steps without, as all do from now on: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return graph(*args)

    return call
