"""A loop of one's own: GradScaler, clipping, a schedule, an average of the weights, and a checkpoint."""

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import optimzoo

STEPS = 40


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 100))
    model.to(device)
    opt = optimzoo.COSMOS(model, lr=1e-2, rank=8)  # the only line that is not torch's
    print(opt.routes())

    schedule = OneCycleLR(opt, max_lr=1e-2, total_steps=STEPS, cycle_momentum=False)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    for step in range(STEPS):
        tokens = torch.randint(0, 100, (16, 8), device=device)
        with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
            logits = model(tokens)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ((tokens * 5 + 3) % 100).flatten())
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(opt)  # clipping needs gradients of their true size
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        schedule.step()
        average.update_parameters(model)
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}  state {opt.memory_history[-1].state_bytes:,} bytes")

    print(opt.memory())
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, "checkpoint.pt")
    loaded = torch.load("checkpoint.pt", weights_only=True)
    model.load_state_dict(loaded["model"])
    opt.load_state_dict(loaded["optimizer"])


if __name__ == "__main__":
    main()
