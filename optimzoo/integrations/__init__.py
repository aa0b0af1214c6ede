"""Bridges to trainers. Each module here imports the library of its name, so nothing else imports them."""

from torch.optim import Optimizer

from optimzoo.memory import History, ledger


def memory_metrics(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of an optimizer's state as numbers to log: `memory/state_bytes` and one for each kind of state.

    `memory/workspace_bytes` is there when the last step's was measured (`optimzoo.track(opt, workspace=True)`).
    """
    book = ledger(optimizer)
    metrics = {"memory/state_bytes": book.total}
    metrics |= {f"memory/{kind.replace(' ', '_')}_bytes": held for kind, held in book.by("kind").items()}
    history = getattr(optimizer, "memory_history", None)
    if isinstance(history, History) and history and history[-1].workspace_bytes is not None:
        metrics["memory/workspace_bytes"] = history[-1].workspace_bytes
    return metrics
