"""``muster preview``: what becomes of rows. The text of each sample with its targets marked, faults and warnings."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.options import Overrides, RecipeFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from trainer.data.preview import PreviewedSample, TextSpan

TARGET, FAULT, WARNING = "bold green", "bold red", "yellow"


def preview(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="rows of each source, from its first; 0 for all")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per sample on stdout")] = False,
) -> None:
    """Show what becomes of the first rows of RECIPE's training data: the text of each sample with its targets in
    colour, what is wrong and what is odd. It needs the tokenizer only, and writes nothing."""
    from launcher.driver.preflight import load_run_tokenizer
    from launcher.terminal.console import stderr, stdout
    from trainer.data import check_local_sources
    from trainer.data.preview import preview as previewed
    from trainer.data.run_data import train_spec
    from trainer.errors import InputError
    from trainer.recipe import load

    loaded = load(recipe, overrides or [])
    check_local_sources(loaded.data.train)
    tokenizer = load_run_tokenizer(loaded)
    spec = train_spec(loaded, tokenizer)
    console, counts = stdout(), dict.fromkeys(("samples", "tokens", "target tokens", "faults", "dropped"), 0)
    last, faults = (-1, -1), [0 for _ in spec.sources]
    read, told = 0, set[tuple[int, str]]()
    for sample in previewed(spec, tokenizer, rows or None):
        read += (sample.source, sample.index) != last
        last = (sample.source, sample.index)
        counts["samples"] += sample.fault is None and sample.dropped is None
        counts["tokens"] += sample.tokens
        counts["target tokens"] += sample.target_tokens
        counts["faults"] += sample.fault is not None
        counts["dropped"] += sample.dropped is not None
        faults[sample.source] += sample.fault is not None
        if as_json:
            print(json.dumps(sample.to_json(), ensure_ascii=False))
        else:
            sample.warnings = [text for text in sample.warnings if (sample.source, text) not in told]
            told |= {(sample.source, text) for text in sample.warnings}
            console.print(picture(sample, spec.sources[sample.source].path, console.is_terminal), soft_wrap=True)
    sys.stdout.flush()
    parts = ", ".join(f"{number:,} {name}" for name, number in counts.items() if number or name == "samples")
    stderr().print(f"{read:,} rows: {parts}", soft_wrap=True)
    if max(faults) > spec.max_bad_rows:
        raise InputError(
            f"{max(faults)} of a source's rows are faults, and a run stops at more than {spec.max_bad_rows} of them "
            "(data.max_bad_rows)"
        )


def picture(sample: PreviewedSample, path: str, coloured: bool) -> Text:
    """Returns a sample for a person. Without colours, the targets stand between ⟦ and ⟧."""
    from rich.text import Text

    counts = f"{sample.tokens:,} tokens, {sample.target_tokens:,} of them targets"
    out = Text(f"── {path}, row {sample.index} ({sample.row})" + (f": {counts}\n" if sample.spans else "\n"), "bold")
    out.append_text(_marked(sample.spans, coloured))
    if sample.rejected:
        out.append("\n   rejected:\n", "bold").append_text(_marked(sample.rejected, coloured))
    if sample.label is not None:
        out.append(f"\n   label {sample.label}", TARGET)
    for reason in filter(None, (sample.fault, sample.dropped)):
        out.append(f"\n   {'fault, ' + sample.place if sample.fault else 'dropped'}: {reason}", FAULT)
    for warning in sample.warnings:
        out.append(f"\n   warning: {warning}", WARNING)
    out.append("\n")
    return out


def _marked(spans: Sequence[TextSpan], coloured: bool) -> Text:
    from rich.text import Text

    out = Text()
    for text, target in spans:
        if target:
            out.append(text if coloured else f"⟦{text}⟧", TARGET)
        else:
            out.append(text)
    return out
