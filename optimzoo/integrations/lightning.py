"""Lightning: a callback that logs the bytes of the optimizers. The optimizers themselves need no bridge."""

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("optimzoo.integrations.lightning needs pip install 'optimzoo[integrations]'") from error

from optimzoo.integrations import memory_metrics


class MemoryMonitor(Callback):
    """Logs `optimzoo.integrations.memory_metrics` of every optimizer to the Trainer's loggers.

    At step 1 and then every `log_every_n_steps`, as Lightning logs everything. With several optimizers, the names of
    the second and later ones end in `/1`, `/2`, ...
    """

    def __init__(self) -> None:
        self._logged = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log once a step, however many batches it has."""
        step = trainer.global_step
        if step == self._logged or (step - 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]  # set by a connector
            return
        self._logged = step
        for place, optimizer in enumerate(trainer.optimizers):
            metrics = memory_metrics(optimizer)
            for logger in trainer.loggers:
                logger.log_metrics({f"{name}/{place}" if place else name: n for name, n in metrics.items()}, step=step)
