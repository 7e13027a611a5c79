"""``muster prepare``: tokenise and pack the data before the run, and show counts and lengths."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli.options import JsonOption, Overrides, RecipeFile
from trainer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from trainer.data import PreparedDataset, Summary
    from trainer.recipe import Recipe

BAR = 40
LISTED = 10


def prepare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: JsonOption = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="number of processes that tokenise; default: one per core")
    ] = None,
    model: Annotated[
        bool,
        typer.Option("--model", help="instead of the data, make an NF4 copy of the base model, which all runs read"),
    ] = False,
) -> None:
    """Tokenise and pack the data of RECIPE ahead of its run. Shows counts, lengths and the fill of the packs."""
    from launcher.monitor.progress import Progress
    from launcher.terminal.console import print_json, stderr, stdout
    from trainer.recipe import load

    loaded = load(recipe, overrides or [])
    os.environ.update(loaded.cluster.env)  # before the libraries that read it are imported
    if model:
        copy = prepare_model(loaded, Progress(stderr()))
        if as_json:
            print_json(copy)
        else:
            stdout().print(f"{copy['uri']}: {copy['bytes']:,} bytes", soft_wrap=True)
        return
    found = prepare_recipe(loaded, Progress(stderr()), processes or len(os.sched_getaffinity(0)))
    if as_json:
        print_json(found)
        return
    console = stdout()
    for part in pictures(found):
        console.print(part, soft_wrap=True)


def prepare_recipe(recipe: Recipe, progress: Any, processes: int) -> dict[str, Any]:
    """Prepares the missing data in processes of this machine. Returns the output of ``--json``."""
    from launcher.driver.preflight import check_storage, load_run_tokenizer
    from trainer.data import process_pool, summarise
    from trainer.data.run_data import prepare_data
    from trainer.run import layout
    from trainer.storage import open_storage

    storage = open_storage(recipe.storage)
    check_storage(storage)
    progress.phase("preparing data")
    data = prepare_data(
        recipe,
        storage.child(recipe.name),
        storage.child(layout.PREPARED),
        lambda: load_run_tokenizer(recipe),
        map_windows=process_pool(processes),
        on_progress=progress.prepared,
        record=False,
    )
    progress.phase("planning the first epoch")
    found = {"train": part_json(data.train, summarise(data.train, recipe.seed, recipe.data.weights))}
    if data.eval is not None:
        found["eval"] = part_json(data.eval, summarise(data.eval, 0, [1.0] * len(data.eval.spec.sources)))
    return {**found, "sequence_length": recipe.data.sequence_length, "total_steps": data.total_steps}


def prepare_model(recipe: Recipe, progress: Any) -> dict[str, Any]:
    """Makes the NF4 copy of the recipe's base model if there is none. Returns the output of ``--json``."""
    from launcher.driver.preflight import check_storage
    from trainer.model import check_weights
    from trainer.model.prequantised import make_copy
    from trainer.run import layout
    from trainer.storage import open_storage

    if recipe.model.quantization != "nf4":
        raise UsageError(
            f"prepare --model makes copies in NF4, and model.quantization is {recipe.model.quantization}: set it to nf4"
        )
    storage = open_storage(recipe.storage)
    check_storage(storage)
    check_weights(recipe.model)
    progress.phase("quantising the base model")
    copy = make_copy(recipe.model, storage.child(layout.MODELS))
    return {"uri": copy.url, "bytes": sum(o.size for o in copy.list())}


def part_json(prepared: PreparedDataset, summary: Summary) -> dict[str, Any]:
    sources = zip(prepared.spec.sources, prepared.per_source, prepared.warnings, strict=True)
    return {
        "fingerprint": prepared.fingerprint,
        "uri": prepared.storage.url,
        "windows": len(prepared.windows),
        **asdict(prepared.totals),
        "bad": [bad._asdict() for bad in prepared.bad_rows[:LISTED]],
        "sources": [
            {"path": source.path, "format": source.format, **asdict(counts), "warnings": warnings}
            for source, counts, warnings in sources
        ],
        "lengths": {
            "bins": [b._asdict() for b in summary.bins],
            "median": summary.median,
            "p95": summary.p95,
            "longest": summary.longest,
        },
        "packs": summary.packs,
        "fill": summary.fill,
    }


def pictures(found: dict[str, Any]) -> Iterator[RenderableType]:
    """Yields the summary for people: a table of the sources, bad rows, warnings, lengths, and the packs."""
    from rich.text import Text

    for name in ("train", "eval"):
        if part := found.get(name):
            paths = [f"source {i}: {source['path']} ({source['format']})" for i, source in enumerate(part["sources"])]
            yield Text("\n".join([f"{name}: {part['uri']}", *paths]))
            yield _table(part)
            yield from (Text(f"bad row: {bad['url']}, {bad['place']}: {bad['reason']}") for bad in part["bad"])
            for number, source in enumerate(part["sources"]):
                yield from (Text(f"warning: source {number}: {text}") for text in source["warnings"])
            yield Text("\n".join(_histogram(part["lengths"])))
            each = "one sample each" if part["fill"] is None else f"{part['fill']:.2%} full"
            of = "" if part["fill"] is None else f" of {found['sequence_length']:,} tokens"
            yield Text(f"packs: {part['packs']:,}{of} in the first epoch, {each}\n")
    yield Text(f"steps: {found['total_steps']:,}")


COLUMNS = {
    "rows": "rows",
    "samples": "samples",
    "tokens": "tokens",
    "target_tokens": "targets",
    "truncated": "truncated",
    "dropped": "dropped",
    "bad_rows": "bad",
}


def _table(part: dict[str, Any]) -> RenderableType:
    """Returns a row per source, under its index as in sample ids: paths are too long for a column."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("source")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [(str(i), source) for i, source in enumerate(part["sources"])]
    for label, source in [*rows, *([("all", part)] if len(rows) > 1 else [])]:
        table.add_row(label, *(f"{source[column]:,}" for column in COLUMNS))
    return table


def _histogram(lengths: dict[str, Any]) -> Iterator[str]:
    yield (
        f"tokens per sample: median {lengths['median']:,}, 95 % have at most {lengths['p95']:,}, "
        f"longest {lengths['longest']:,}"
    )
    most = max((b["samples"] for b in lengths["bins"]), default=1)
    digits = len(f"{lengths['longest']:,}")
    for b in lengths["bins"]:
        bar = "█" * -(-b["samples"] * BAR // most)
        yield f"  {b['low']:>{digits},}-{b['high']:<{digits},} {bar:<{BAR}} {b['samples']:,}"
