"""PEFT's LoRA under the same entry of a recipe as the zoo's own layers: the baseline of SST and SFT."""

from typing import Any

from torch import nn

from optimzoo.core.hyper import nearest
from optimzoo.modules.replacement import select
from optimzoo.training.errors import needs

OPTIONS = {"rank": 8, "alpha": None, "dropout": 0.0, "exclude": ()}


def inject(model: nn.Module, match: str | tuple[str, ...], options: dict[str, Any]) -> list[str]:
    """Put LoRA adapters beside the layers that match, whose own weights stop learning, and return the layers' names.

    `alpha` is the rank unless given, which makes PEFT's factor alpha / rank one. What is in no such layer (embeddings,
    head, norms) keeps learning: fine-tuning freezes it before.
    """
    peft = needs("peft", "modules: kind lora")
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"lora has no option {name!r}{nearest(name, OPTIONS)}")
    given = OPTIONS | options
    names = list(select(model, "LoRA", match, given["exclude"]))
    inside = {p for name in names for p in model.get_submodule(name).parameters()}
    learning = [p for p in model.parameters() if p.requires_grad and p not in inside]
    config = peft.LoraConfig(
        r=given["rank"],
        lora_alpha=given["rank"] if given["alpha"] is None else given["alpha"],
        lora_dropout=given["dropout"],
        target_modules=names,
    )
    peft.inject_adapter_in_model(config, model)  # freezes everything but the adapters
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and p.dtype.itemsize < 4:  # small steps are lost in bfloat16: get_peft_model widens, too
                setattr(module, name, nn.Parameter(p.detach().float()))
    for p in learning:
        p.requires_grad_(True)
    return names
