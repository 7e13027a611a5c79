"""``muster inspect``, ``merge`` and ``push``: what was saved looked at, made part of its base, sent to the Hub."""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from launcher.cli.generate import (
    AdapterOption,
    CombinationOption,
    DensityOption,
    ModelOption,
    RunOption,
    UseOption,
)
from launcher.cli.options import TrustOption
from launcher.terminal.console import hush_libraries, print_json, stderr, stdout
from trainer.errors import CorruptObject, UsageError

if TYPE_CHECKING:
    from trainer.artifacts.inspect import ArtifactReport

DTYPES = ("float32", "bfloat16", "float16")


def inspect(
    uri: Annotated[str, typer.Argument(metavar="URI", help="the folder of an adapter, a model or a run")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show what is at URI, and whether its files are complete; for a model, whether it loads and generates."""
    from trainer.artifacts.inspect import describe
    from trainer.recipe.trust import Trust

    with redirect_stdout(sys.stderr):  # libraries print; stdout has the result alone
        hush_libraries()
        found = describe(uri, trust=Trust(trust_remote_code))
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
    if not found.whole:
        raise CorruptObject(f"{uri} is not whole: {'; '.join(found.problems)}")


def _show(found: ArtifactReport) -> None:
    from launcher.monitor.tables import described_table

    stdout().print(described_table(found))


def merge(
    out: Annotated[str, typer.Option("--out", help="a new folder for the model")],
    run: RunOption = None,
    adapter: AdapterOption = None,
    use: UseOption = None,
    combination: CombinationOption = "cat",
    density: DensityOption = None,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="write what --use combines as an adapter, and no model")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 | bfloat16 | float16: of the weights; else as in training")
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Make an adapter part of its unquantised base, and compare logits before and after."""
    from launcher.monitor.progress import Progress
    from launcher.terminal import vllm_command
    from trainer.artifacts import ArtifactRef
    from trainer.artifacts.combine import Mix
    from trainer.artifacts.merge import combine
    from trainer.artifacts.merge import merge as merged_into
    from trainer.recipe.trust import Trust

    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not one of: {', '.join(DTYPES)}")
    address, folder, console = ArtifactRef.of(run, adapter, None), Path(out), stderr()
    trust = Trust(trust_remote_code)
    mix = Mix.chosen(use, combination, density)
    if as_adapter and dtype:
        raise UsageError("--dtype has no effect with --as-adapter; leave it out")
    with redirect_stdout(sys.stderr):
        hush_libraries()
        say = Progress(console).phase
        if as_adapter:
            if mix is None:
                raise UsageError("--as-adapter writes what --use combines: name the adapters and their weights there")
            combine(address, folder, mix, say=say, trust=trust)
            console.print(Text(f"the combined adapter is {folder}"), soft_wrap=True)
            return
        done = merged_into(address, folder, mix=mix, dtype=dtype, say=say, trust=trust)
    console.print(
        Text(f"the merged model is {folder}; its logits differ by {done.difference:.1e} of their norm"),
        soft_wrap=True,
    )
    if done.subject.classes is None:
        console.print(Text(f"serve it:  {vllm_command.of_model(folder)}"), soft_wrap=True)


def push(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="on the Hub: organisation/name")],
    run: RunOption = None,
    adapter: AdapterOption = None,
    model: ModelOption = None,
    private: Annotated[bool, typer.Option("--private", help="if the repository is made for this")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="a branch; else the main one")] = None,
) -> None:
    """Send an adapter or a merged model with its model card to the Hugging Face Hub."""
    from launcher.monitor.progress import Progress
    from trainer.artifacts import ArtifactRef, find
    from trainer.artifacts.push import push as pushed

    address = ArtifactRef.of(run, adapter, model)
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="muster-push-") as folder:
        hush_libraries()
        say = Progress(stderr()).phase
        say("fetching what is sent")
        subject = find(address, Path(folder))
        if len(subject.adapters) > 1:
            raise UsageError("one adapter is sent at a time: name a single --adapter")
        say(f"sending to {repo}")
        where = pushed(subject, repo, private=private, revision=revision)
    print(where)
