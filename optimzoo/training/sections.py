"""The sections of a recipe, as frozen models that refuse what they do not know."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from optimzoo.training.optimizers import check_name

SIZES = {
    "60m": {"hidden_size": 512, "intermediate_size": 1376, "layers": 8, "heads": 8, "vocab": 32000},
    "130m": {"hidden_size": 768, "intermediate_size": 2048, "layers": 12, "heads": 12, "vocab": 32000},
    "350m": {"hidden_size": 1024, "intermediate_size": 2736, "layers": 24, "heads": 16, "vocab": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 5461, "layers": 24, "heads": 32, "vocab": 32000},
    "3b": {"hidden_size": 2560, "intermediate_size": 6848, "layers": 32, "heads": 32, "vocab": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32, "vocab": 32000},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "layers": 80, "heads": 64, "vocab": 32000},
}

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Llama(Section):
    """A Llama with random weights; `size` fills in what is not said."""

    name: Literal["llama"]
    size: Literal["60m", "130m", "350m", "1b", "3b", "7b", "65b"] | None = None
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    vocab: int = Field(default=256, gt=1)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        return {**SIZES.get(str(values.get("size")), {}), **values} if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 2 * heads={2 * self.heads}")
        return self


class Transformers(Section):
    """Any model of transformers that fits the data, with random weights: `config` is a file, or its fields."""

    name: Literal["transformers"]
    config: Path | dict[str, Any]
    dtype: Literal["float32", "bfloat16"] = "float32"


class Pretrained(Section):
    """A causal language model with its trained weights: `id` is a name on the Hugging Face Hub, or a folder."""

    name: Literal["pretrained"]
    id: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


Patterns = str | tuple[str, ...]  # of a shell; one of them must match


class Batches(Section):
    head: ClassVar[str] = "CausalLM"  # as transformers calls the models that read these data
    sequence: int = Field(default=128, gt=0)
    batch: int = Field(default=16, gt=0)
    accumulate: int = Field(default=1, gt=0)


class Documents(Batches):
    """Files below a folder: those whose path there matches `include`, if that is said, and not `exclude`."""

    include: Patterns = ()
    exclude: Patterns = ()


class PythonSource(Documents):
    """The embedded corpus: the sources of Python's standard library, as bytes."""

    name: Literal["python-source"]


class Text(Documents):
    """One file, or every file below a folder, as bytes."""

    name: Literal["text"]
    path: Path


class HuggingFace(Batches):
    """A data set by name, tokenised: as many documents as `tokens` needs, in their order.

    With `response` a row is an exchange: `prompt` and `response` are texts with the row's columns in braces, sequences
    start where exchanges do, and the loss counts the tokens of responses alone.
    """

    name: Literal["huggingface"]
    dataset: str
    config: str | None = None
    split: str = "train"
    data_files: str | None = None
    text_column: str = "text"
    prompt: str = ""
    response: str | None = None
    tokenizer: str
    tokens: int = Field(default=10_000_000, gt=0)
    streaming: bool = False


class Labelled(Batches):
    """Texts in classes, padded to `sequence`; an epoch has each once."""

    head: ClassVar[str] = "SequenceClassification"

    @property
    def classes(self) -> int:
        raise NotImplementedError


class PythonPackages(Labelled):
    """Lines of the embedded corpus, as words: which package of Python's standard library are they from?"""

    name: Literal["python-packages"]

    @property
    def classes(self) -> int:
        return len(PACKAGES)


class Glue(Labelled):
    """A task of GLUE, tokenised; `dataset` may be a folder that is laid out alike."""

    name: Literal["glue"]
    task: Literal["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli"]
    tokenizer: str
    dataset: str = "nyu-mll/glue"

    @property
    def classes(self) -> int:
        return 3 if self.task == "mnli" else 2


class OptimizerSpec(BaseModel):
    """`name`, `lr` and any option of the class; `fallback_lr` is the learning rate of embeddings, head and vectors."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    name: str
    lr: float = Field(gt=0)
    fallback_lr: float | None = Field(default=None, gt=0)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return check_name(name)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Conversion(BaseModel):
    """Layers to replace: `kind` of layer, `match` on module names, and the options of that kind."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str
    match: Patterns = "*"


class Schedule(Section):
    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    steps: int = Field(gt=0)
    min_ratio: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _warm_before_the_end(self) -> Self:
        if self.warmup > self.steps:
            raise ValueError(
                f"warmup={self.warmup} is longer than steps={self.steps}, so the full learning rate is never reached; "
                "make it a part of them, such as a twentieth"
            )
        return self


class Preparation(Section):
    """A run before this one, whose weights this one starts from: the recipe's own but for what is said here."""

    data: dict[str, Any] = {}  # the keys that differ
    optimizer: OptimizerSpec
    modules: tuple[Conversion, ...] = ()
    freeze: Patterns = ()
    schedule: Schedule
    clip: float = Field(default=1.0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**63)  # one preparation for all seeds


class Memory(Section):
    every: int = Field(default=50, gt=0)


class Evaluation(Section):
    every: int = Field(default=100, gt=0)
    batches: int = Field(default=16, gt=0)


class Checkpoint(Section):
    every: int = Field(default=100, ge=0)  # 0: never


class Distributed(Section):
    """How the processes that torchrun starts share a run; `data.batch` is split over them."""

    strategy: Literal["ddp", "fsdp2"]


class Wandb(Section):
    mode: Literal["off", "offline", "online"] = "off"
    project: str = "optimzoo"
    run: str | None = None


class Sweep(Section):
    """How the best value of `key` is sought: the given `values`, or by factors until the best one is interior."""

    key: str = "optimizer.lr"
    values: tuple[float, ...] = ()
    factor: float = Field(default=2.0, gt=1)
    limit: int = Field(default=9, ge=3)

    @field_validator("values")
    @classmethod
    def _sorted(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(values)))


CLAIM_LABELS = {"below": 2, "at_most": 2, "near": 2, "between": 3, "closes": 3}  # how many labels each rule takes


class Claim(Section):
    """What a paper says about rows of the comparison, by their labels; `training/claims.py` has the rules."""

    text: str = Field(min_length=1)
    below: tuple[str, ...] = ()
    at_most: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()

    def rules(self) -> list[tuple[str, tuple[str, ...]]]:
        """(rule, labels) of every rule that the claim names."""
        return [(name, getattr(self, name)) for name in CLAIM_LABELS if getattr(self, name)]

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.rules():
            raise ValueError(f"a claim needs one of {', '.join(CLAIM_LABELS)} with labels of entries")
        for name, labels in self.rules():
            wanted = CLAIM_LABELS[name]
            if len(labels) != wanted and (name != "below" or len(labels) < wanted):
                raise ValueError(f"{name} takes {wanted} labels{' or more' * (name == 'below')}, not {len(labels)}")
        return self


class Entry(BaseModel):
    """One line of a comparison: a label, and the sections in which it differs from the recipe."""

    model_config = ConfigDict(extra="allow", frozen=True)
    label: str = Field(min_length=1)
