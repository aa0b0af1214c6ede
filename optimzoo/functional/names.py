"""Names of parameters and layers without what wrappers add to them; and the name of a mark on parameters."""

import re

# A whole part of a dotted name, as `vision_module.weight` is a layer's own.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

TAKEN_OUT = "_optimzoo_taken_out"
"""Attribute of a parameter that is in its model no more, as its layer was replaced by another."""


def clean_name(name: str) -> str:
    """The own name: wrappers (DDP, compile, FSDP) must not change seeds, patterns or what a checkpoint is matched by.

    `_orig_mod.layers.0.weight` -> `layers.0.weight`.
    """
    return _WRAPPERS.sub("", name)
