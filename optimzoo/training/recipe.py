"""Recipes: YAML in, frozen models out. Unknown keys name the nearest known one; names resolve in registries only."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from optimzoo import registry
from optimzoo.core.hyper import nearest
from optimzoo.training.errors import UserError
from optimzoo.training.parsing import parse, put
from optimzoo.training.problems import explain
from optimzoo.training.sections import (
    Checkpoint,
    Claim,
    Conversion,
    Distributed,
    Entry,
    Evaluation,
    Glue,
    HuggingFace,
    Labelled,
    Llama,
    Memory,
    OptimizerSpec,
    Patterns,
    Preparation,
    Pretrained,
    PythonPackages,
    PythonSource,
    Schedule,
    Section,
    Sweep,
    Text,
    Transformers,
    Wandb,
)

_UNSEEN = ("wandb", "checkpoint", "memory", "release")  # the weights are the same to the bit whatever these say
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch takes


class Recipe(Section):
    """One run, or with `compare` several that differ in some sections."""

    model: Annotated[Llama | Transformers | Pretrained, Field(discriminator="name")]
    data: Annotated[PythonSource | Text | HuggingFace | PythonPackages | Glue, Field(discriminator="name")]
    pretrain: Preparation | None = None
    optimizer: OptimizerSpec
    freeze: Patterns = ()  # names of parameters; what `modules` then puts in is trained
    modules: tuple[Conversion, ...] = ()
    schedule: Schedule
    clip: float = Field(default=1.0, ge=0)  # 0: never
    release: bool = False  # step inside backward, and free each gradient at once
    autocast: Literal["bf16", "none"] = "none"
    checkpointing: bool = False  # keep the inputs of blocks only, and compute them again in backward
    norms: Literal["none", "position", "sample", "token"] = "none"  # what sampled layers know, as NormCache has it
    memory: Memory = Memory()
    eval: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    distributed: Distributed | None = None
    wandb: Wandb = Wandb()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, gt=0, le=1024)
    seed: Seed = 0
    compare: tuple[Entry, ...] = ()
    sweep: Sweep | None = None
    seeds: tuple[Seed, ...] = ()
    claims: tuple[Claim, ...] = ()

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{list(seeds)} names a seed twice; name each once")
        return seeds

    @model_validator(mode="after")
    def _examples_have_numbers(self) -> Self:
        if self.norms in ("sample", "token") and not isinstance(self.data, Labelled):
            raise ValueError(f"norms={self.norms!r} needs labelled data, whose examples have numbers; use position")
        return self

    @model_validator(mode="after")
    def _releasable(self) -> Self:
        if not self.release:
            return self
        why = "release: true uses each gradient before the next one exists, so"
        if self.clip > 0:
            raise ValueError(f"{why} nothing can be clipped to a total norm (clip={self.clip:g}); add clip: 0")
        if self.data.accumulate > 1:
            raise ValueError(f"{why} none adds up over data.accumulate={self.data.accumulate} batches; make it 1")
        if self.optimizer.name not in registry.optimizers():
            raise ValueError(f"{why} it needs an optimizer of optimzoo, and optimizer.name={self.optimizer.name!r}")
        if self.distributed is not None:
            raise ValueError(f"{why} several processes could not average it; leave distributed out")
        return self

    @model_validator(mode="after")
    def _claims_are_about_entries(self) -> Self:
        labels = [entry.label for entry in self.compare]
        for name in (name for claim in self.claims for _, names in claim.rules() for name in names):
            if name not in labels:
                raise ValueError(f"claims: no entry of compare is called {name!r}{nearest(name, labels)}")
        return self

    def run(self) -> dict[str, Any]:
        """Everything that describes one run, as plain data."""
        return self.model_dump(mode="json", exclude={"compare", "sweep", "seeds", "claims"})

    @property
    def key(self) -> str:
        """A hash of everything that the weights depend on; what has its default counts as not said.

        So a key that recipes learn later leaves the results of older ones where they are.
        """
        beside = {*_UNSEEN, "compare", "sweep", "seeds", "claims"}
        decides = self.model_dump(mode="json", exclude=beside, exclude_defaults=True)
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]

    def preparation(self) -> "Recipe | None":
        """The run whose weights this one starts from."""
        if self.pretrain is None:
            return None
        values = (
            self.run() | self.pretrain.model_dump(mode="json") | {"pretrain": None, "release": False, "norms": "none"}
        )
        values["data"] = merged(self.run()["data"], self.pretrain.data)
        values["checkpoint"]["every"] = self.checkpoint.every or self.pretrain.schedule.steps  # the last one is needed
        return validate(values, "pretrain")

    def replace(self, changes: Mapping[str, Any]) -> "Recipe":
        """The single run that differs in the given dotted keys."""
        values = self.run()
        for name, value in changes.items():
            put(values, name, value)
        return validate(values, "recipe")

    def entries(self) -> dict[str, "Recipe"]:
        """The single runs of a comparison by label. A section with a `name` replaces the recipe's, others merge."""
        if not self.compare:
            return {self.optimizer.name: validate(self.run(), "recipe")}
        runs = {}
        for entry in self.compare:
            values = self.run()
            for section, part in (entry.model_extra or {}).items():
                values[section] = merged(values.get(section), part)
            runs[entry.label] = validate(values, f"compare entry {entry.label!r}")
        if len(runs) != len(self.compare):
            raise UserError("compare: two entries have the same label; give each its own")
        return runs


def merged(section: Any, part: Any) -> Any:
    """A section with a part of another one; a `name` in the part means that it stands for itself."""
    merge = isinstance(part, Mapping) and "name" not in part and isinstance(section, Mapping)
    return {**section, **part} if merge else part


def validate(values: Any, source: str) -> Recipe:
    """A recipe from plain data; what is wrong with it in one sentence."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: a recipe is a mapping of sections (model, data, optimizer, schedule, ...)")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Recipe)}") from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides, whose values are YAML too."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is no file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        others = [p.name for p in path.parent.glob("*.yaml")]
        near = nearest(path.name, others) if others else ""
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}{near}") from error
    values = parse(text, path.name)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not isinstance(values, dict):
            raise UserError(f"--set {override}: write it as key.sub=value, such as optimizer.lr=1e-3")
        put(values, key.strip(), parse(value, f"--set {override}"))
    recipe = validate(values, path.name)
    try:
        for entry in recipe.entries().values():
            entry.preparation()
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error
    return recipe
