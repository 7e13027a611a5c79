"""What the sections of a recipe are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    ValidationError,
    WrapValidator,
)
from pydantic_core import CoreSchema, core_schema

from trainer.errors import UsageError
from trainer.registry import Registry

KeyPath = tuple[str | int, ...]
"""Where a value stands in a recipe: ``("data", "train", 0, "path")``."""


class Conflict(NamedTuple):
    """Values that are right each by itself and cannot stand together; ``paths`` names them all, the chief one first."""

    paths: tuple[KeyPath, ...]
    message: str

    def under(self, *prefix: str | int) -> Conflict:
        return Conflict(tuple((*prefix, *path) for path in self.paths), self.message)


class Section(BaseModel):
    """One section of the recipe: nothing is converted, nothing unknown is taken, nothing changes afterwards.

    The text under a field is its documentation; the reference and the JSON Schema are made from it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def conflicts(self) -> Iterator[Conflict]:
        """What cannot stand together inside this section; paths are relative to it."""
        return iter(())


T = TypeVar("T")
Listed = Annotated[tuple[T, ...], Strict(False)]
"""A list in the file, a tuple in the model, so that a frozen section stays frozen."""


@dataclass(frozen=True)
class OneOf:
    """The text must be a name of this registry; the JSON Schema lists the names."""

    registry: Registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        names = self.registry.names()
        return handler(schema) | ({"enum": list(names)} if names else {})

    def _check(self, name: str) -> str:
        try:
            self.registry.require(name)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return name


def takes(right: str) -> WrapValidator:
    """One sentence for a value of several shapes, where pydantic would report each shape's fault by itself."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"takes {right}, got {show(value)}") from None

    return WrapValidator(check)


def show(value: Any) -> str:
    """A value as its author would know it again, cut to one line."""
    if value is None:
        return "null (nothing)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {_cut(value)!r}"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"[{_cut(', '.join(str(v) for v in value))}]"
    return _cut(str(value))


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


CREDENTIALS = re.compile(r"://([^/@]*@|[^/@]*:(?!\d+(/|$))[^@]*@)")
"""``user@`` or ``user:password@`` after the scheme, where the password may hold a slash; a host's port is none."""


def _without_credentials(url: str) -> str:
    if CREDENTIALS.search(url) and not url.startswith("hf://"):
        raise ValueError(
            "holds credentials (user:password@…), and a recipe is stored and printed; "
            "take them out and give them in the environment (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    return url


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give a folder, a file or a URL")
    return text


Location = Annotated[str, AfterValidator(_not_empty), AfterValidator(_without_credentials)]
"""A local path or an fsspec URL. Credentials never stand in a recipe, so they are refused without being printed."""
