"""``muster inspect``, ``merge`` and ``push``: check what training saved, merge it into its base model, upload it."""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from launcher.cli import completion
from launcher.cli.options import (
    AdapterOption,
    CombinationOption,
    DensityOption,
    JsonOption,
    ModelOption,
    RunOption,
    TrustOption,
    UseOption,
)
from launcher.terminal.console import hush_libraries, print_json, stderr, stdout
from trainer.errors import CorruptObject, UsageError

DTYPES = ("float32", "bfloat16", "float16")


def inspect(
    uri: Annotated[
        str,
        typer.Argument(metavar="URI", help="folder of an adapter, a model or a run", autocompletion=completion.runs),
    ],
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show what is at URI and if its files are complete. A model is loaded, and has to generate."""
    from trainer.artifacts.inspect import describe
    from trainer.recipe.trust import Trust

    with redirect_stdout(sys.stderr):  # libraries print; stdout has the result alone
        hush_libraries()
        found = describe(uri, trust=Trust(trust_remote_code))
    if as_json:
        print_json(found.to_json())
    else:
        from launcher.monitor.tables import described_lines, described_table

        console = stdout()
        for line in described_lines(found):
            console.print(line, soft_wrap=True)
        console.print(described_table(found))
    if not found.whole:
        raise CorruptObject(f"{uri} is not complete: {'; '.join(found.problems)}")


def merge(
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="a new folder for the model")],
    run: RunOption = None,
    adapter: AdapterOption = None,
    use: UseOption = None,
    combination: CombinationOption = "cat",
    density: DensityOption = None,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="write the combination of --use as an adapter, not as a model")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            autocompletion=completion.one_of(*DTYPES),
            help="float32 | bfloat16 | float16: type of the weights; default: as in training",
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Merge an adapter into its unquantised base model. The logits before and after are compared."""
    from launcher.monitor.progress import Progress
    from trainer.artifacts import ArtifactRef
    from trainer.artifacts.combine import Mix
    from trainer.artifacts.merge import combine
    from trainer.artifacts.merge import merge as merged_into
    from trainer.progress import vllm_command
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
                raise UsageError(
                    "--as-adapter writes the combination of --use: name the adapters and their weights there"
                )
            combine(address, folder, mix, say=say, trust=trust)
            console.print(Text(f"the combined adapter is {folder}"), soft_wrap=True)
            return
        done = merged_into(address, folder, mix=mix, dtype=dtype, say=say, trust=trust)
    console.print(
        Text(
            f"the merged model is {folder}; its logits differ by {done.difference:.1e} of their norm "
            f"({done.subject.section.dtype} rounding; up to {done.tolerance:.0e} is accepted)"
        ),
        soft_wrap=True,
    )
    if done.subject.classes is None:
        console.print(Text(f"serve it:\n{vllm_command.of_model(folder)}"), soft_wrap=True)


def push(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="repository on the Hub: organisation/name")],
    run: RunOption = None,
    adapter: AdapterOption = None,
    model: ModelOption = None,
    private: Annotated[bool, typer.Option("--private", help="if the repository is new, make it private")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="branch of the repository; default: its main one")
    ] = None,
) -> None:
    """Upload an adapter or a merged model to the Hugging Face Hub, with its model card."""
    from launcher.monitor.progress import Progress
    from trainer.artifacts import ArtifactRef, find
    from trainer.artifacts.push import push as pushed

    address = ArtifactRef.of(run, adapter, model)
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="muster-push-") as folder:
        hush_libraries()
        say = Progress(stderr()).phase
        say("fetching the files")
        subject = find(address, Path(folder))
        if len(subject.adapters) > 1:
            raise UsageError("push uploads one adapter at a time: name a single --adapter")
        say(f"uploading to {repo}")
        where = pushed(subject, repo, private=private, revision=revision)
    print(where)
