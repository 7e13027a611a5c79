"""The errors that muster raises, and the exit code of each kind.

    MusterError                     1  the run failed
    ├── UsageError                  2  the user can fix it: recipe, command line, inputs
    │   ├── RecipeError             2  every mistake of a recipe, with path and line
    │   ├── InputError              2  model, data or storage is missing, unreadable or malformed
    │   ├── RunHeld                 2  another driver holds the run
    │   └── RecipeChanged           2  the run was started with another recipe
    ├── StorageError                1  the storage failed for longer than the deadline
    ├── CorruptObject               1  an object's bytes are not those that were written
    ├── Fenced                      1  a newer attempt owns the run; this one must stop writing
    ├── NonFiniteLoss               1  the loss became inf or nan
    ├── RewardFailed                1  a function of the recipe that rates texts failed, hung, or gave no number
    ├── EngineFailed                1  an inference server does not answer, or not as it should; may be temporary
    ├── WorkerFailed                1  a training worker died or raised
    │   └── RankFailed              1  under torchrun, for a cause that may be temporary (trainer/torchrun_failure.py)
    └── Interrupted                 3  stopped on request; the same command resumes
        └── StartAgain              3  stopped for a temporary cause (lost nodes): the job may be started again

Every one of them is built from positional arguments only, so that it survives pickling between processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.redact import redact

_WHERE = "while "


def note_where(error: BaseException, where: str) -> None:
    """Notes what was being done when ``error`` was raised, unless code nearer to the cause has noted it."""
    if where_of(error) is None:
        error.add_note(_WHERE + where)


def where_of(error: BaseException) -> str | None:
    notes: list[str] = getattr(error, "__notes__", [])
    return next((note.removeprefix(_WHERE) for note in notes if note.startswith(_WHERE)), None)


class MusterError(Exception):
    """Base of all errors that muster raises on purpose; its text is for the user. The first argument is what happened;
    the others (the end of a stack, what to try next) follow on lines of their own."""

    exit_code = 1

    def __init__(self, *args: Any) -> None:
        # Redact here: an error is printed, logged and stored, and passes between processes.
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))

    @property
    def cause(self) -> str:
        """Returns what happened, without the details."""
        return str(self.args[0]) if self.args else ""


class UsageError(MusterError):
    exit_code = 2


class Mistake(NamedTuple):
    """One mistake in a recipe: ``where`` is ``file:line`` (or the command line), ``path`` the dotted YAML path."""

    where: str
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.path}: {self.message}" if self.path else f"{self.where}: {self.message}"


class RecipeError(UsageError):
    """All mistakes of one recipe, in the order of its lines."""

    def __init__(self, mistakes: tuple[Mistake, ...]) -> None:
        super().__init__(mistakes)
        self.mistakes = mistakes

    def __str__(self) -> str:
        return "\n".join(str(m) for m in self.mistakes)

    @property
    def cause(self) -> str:
        return str(self)


class InputError(UsageError):
    pass


class RunHeld(UsageError):
    pass


class RecipeChanged(UsageError):
    pass


class StorageError(MusterError):
    pass


class CorruptObject(MusterError):
    pass


class Fenced(MusterError):
    pass


class NonFiniteLoss(MusterError):
    pass


class RewardFailed(MusterError):
    pass


class EngineFailed(MusterError):
    pass


class WorkerFailed(MusterError):
    pass


class Interrupted(MusterError):
    exit_code = 3


class StartAgain(Interrupted):
    pass
