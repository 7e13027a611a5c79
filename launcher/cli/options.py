"""Arguments and options that several commands have: each is written once, here."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster import KINDS
from launcher.cli import completion
from trainer.recipe.trust import FLAG

RecipeFile = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="a recipe: YAML or JSON file", autocompletion=completion.recipes),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to the recipe, by dotted path")
]
PLACES = ("local", *(name for name, kind in KINDS.items() if not kind.by_hand))
"""The values of ``--on``; `render` takes every kind of cluster."""
PlaceOption = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        autocompletion=completion.one_of(*PLACES),
        help=f"{' | '.join(PLACES)}: where to run; without it, RAY_ADDRESS decides",
    ),
]
AddressOption = Annotated[
    str | None, typer.Option(help="the Ray cluster: http://HEAD:8265 submits a job to it, HOST:PORT joins it")
]
TakeoverOption = Annotated[
    bool, typer.Option("--takeover", help="take over the run or sweep from a driver that still holds it")
]
DetachOption = Annotated[
    bool, typer.Option("--detach", help="do not wait for the submitted job; exit code 0 means submitted")
]
RunUri = Annotated[
    str,
    typer.Argument(metavar="RUN_URI", help="the run's URI, as muster ls prints it", autocompletion=completion.runs),
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
PluginsOption = Annotated[
    bool, typer.Option("--plugins", help="with what installed plug-ins offer, whose rows are imported")
]
TrustOption = Annotated[
    bool, typer.Option(FLAG, help="run the Python code that comes with the model, or that a stored recipe names")
]

# The model of a command that uses what training saved.
RunOption = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="RUN_URI",
        help="folder of a run: its final adapter, or else its newest checkpoint",
        autocompletion=completion.runs,
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="URI",
        help="folder of an adapter, or of a fully fine-tuned model; NAME=URI for each of several",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="PATH", help="a model without an adapter: folder, URL, or name on the Hub"),
]
UseOption = Annotated[
    str | None,
    typer.Option(
        "--use", metavar="NAMES", help="one of several adapters (a), or weights to combine them (a=0.7,b=0.3)"
    ),
]
CombinationOption = Annotated[
    str,
    typer.Option(
        "--combination",
        metavar="KIND",
        help="how adapters are combined: cat | svd | linear | ties | dare_linear | dare_ties",
        autocompletion=completion.one_of("cat", "svd", "linear", "ties", "dare_linear", "dare_ties"),
    ),
]
DensityOption = Annotated[
    float | None, typer.Option("--density", min=0.0, max=1.0, help="fraction of the entries that ties and dare keep")
]

# Options of the commands that generate texts.
QuantizationOption = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        help="none | nf4 | int8: quantisation of the base model; default: as in training",
        autocompletion=completion.one_of("none", "nf4", "int8"),
    ),
]
FrameOption = Annotated[
    str | None,
    typer.Option(
        "--frame",
        help="chat | qa | instruction | template | plain: form of a prompt; default: as in training",
        autocompletion=completion.one_of("chat", "qa", "instruction", "template", "plain"),
    ),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="maximum number of tokens of each answer")]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature", min=0.0, help="0 takes the most likely token, 1 samples by the model's probabilities"
    ),
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p", min=0.0, max=1.0, help="sample only from the most likely tokens, up to this sum of probabilities"
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="seed of the sampling")]
