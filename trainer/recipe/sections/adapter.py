"""The adapter: the weights that are trained on top of the frozen base model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, WrapValidator, model_validator

from trainer.errors import UsageError
from trainer.recipe.base import Conflict, Listed, Location, Section, names_or_code, show, takes
from trainer.recipe.methods import METHODS, MethodRow, methods_with

BY_NAME = "peft"
METHOD_SCHEMA = names_or_code(n for n in METHODS.names() if n != BY_NAME)
METHOD_SCHEMA["anyOf"].append({"type": "object"})

COMMON = ("rank", "alpha", "dropout", "target_modules", "bias", "experts")
"""Settings that may stay in a recipe after a change to a method that does not use them; the run then logs them as
unused. Any other setting that has no effect is a mistake."""


def _targets(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if not value:
        raise ValueError("names no module; write all-linear, or the modules that get an adapter")
    if value == "all":
        raise ValueError("is no module of a model; write all-linear")
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{value!r} is not a regular expression ({error}); to name one module write [{value}]"
            ) from None
    return value


def _method(value: Any, handler: Any) -> Any:
    """Accepts a name of the table, or a mapping with peft's own name for a method and its fields."""
    if isinstance(value, dict):
        if not isinstance(value.get(BY_NAME), str):
            raise ValueError("as a mapping names the method, such as {peft: MISS, r: 8}")
        return value
    if not isinstance(value, str):
        raise ValueError(f"takes text, or a mapping such as {{peft: MISS, r: 8}}, got {show(value)}")
    if value == BY_NAME:
        raise ValueError("names the method in a mapping: {peft: MISS, r: 8}")
    try:
        METHODS[value]
    except UsageError as error:
        raise ValueError(str(error)) from None
    return value


