"""Hugging Face Trainer: COSMOS with the Trainer's own learning rate, decay, betas and schedule; run twice to resume."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import optimzoo
from optimzoo.integrations.transformers import log_memory, optimizer_cls_and_kwargs


def main() -> None:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    text = torch.tensor(list(Path(torch.__file__).read_bytes()[: 64 * 256])).view(256, 64)
    args = TrainingArguments(
        output_dir="checkpoints",
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        weight_decay=0.1,  # of matrices and embeddings; norms and biases are left out, as Trainer does
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        logging_steps=10,
        save_steps=20,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in text],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(optimzoo.COSMOS, args, rank=8),
    )
    log_memory(trainer)
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(args.output_dir) if Path(args.output_dir).exists() else None
    )
    print(trainer.optimizer.optimizer.memory())


if __name__ == "__main__":
    main()
