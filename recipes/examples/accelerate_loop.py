"""Hugging Face Accelerate: `prepare` as ever. Alone, or on several processes with `accelerate launch`."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_cosine_schedule_with_warmup

import optimzoo
from optimzoo.integrations import memory_metrics

STEPS = 40


def main() -> None:
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    tokens = torch.randint(0, 100, (16 * 2 * STEPS, 8))
    loader = DataLoader(TensorDataset(tokens, (tokens * 5 + 3) % 100), batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 100))

    # From the plain model: a prepared one has its own names, and is no longer needed to tell roles.
    opt = optimzoo.FRUGAL(model, lr=1e-2, density=0.25, update_gap=10)
    schedule = get_cosine_schedule_with_warmup(opt, num_warmup_steps=4, num_training_steps=STEPS)
    model, opt, loader, schedule = accelerator.prepare(model, opt, loader, schedule)

    for batch, (x, y) in enumerate(loader):
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
            opt.zero_grad()
        if batch % 20 == 0:
            accelerator.print(f"batch {batch:3d}  loss {loss.item():.3f}  {memory_metrics(opt.optimizer)}")
    accelerator.save_state("checkpoint")  # accelerator.load_state("checkpoint") goes on from here, bit for bit


if __name__ == "__main__":
    main()
