"""Environment variables in a recipe: which names and values are accepted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from trainer.recipe.base import STORED, credentials_refused
from trainer.redact import secrets_of

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_GIVEN_BY_OTHERS = {
    "each worker gets its own value": (
        r"RANK|WORLD_SIZE|(LOCAL|NODE|GROUP|ROLE)_(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
    ),
    "a worker gets its devices from the scheduler or from Ray": r"(CUDA|HIP|ROCR|NVIDIA)_VISIBLE_DEVICES",
    "Ray reads it where it is started, so export it there": r"RAY_\w+",
    "the scheduler sets it": r"(SLURM|KUBERNETES|SKYPILOT)_\w+",
    "muster sets it": r"MUSTER_(?!(CACHE|DEBUG)$)\w+",
    "it takes effect only where a process is started, so set it there (MUSTER_ACTIVATE, the image, "
    "cluster.ray.runtime_env)": r"PATH|PYTHON\w+|LD_\w+",
}
"""The variables that a recipe cannot set, as patterns of their names, each under the reason."""


def refusals(variables: Mapping[str, str]) -> Iterator[str]:
    """Yields a sentence for each variable that cannot be set."""
    for name, value in variables.items():
        if not NAME.fullmatch(name):
            yield f"{name!r} is no name of an environment variable: use letters, digits and '_', not a digit first"
        elif reason := next((why for why, names in _GIVEN_BY_OTHERS.items() if re.fullmatch(names, name)), None):
            yield f"{name} cannot be set here: {reason}"
        elif any(ord(letter) < 32 for letter in value):
            yield f"{name} has control characters; give a text on one line"


def credentials(variables: Mapping[str, str]) -> Iterator[str]:
    """Yields a sentence for each variable whose name or value is that of a credential."""
    for name, value in variables.items():
        if refusal := credentials_refused(f"{name}={value}"):
            yield f"{name} {refusal}"
        elif secrets_of({name: value}):
            yield (
                f"{name} has the name of a credential, and a recipe is stored and printed: set it in the environment "
                "of the job (of the shell that submits, or a secret of the cluster)"
            )


def _checked(variables: dict[str, str], info: ValidationInfo) -> dict[str, str]:
    stored = (info.context or {}).get(STORED)  # the environment may have that value by chance since
    if found := [*refusals(variables), *([] if stored else credentials(variables))]:
        raise ValueError("; ".join(found))
    return variables


Variables = Annotated[dict[str, str], AfterValidator(_checked)]
"""Environment variables, each name with its value. Checked, so that they can be set without breaking a worker."""
