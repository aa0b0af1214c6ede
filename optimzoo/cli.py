"""The `optimzoo` command: list and show optimizers; plan, fit, run and compare recipes; measure steps."""

import contextlib
import inspect
import json
import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    print(
        f"optimzoo's command needs the recipes extra ({error.name} is missing): pip install 'optimzoo[recipes]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from error

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optimzoo import modules, registry

app = typer.Typer(
    help="Memory-efficient optimizers for PyTorch that account for every byte they hold.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
WIDE = 4  # methods that a table with a column each has room for
# Of what bytes are shown: layers that train so many numbers, and an optimizer that is told what has no default.
LAYER: dict[str, Any] = {"rank": 64, "density": 0.01}
NEEDED = {"total_steps": 1000}

Recipe = Annotated[Path, typer.Argument(help="A YAML file, such as recipes/quickstart.yaml.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key, such as optimizer.lr=1e-3. Repeatable.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the results; runs/<name of the recipe> by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]


@app.callback(invoke_without_command=True)
def _options(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        print(version("optimzoo"))
        raise typer.Exit


@app.command("list")
def list_optimizers(as_json: Json = False) -> None:
    """Every optimizer: its name, its paper and the bytes it holds for each weight of a 4096 x 4096 float32 matrix."""
    rows: list[dict[str, Any]] = []
    for name, kind in registry.optimizers().items():
        found = held(kind, (4096, 4096))
        row = {"name": name, "paper": kind.paper, "bytes_per_weight": found["total"] / 4096**2, "layer": found["layer"]}
        rows.append(row)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("name", "paper")
    table.add_column("bytes a weight", justify="right")
    for row in rows:
        table.add_row(row["name"], row["paper"], f"{row['bytes_per_weight']:.3g}")
    out.print(table)
    layers = [f"{row['name']} in a {row['layer']}" for row in rows if row["layer"]]
    out.print(", ".join(layers), highlight=False)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="One of the names that `optimzoo list` prints.")],
    shape: Annotated[str, typer.Option(help="Shape of the weight whose bytes are shown.")] = "4096,4096",
    as_json: Json = False,
) -> None:
    """One optimizer: what it does, its options, and what it remembers for a weight of the given shape."""
    with _one_sentence(ValueError):
        kind = registry.optimizer(name)
        size = parse_shape(shape)
        found = held(kind, size)
    options = {
        key: {"default": option.default, "allowed": option.bounds, "meaning": option.doc}
        for key, option in kind.options.items()
    }
    text = "\n\n".join(inspect.cleandoc(part) for part in (sys.modules[kind.__module__].__doc__, kind.__doc__) if part)
    if as_json:
        print(
            json.dumps({"name": name, "paper": kind.paper, "about": text, "options": options, "shape": size, **found})
        )
        return
    print(text)
    table = Table("option", "default", "allowed", "meaning", title="Options", title_justify="left")
    for key, option in options.items():
        table.add_row(key, str(option["default"]), option["allowed"], option["meaning"])
    out.print(table)
    where = f" in a {found['layer']}" if found["layer"] else ""
    title = f"Remembered for a float32 weight {shape}{where}"
    table = Table("slot", "kind", "shape", title=title, title_justify="left")
    table.add_column("bytes", justify="right")
    for slot in found["slots"]:
        table.add_row(slot["name"], slot["kind"], str(tuple(slot["shape"])), f"{slot['bytes']:,}")
    table.add_section()
    table.add_row("total", "", f"{found['total'] / math.prod(size):.3f} a weight", f"{found['total']:,}")
    out.print(table)


@app.command()
def run(
    recipe: Recipe,
    changes: Set = None,
    folder: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's checkpoint, if it has one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train what a recipe says; results, pictures and checkpoint go into one folder."""
    training = _training()
    place = folder or Path("runs") / recipe.stem
    with _stoppable("--resume goes on from the last checkpoint"), _one_sentence(training.UserError):
        loaded = training.load(recipe, changes or ())
        result = training.train(loaded, place, resume=resume, quiet=as_json)
    if os.environ.get("RANK", "0") != "0":
        return  # torchrun's other processes
    if as_json:
        print(json.dumps(result))
        return
    out.print(training.report.table([result], f"{place}: {result['steps']} steps, {result['tokens']:,} tokens"))
    _files(place, "loss.png", "memory.png")
    if others := len(loaded.compare):
        print(f"note: none of its {others} entries to compare was run; optimzoo compare {recipe} does", file=sys.stderr)


@app.command()
def compare(
    recipe: Recipe,
    changes: Set = None,
    folder: Out = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in its own process.")] = 1,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="optimizer.lr=1e-3,2e-3 tries these values; "
            "optimizer.lr alone goes on by factors of 2 until the best is interior."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, such as 0,1,2; in a sweep all but the first at the best value only.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run every entry of a recipe's `compare`; what is finished is not repeated, what was interrupted goes on."""
    training = _training()
    key, _, values = (sweep or "").partition("=")
    changes = list(changes or ())
    changes += [f"sweep={{key: {key}, values: [{values}]}}"] if sweep else []
    changes += [f"seeds=[{seeds}]"] if seeds else []
    place = folder or Path("runs") / recipe.stem
    with _stoppable("the same command goes on from the last checkpoints"), _one_sentence(training.UserError):
        said = {"command": " ".join(["optimzoo", *sys.argv[1:]]), "source": recipe.name}
        result = training.compare(training.load(recipe, changes), place, jobs=jobs, quiet=as_json, **said)
    if result["stale"]:
        print(f"note: made by other code, delete to repeat: {', '.join(result['stale'])}", file=sys.stderr)
    for label, why in result["missing"].items():
        print(f"note: no row {label}: {why}", file=sys.stderr)
    if as_json:
        print(json.dumps(result))
        return
    corpus = result["corpus"]
    caption = f"data {corpus['name']}, sha256 {corpus['sha256'][:12]}, Python {corpus['python']}"
    methods = result["methods"]
    table = training.report.table if len(methods) <= WIDE else training.page.table  # columns have more to say
    out.print(table(methods, str(place)), escape(caption), sep="\n", highlight=False)
    if result["claims"]:
        out.print(training.page.verdicts(result["claims"]), highlight=False)
    if swept := [method for method in methods if "tried" in method]:
        out.print(training.report.sweeps(swept))
    _files(place, "loss.png", "memory.png", "pareto.png", "comparison.md")


Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE] [--OPTION VALUE]...", help="A recipe, or --model and the optimizer's options."),
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="A transformers config.json, or a Llama: 60m 130m 350m 1b 3b 7b 65b.")
]
Dtype = Annotated[
    str | None, typer.Option(help="With --model: bfloat16 or float32, bf16 or fp32; by default bfloat16.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="With --model: sequences at a time; by default 1.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="With --model: tokens of a sequence; by default 2048.")]
Accumulate = Annotated[int | None, typer.Option(min=1, help="With --model: batches of a step; by default 1.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Keep the inputs of blocks only.")]
Release = Annotated[
    bool,
    typer.Option("--release", help="Step inside backward, one gradient at a time; a recipe says it as release: true."),
]
Ranks = Annotated[int, typer.Option(min=1, help="Ranks of FSDP, by arithmetic.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None, typer.Option(help="What is planned for; a recipe says it itself.")
]
# What --model leaves open: option -> its key in a recipe, and what it is where it is not given.
OPTIONS: dict[str, tuple[str, Any]] = {
    "optimizer": ("optimizer.name", "adamw"),
    "dtype": ("model.dtype", "bfloat16"),
    "batch": ("data.batch", 1),
    "sequence": ("data.sequence", 2048),
    "accumulate": ("data.accumulate", 1),
}
OPEN = {"ignore_unknown_options": True}  # the optimizer's options go on to the optimizer


@app.command(context_settings=OPEN)
def plan(
    words: Words = None,
    model: ModelName = None,
    optimizer: Annotated[str | None, typer.Option(help="With --model: its name; by default adamw.")] = None,
    dtype: Dtype = None,
    batch: BatchSize = None,
    sequence: Tokens = None,
    accumulate: Accumulate = None,
    checkpointing: Checkpointing = False,
    release: Release = False,
    ranks: Ranks = 1,
    device: Device = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Say what a training step will need, by part and at its peak, with nothing allocated."""
    training = _training()
    given = {"dtype": dtype, "batch": batch, "sequence": sequence, "accumulate": accumulate, "optimizer": optimizer}
    with _one_sentence(training.UserError):
        recipe = _planned(training, words, model, given, release, changes)
        found = training.planning.plans(recipe, checkpointing=checkpointing, world_size=ranks, device=device)
        failed = [result for result in found.values() if isinstance(result, Exception)]
        if len(failed) == len(found):
            raise failed[0]
    if as_json:
        print(json.dumps({k: {"error": str(v)} if isinstance(v, Exception) else v.as_dict() for k, v in found.items()}))
        return
    for label, entry in recipe.entries().items():
        result = found[label]
        print(label if len(found) > 1 else getattr(result, "optimizer", ""), end=": ")
        print(training.planning.setting(entry, checkpointing, ranks), result, sep="\n", end="\n\n")


@app.command(context_settings=OPEN)
def fit(
    gpu: Annotated[str, typer.Option(help="The memory there is, such as 24GiB.")],
    words: Words = None,
    model: ModelName = None,
    dtype: Dtype = None,
    batch: BatchSize = None,
    sequence: Tokens = None,
    accumulate: Accumulate = None,
    checkpointing: Checkpointing = False,
    release: Release = False,
    ranks: Ranks = 1,
    device: Device = "cuda",
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Say which optimizers train a model in the given memory, with what to spare, and the largest batch of each."""
    training = _training()
    given = {"dtype": dtype, "batch": batch, "sequence": sequence, "accumulate": accumulate}
    with _one_sentence(training.UserError):
        recipe = _planned(training, words, model, given, release, changes)
        memory = training.planning.bytes_of(gpu)
        how: dict[str, Any] = {"checkpointing": checkpointing, "world_size": ranks}
        if not as_json:
            how["progress"] = partial(print, file=sys.stderr, flush=True)  # with --release it takes minutes
        result = training.planning.fits(recipe, memory, device=device, **how)
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    print(f"{training.planning.setting(recipe, checkpointing, ranks)}, in {gpu}", result, sep="\n")
    if not result.any_fits:
        print(training.planning.advice(recipe, checkpointing, ranks))


@app.command()
def bench(
    optimizers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME[:OPTION=VALUE,...]]...",
            help="Such as cosmos frugal:projection=rows,density=0.5; by default all of the zoo. Where they are "
            "installed: galore apollo soap torchao.adamw8bit heavyball.muon bitsandbytes.adamw8bit. "
            "With --training also wta-crs.",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Yardsticks, repeatable; by default torch.adamw and torch.muon (with AdamW for the rest)."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "--shapes", help="A Llama (60m 130m ... 65b), a recipe, or a transformers config.json."
        ),
    ] = "60m",
    layers: Annotated[
        str | None, typer.Option(help="Layers of a Llama; 8,32,128 shows how cost grows; by default 2.")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Step embeddings and head too: AdamW's in nearly all methods.")
    ] = False,
    whole: Annotated[
        bool, typer.Option("--training", help="Whole training steps: forward, backward, optimizer, at equal batch.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every candidate is run, in turns.")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before, not counted.")] = 3,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float32; by default a recipe's own, else float32.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="With --training: sequences at a time; by default a recipe's own, else 4."),
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(min=1, help="With --training: tokens of a sequence; by default a recipe's own, else 128."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the CPU; by default torch's own choice.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to measure.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure steps on this machine: 20th percentiles of interleaved rounds, ratios to yardsticks, bytes beside.

    The run is called invalid where the median lies 1.3 times above the 20th percentile: then the machine was busy.
    """
    training = _training()
    with _one_sentence(ImportError):
        from optimzoo import bench as benches
    wanted = benches.Wanted(
        model=model,
        optimizers=optimizers or (),
        against=against or (),
        layers=layers,
        embeddings=embeddings,
        training=whole,
        rounds=rounds,
        warmup=warmup,
        dtype=dtype,
        batch=batch,
        sequence=sequence,
        threads=threads,
        device=device,
    )
    with _one_sentence(training.UserError):
        result = benches.run(wanted, quiet=as_json)
    if as_json:
        print(json.dumps(result))
    else:
        benches.show(result, out)


def _planned(
    training: Any,
    words: list[str] | None,
    model: str | None,
    given: dict[str, Any],
    release: bool,
    changes: list[str] | None,
) -> Any:
    """The recipe that the words name, or the one that --model and its companions (some of `OPTIONS`) describe."""
    rest, options = training.planning.options_from(words or ())
    if len(rest) > 1 or bool(rest) == bool(model):
        raise training.UserError("give one recipe, or --model with a size or a config.json")
    if options and (rest or "optimizer" not in given):
        name = next(iter(options)).replace("_", "-")
        raise training.UserError(f"there is no option --{name} here; keys of a recipe are changed with --set")
    given = {name: value for name, value in given.items() if value is not None}
    if rest and given:
        name, value = next(iter(given.items()))
        value = training.planning.DTYPES.get(value, value)
        raise training.UserError(f"--{name} is for --model; in a recipe it is --set {OPTIONS[name][0]}={value}")
    if rest:
        return training.load(rest[0], [*(changes or ()), *(["release=true"] if release else [])])
    if changes:
        raise training.UserError("--set changes keys of a recipe; with --model give the options themselves")
    chosen = {name: default for name, (_, default) in OPTIONS.items()} | given
    return training.planning.described(model, options=options, device="cuda", release=release, **chosen)


def _files(folder: Path, *names: str) -> None:
    out.print("see", *(str(folder / name) for name in names), markup=False, highlight=False, soft_wrap=True)


def parse_shape(text: str) -> tuple[int, ...]:
    """`4096,11008` as a shape."""
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--shape {text}: write positive sizes with commas between them, such as 4096,11008")
    return tuple(int(part) for part in parts)


def held(kind: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the optimizer holds for one float32 weight when it is made, and the layer that it needs for it, if any.

    Tensors are fake: nothing is allocated.
    """
    if len(shape) != 2 and "fallback_lr_scale" in kind.options:
        raise ValueError(f"{kind.__name__} is for matrices; a weight with {len(shape)} dimension(s) goes to adamw")
    layer, given = None, {name: value for name, value in NEEDED.items() if name in kind.options}
    with FakeTensorMode():
        weight = (
            nn.Linear(*shape[::-1], bias=False) if len(shape) == 2 else nn.ParameterDict({"weight": torch.empty(shape)})
        )
        model = nn.ModuleDict({"layer": weight})
        if kind.needs_model:
            layer = _converted(model, kind.__name__)
        optimizer = kind(model, **given)
        book = optimizer.memory()
        shapes = {
            (name, key): list(t.shape)
            for group in optimizer.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
            for key, t in optimizer.state[p].items()
        }
    slots = [
        {
            "name": f"{entry.param}.{entry.key}".removeprefix("layer.").removeprefix("weight."),
            "kind": entry.kind,
            "shape": shapes[entry.param, entry.key],
            "bytes": entry.nbytes,
        }
        for entry in book.entries
    ]
    return {"layer": layer, "slots": slots, "total": book.total}


def _converted(model: nn.Module, driver: str) -> str:
    """Convert the model's layers for the optimizer of that name; into what."""
    kind = next(kind for kind in modules.kinds().values() if getattr(kind, "driver", None) == driver)
    options = {name: value for name, value in LAYER.items() if name in kind.options}
    modules.convert(model, kind, **options)
    return f"{kind.__name__}({', '.join(f'{name}={value}' for name, value in options.items())})"


@contextlib.contextmanager
def _one_sentence(expected: type[Exception]) -> Iterator[None]:
    """What the user can mend is one sentence on standard error and exit code 2; a fault of ours keeps its traceback."""
    try:
        yield
    except (expected, OSError) as error:
        text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        raise SystemExit(2) from error


@contextlib.contextmanager
def _stoppable(advice: str) -> Iterator[None]:
    """What can go on later says how when it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {advice}", file=sys.stderr)
        raise SystemExit(130) from None


def _training() -> Any:
    """The package that runs recipes, imported when one is to be run: it takes seconds."""
    with _one_sentence(ImportError):
        from optimzoo import training

        return training


def main() -> None:
    """Run the command."""
    app()
