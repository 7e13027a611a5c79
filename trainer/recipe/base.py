"""The base class of a recipe's sections, the types that its fields share, and how values are shown in errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
)
from pydantic_core import CoreSchema, core_schema

from trainer.errors import UsageError
from trainer.redact import credential_in, redact
from trainer.registry import CODE, Registry

STORED = "stored"
"""A key of the validation's context: the recipe is read from a run, which an earlier version may have frozen."""

KeyPath = tuple[str | int, ...]
"""The path of a value in a recipe: ``("data", "train", 0, "path")``."""


class Conflict(NamedTuple):
    """Values that are valid alone but not together. ``paths``: all of them, the main one first."""

    paths: tuple[KeyPath, ...]
    message: str

    def under(self, *prefix: str | int) -> Conflict:
        return Conflict(tuple((*prefix, *path) for path in self.paths), self.message)


class MayChange:
    """Metadata of a field that does not decide the result, so that it may differ between the attempts of a run:
    ``Annotated[int, MAY_CHANGE]``. On a section it covers all of the section's fields. A field without it decides the
    result, and a run that has a checkpoint cannot be resumed with another value of it."""


MAY_CHANGE = MayChange()


class Section(BaseModel):
    """One section of the recipe: no type conversion, no unknown keys, frozen after validation.

    The text under a field is its documentation. The reference and the JSON Schema are generated from it. A field's
    annotation also states if it may change between the attempts of a run (`MAY_CHANGE`).
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    shorthand: ClassVar[str | None] = None
    """The field that a text in place of the section gives."""

    others: ClassVar[str | None] = None
    """A clause for the message about an unknown key: where everything that the section has no key for is set."""

    @field_validator("*")
    @classmethod
    def _without_credentials(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses credentials in every text of every section, unless the recipe is stored already (STORED)."""
        if not (info.context or {}).get(STORED):
            for text in _texts(value):
                if refusal := credentials_refused(text):
                    raise ValueError(refusal)
        return value

    def conflicts(self) -> Iterator[Conflict]:
        """Yields values of this section that are not valid together; paths are relative to the section."""
        return iter(())

    def given(self) -> Iterator[str]:
        """Yields the fields that differ from their defaults. A frozen recipe contains every default, so only these
        count as given."""
        for name, field in type(self).model_fields.items():
            if getattr(self, name) != field.get_default(call_default_factory=True):
                yield name


T = TypeVar("T")
Listed = Annotated[tuple[T, ...], Strict(False)]
"""A list in the file and a tuple in the model, so that a frozen section stays frozen."""


@dataclass(frozen=True)
class OneOf:
    """A constraint on a text: it must be a name of this registry, and becomes the row's own name. The JSON Schema lists
    the names."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        names = (*self.registry.names(), *self.registry.also)
        if self.registry.group:
            return names_or_code(names)
        return handler(schema) | ({"enum": list(names)} if names else {})

    def _check(self, name: str) -> str:
        name = self.registry.also.get(name, name)
        try:
            self.registry[name]
        except UsageError as error:
            raise ValueError(str(error)) from None
        return name


def names_or_code(names: Iterable[str]) -> dict[str, Any]:
    """Returns the JSON Schema of a name, or of ``module:Attribute``."""
    return {"anyOf": [{"enum": list(names)}, {"type": "string", "pattern": f"^{CODE.pattern}$"}]}


def takes(right: str) -> WrapValidator:
    """Returns a validator that gives one error for a value of several shapes; pydantic would give one per shape."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"takes {right}, got {show(value)}") from None

    return WrapValidator(check)


def show(value: Any) -> str:
    """Returns a value in a form that its author recognises, cut to one line, with credentials redacted."""
    if value is None:
        return "null (nothing)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {_cut(redact(value))!r}"  # redact first: a credential that is cut is not recognised
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"[{_cut(redact(', '.join(str(v) for v in value)))}]"
    return _cut(str(value))


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def credentials_refused(text: str) -> str | None:
    """Returns the sentence that refuses a text with credentials, without repeating them; None for any other text."""
    if (what := credential_in(text)) is None:
        return None
    return (
        f"holds credentials ({what}), and a recipe is stored and printed; take them out and give them in the "
        "environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3:// (or ~/.aws/credentials), "
        "GOOGLE_APPLICATION_CREDENTIALS for gs://, HF_TOKEN for the Hub; in place of a signed address give the store's "
        "own (s3://bucket/key)"
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (*_texts(key), *_texts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give a folder, a file or a URL")
    return text


Location = Annotated[str, AfterValidator(_not_empty)]
"""A local path or an fsspec URL."""