class AdapterSection(Section):
    """The weights that are trained: a small adapter on the frozen base model, or with `method: none` the complete
    model. A setting that is left out has the method's own default (see [methods](#methods))."""

    method: Annotated[str | dict[str, Any], WrapValidator(_method), WithJsonSchema(METHOD_SCHEMA)] = "lora"
    """How the base model is adapted; see [methods](#methods). `none` trains every parameter; its result is a plain
    model."""

    # `from` is a keyword of Python, so that the field cannot be written as the others are.
    __annotations__["from"] = Location | None
    locals()["from"] = Field(
        default=None,
        examples=["s3://runs/sft-1"],
        description="A trained adapter that the run begins with, in place of new initial values: a run (its final "
        "adapter, else its newest checkpoint), the folder of an adapter (a path or an fsspec URL), or a Hub id. Its "
        "method and its sizes must be those of this section. See "
        "[concepts.md](concepts.md#begin-from-a-trained-adapter).",
    )

    rank: int | None = Field(default=None, ge=1)
    """Rank of the update of each target module. Trainable parameters and adapter size grow in proportion."""

    alpha: int | None = Field(default=None, ge=1)
    """The update is scaled by alpha / rank: doubling alpha acts much like doubling the adapter's learning rate."""

    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Fraction of the adapter's input that is dropped while training. 0 for large data sets."""

    target_modules: Annotated[
        str | Listed[str] | None,
        takes("all-linear, a regular expression, or a list of module names"),
        AfterValidator(_targets),
    ] = None
    """Modules that get an adapter: `all-linear` (every linear layer and every expert; never a head, a router, or a
    vision tower), a list of name endings (`[q_proj, v_proj]`), or a regular expression over full module names. A name
    that matches nothing is an error; a head gets an adapter only if it is named."""

    experts: bool | None = None
    """In a mixture of experts, whether `target_modules` includes the experts' matrices; rank r on an expert is rank r
    on each of its matrices (gate and up projection are one). Methods without this setting leave experts out."""

    bias: Literal["none", "all", "lora_only"] | None = None
    """Biases that are trained too: none, all of the model's, or those of the targets."""

    modules_to_save: Listed[str] = ()
    """Modules whose weights are all trained, in addition to the adapter, and saved with it. Named by the end of their
    names, such as `[embed_tokens, lm_head]`."""

    trainable_tokens: Listed[Annotated[int, Field(ge=0)]] = ()
    """Tokens, by number, whose embeddings are trained in addition to the adapter: for new special tokens, without the
    cost of the complete embedding."""

    lr_ratio: float | None = Field(default=None, ge=1.0)
    """Learning rate of B over that of A, which is `optimizer.lr`."""

    target_rank: int | None = Field(default=None, ge=1)
    """Average rank per target at the end of the pruning."""

    prune_start: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Fraction of the run's steps after which the budget of ranks begins to fall."""

    prune_end: float | None = Field(default=None, gt=0.0, le=1.0)
    """Fraction of the run's steps after which the ranks do not change any more."""

    prune_every: int | None = Field(default=None, ge=1)
    """Steps between two redistributions of the budget."""

    orthogonality: float | None = Field(default=None, ge=0.0)
    """Weight of the penalty that keeps the factors orthogonal. The reported loss does not include it."""

    block_size: int | None = Field(default=None, ge=2)
    """Rows and columns of a block of the rotation; must divide the input dimension of each target."""

    butterfly_factors: int | None = Field(default=None, ge=1)
    """Number of sparse rotations that are multiplied."""

    factor: int | None = Field(default=None, ge=-1)
    """Rows and columns of the Kronecker product's small matrix; -1 takes the divisor nearest to the square root."""

    virtual_tokens: int | None = Field(default=None, ge=1)
    """Number of trained vectors before each sample (`adaption_prompt`: in each layer)."""

    encoder_hidden: int | None = Field(default=None, ge=1)
    """Hidden size of the MLP that produces the vectors during training; `prefix` has no MLP by default."""

    layers: int | None = Field(default=None, ge=1)
    """Number of layers, from the top, that get trained vectors; by default all except the two at the bottom."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """Fills in the method's defaults, so that a frozen recipe contains the values that the run used."""
        if not isinstance(given, dict):
            return given
        # An empty value means the default. An unknown key stays in, so that it is refused whatever its value.
        stated = {key: value for key, value in given.items() if value is not None or key not in cls.model_fields}
        method = stated.get("method", "lora")
        kind = method if isinstance(method, str) else BY_NAME if isinstance(method, dict) else ""
        row = METHODS.get(kind)  # an unknown name is refused by its own validator
        return {**(row.settings if row else {}), **stated}

    @property
    def kind(self) -> str:
        """The method's name in the table."""
        return self.method if isinstance(self.method, str) else BY_NAME

    @property
    def is_plain_lora(self) -> bool:
        """True if it is saved as plain LoRA and nothing else, which other programs load."""
        also = self.modules_to_save or self.trainable_tokens or self.bias not in (None, "none")
        return bool(self.row.plain_lora) and not also

    @property
    def label(self) -> str:
        """The method's name for people."""
        return self.method if isinstance(self.method, str) else str(self.method[BY_NAME])

    @property
    def row(self) -> MethodRow:
        return METHODS[self.kind]

    @property
    def changes_base(self) -> bool:
        """True if the method trains or changes the base model itself: with its adapter off, the model is another."""
        return self.method == "none" or self.row.residual

    @property
    def begins_from(self) -> str | None:
        """The value of `from`."""
        found: str | None = getattr(self, "from")
        return found

    def conflicts(self) -> Iterator[Conflict]:
        if self.begins_from is not None and self.method == "none":
            message = "has no effect with method none, which trains the model itself; name the model in model.path"
            yield Conflict((("from",), ("method",)), message)
        elif self.begins_from is not None and self.row.residual:
            message = (
                f"does not work with method {self.label}, whose initial values are parts of the base model's weights; "
                "merge that adapter (muster merge) and name the result in model.path"
            )
            yield Conflict((("from",), ("method",)), message)
        if self.target_rank is not None and self.rank is not None and self.target_rank >= self.rank:
            message = f"{self.target_rank} leaves nothing to prune from rank {self.rank}; set it lower"
            yield Conflict((("target_rank",), ("rank",)), message)
        if self.prune_start is not None and self.prune_end is not None and self.prune_start >= self.prune_end:
            message = f"{self.prune_start} is not before prune_end {self.prune_end}; set it lower"
            yield Conflict((("prune_start",), ("prune_end",)), message)
        for name in self._without_effect():
            if name not in COMMON:
                others = ", ".join(methods_with(name))
                message = f"has no effect with method {self.label}; leave it out (it is for {others})"
                yield Conflict(((name,), ("method",)), message)

    def idle(self) -> list[str]:
        """Returns the settings in COMMON that the recipe gives and its method does not use."""
        return [name for name in self._without_effect() if name in COMMON]

    def uses(self, setting: str) -> bool:
        """Returns true if the method uses the setting."""
        return setting in self.row.settings

    def _without_effect(self) -> list[str]:
        fields = [name for name in type(self).model_fields if name not in ("method", "from")]
        return [name for name in fields if not self.uses(name) and getattr(self, name) not in (None, ())]
