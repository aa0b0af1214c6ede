"""Lightning: the optimizer in `configure_optimizers`, as any other, and a callback that logs its bytes."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import optimzoo
from optimzoo.integrations.lightning import MemoryMonitor

STEPS = 40


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Embedding(100, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 100)
        )

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x).flatten(0, 1), y.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        opt = optimzoo.SWAN(self, lr=1e-2)  # one optimizer: embeddings, head and biases are AdamW's inside of it
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    pl.seed_everything(0)
    tokens = torch.randint(0, 100, (16 * STEPS, 8))
    loader = DataLoader(TensorDataset(tokens, (tokens * 5 + 3) % 100), batch_size=16)
    trainer = pl.Trainer(
        max_steps=STEPS,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=CSVLogger("logs"),
        callbacks=[MemoryMonitor()],
        enable_progress_bar=False,
    )
    trainer.fit(Model(), loader)  # fit(..., ckpt_path="last") goes on, bit for bit
    print(trainer.optimizers[0].memory())


if __name__ == "__main__":
    main()
