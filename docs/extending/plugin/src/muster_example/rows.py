"""The rows: what muster must know of each choice before its code is imported. No heavy library is imported here."""

from pydantic import Field

from trainer.recipe.base import Section
from trainer.recipe.formats import FormatRow
from trainer.recipe.methods import MethodRow
from trainer.recipe.optimizers import OptimizerRow
from trainer.recipe.tasks import TaskRow


class FocalSection(Section):
    """Settings of `task: focal`, under `focal` in a recipe."""

    gamma: float = Field(default=2.0, ge=0.0)
    """Exponent of a token's improbability: the larger, the less the tokens count that the model is sure of."""


FOCAL = TaskRow(
    "muster_example.focal:Focal",
    learns_from=("prompted", "text"),
    segments=True,
    evaluates={"loss": "min", "perplexity": "min"},
    section=FocalSection,
)
MISS = MethodRow(
    "muster_example.miss:Miss",
    "shares one matrix between the shards of a weight",
    {"rank": 64, "dropout": 0.0, "target_modules": "all-linear", "modules_to_save": ()},
    lr=2e-4,
    source="arXiv:2409.15371, section 4",
    example={"adapter.rank": 4, "optimizer.lr": 5e-3},
)
TRANSLATION = FormatRow(
    "muster_example.translation:Translation",
    columns=("en", "fr"),
    gives="prompted",
    examples=({"en": "good morning", "fr": "bonjour"},),
)
SIGN_SGD = OptimizerRow("muster_example.sign_sgd:SignSGD", uses={"weight_decay": 0.0, "momentum": 0.9}, moments=1)
