"""The adapter: what is trained on top of the frozen base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from trainer.recipe.base import Conflict, Listed, OneOf, Section, takes
from trainer.recipe.methods import DEFAULTS, methods_with, settings_of
from trainer.registry import METHODS

COMMON = ("rank", "alpha", "dropout", "target_modules", "bias")
"""Settings that may stay in a recipe when its method is exchanged for one that has no use for them; starting the run
says so. Any other setting that has no effect is a mistake."""


def _targets(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if not value:
        raise ValueError("names no module; write all-linear, or the modules that get an adapter")
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{value!r} is not a regular expression ({error}); to name one module write [{value}]"
            ) from None
    return value


class AdapterSection(Section):
    """What is trained: a small adapter on the frozen base, or with `method: none` the whole model. A setting that is
    left out has the method's own default (see [methods](#methods))."""

    method: Annotated[str, OneOf(METHODS)] = "lora"
    """How the base is adapted; see [methods](#methods). `none` trains every parameter and leaves a plain model."""

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
    """Modules that get an adapter: `all-linear` (every linear layer but the output head), a list of name endings
    (`[q_proj, v_proj]`), or a regular expression over full module names. A name that matches nothing is an error; a
    head is only taken when it is named."""

    bias: Literal["none", "all", "lora_only"] | None = None
    """Biases that are trained too: none, all of the model's, or those of the targets."""

    modules_to_save: Listed[str] = ()
    """Modules that are trained whole beside the adapter and saved with it, by the end of their names, such as
    `[embed_tokens, lm_head]`."""

    trainable_tokens: Listed[Annotated[int, Field(ge=0)]] = ()
    """Tokens, by number, whose embeddings are trained beside the adapter: for new special tokens, without the cost of
    the whole embedding."""

    lr_ratio: float | None = Field(default=None, ge=1.0)
    """Learning rate of B over that of A, which is `optimizer.lr`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """The method's defaults for what is left out, so that a frozen recipe holds what the run was made with."""
        if not isinstance(given, dict):
            return given
        stated = {key: value for key, value in given.items() if value is not None}
        method = given.get("method", "lora")
        return {**settings_of(method if isinstance(method, str) else ""), **stated}

    def conflicts(self) -> Iterator[Conflict]:
        for name in self._without_effect():
            if name not in COMMON:
                others = ", ".join(methods_with(name))
                message = f"has no effect with method {self.method}; leave it out (it is for {others})"
                yield Conflict(((name,), ("method",)), message)

    def idle(self) -> list[str]:
        """Settings that the recipe gives, and that its method has no use for."""
        return [name for name in self._without_effect() if name in COMMON]

    def uses(self, setting: str) -> bool:
        """Whether the method has a use for the setting."""
        return setting in settings_of(self.method)

    def _without_effect(self) -> list[str]:
        fields = [name for name in type(self).model_fields if name != "method"]
        return [name for name in fields if not self.uses(name) and getattr(self, name) not in (None, ())]


assert set(DEFAULTS) <= set(METHODS.names())
