"""Where the user's code meets ours: which line an error and a warning point at.

A traceback through a dozen frames of fastload says nothing that the message does not, and hides the user's line, which
is what has to be mended. So what is public lets our own errors, and those of functions that the user gave us, out
without the frames of fastload; those of users' functions stay, and other exceptions, which may be defects, are let out
as they are. The logger `fastload.callers` has the whole at level DEBUG, and `FASTLOAD_TRACEBACK=full` in the
environment leaves all frames in.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, ParamSpec, TypeVar

from fastload.errors import FastloadError
from fastload.redaction import redact

# Arguments of other libraries that are another's here.
_CALLED_ELSEWHERE = {
    "cache_dir": "cache",
    "mode": "fastload.open(url, cache), which always reads bytes",
    "shuffle_buffer": "shuffle_window",
    "transform": "dataset.map(function)",
}

P = ParamSpec("P")
R = TypeVar("R")
Error = TypeVar("Error", bound=BaseException)

_log = logging.getLogger(__name__)

# The attribute of an error of a user's function: how many frames, from the end, are of that function.
_USERS_FRAMES = "_fastload_users_frames"

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_NAME = f"{__name__.partition('.')[0]}."
# What stands between our frames, and between them and the user's.
_STANDARD = os.path.dirname(os.path.abspath(os.__file__))
_BETWEEN = tuple(
    os.path.join(_STANDARD, name)
    for name in ("contextlib.py", "dataclasses.py", "threading.py", f"concurrent{os.sep}", f"multiprocessing{os.sep}")
)


def public(function: Callable[P, R]) -> Callable[P, R]:
    """For what users call: fastload's errors leave it with few frames of fastload."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if is_for_the_user(error):
                raise shortened(error)  # noqa: B904  # it is the same error
            if isinstance(error, TypeError) and error.__traceback__ is not None and not error.__traceback__.tb_next:
                raise TypeError(f"{error}; {_how_to_call(function, kwargs)}") from None
            raise

    return called


def _how_to_call(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """What to write where the arguments are not those of a function."""
    parameters = inspect.signature(function).parameters
    for name in given:
        if name not in parameters:
            like = [each for each in parameters if each.startswith(name)]
            like += [_CALLED_ELSEWHERE.get(name, ""), *get_close_matches(name, parameters, 1)]
            meant = next(filter(None, like), "")
            return f"did you mean {meant}?" if meant else f"it takes {', '.join(n for n in parameters if n != 'self')}"
    named = [name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY]
    return f"give what follows by its name, such as {named[0]}=..." if named else "see its help()"


def mark_as_users(error: BaseException) -> None:
    """An error of a function that the user gave us, caught where it was called. The frames below are the user's, also
    those of torch and of this package.
    """
    error.__dict__[_USERS_FRAMES] = max(0, len(_entries(error)) - 1)


def is_users(error: BaseException) -> bool:
    return _USERS_FRAMES in error.__dict__


def is_for_the_user(error: BaseException) -> bool:
    """Whether it says all that the user has to know without our frames."""
    return isinstance(error, FastloadError) or is_users(error)


def shortened(error: Error) -> Error:
    """The error without frames of fastload, also in what it was caused by."""
    if os.environ.get("FASTLOAD_TRACEBACK") == "full":
        return error
    _log.debug("an error that the user gets", exc_info=error)
    chain: list[BaseException] = [error]
    for each in chain:
        each.with_traceback(_without_ours(each))
        chain += [other for other in (each.__cause__, each.__context__) if other is not None and other not in chain]
    return error


class UserLine(NamedTuple):
    """A line of code, for warnings."""

    path: str
    number: int
    module: str
    warned: dict[Any, Any]  # what Python keeps of the warnings that it has shown there


def line() -> UserLine:
    """The line of the user's that led here; in a thread of fastload, where none did, the line that asks."""
    frame = here = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame):
        frame = frame.f_back
    if _is_ours(frame):
        frame = here
    names = frame.f_globals
    warned = names.setdefault("__warningregistry__", {})
    return UserLine(frame.f_code.co_filename, frame.f_lineno, names.get("__name__", "<unknown>"), warned)


def warn(message: str, category: type[Warning] = UserWarning, at: UserLine | None = None) -> None:
    """Warn, at the line of the user's that led here, or led to the work that goes on in a thread of fastload."""
    at = at or line()
    warnings.warn_explicit(redact(message), category, at.path, at.number, at.module, at.warned)


def _without_ours(error: BaseException) -> types.TracebackType | None:
    kept: types.TracebackType | None = None
    users = error.__dict__.get(_USERS_FRAMES, 0)
    for number, entry in enumerate(reversed(_entries(error))):
        if number < users or not _is_ours(entry.tb_frame):
            kept = types.TracebackType(kept, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return kept


def _entries(error: BaseException) -> list[types.TracebackType]:
    entries, entry = [], error.__traceback__
    while entry is not None:
        entries.append(entry)
        entry = entry.tb_next
    return entries


def _is_ours(frame: types.FrameType) -> bool:
    """Whether it is of fastload, or of torch or Python's library as they stand around what is."""
    file = frame.f_code.co_filename
    if file == "<string>":  # what dataclasses wrote
        return str(frame.f_globals.get("__name__")).startswith(_NAME)
    return file.startswith((_PACKAGE + os.sep, *_BETWEEN, *_torch()))


def _torch() -> tuple[str, ...]:
    """Where torch is, if it was imported. A folder of the user's may have its name."""
    file = getattr(sys.modules.get("torch"), "__file__", None)
    return () if file is None else (os.path.dirname(file) + os.sep,)
