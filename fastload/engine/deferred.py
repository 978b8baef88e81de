"""Work for which a finalizer must not stay.

The garbage collector runs finalizers in any thread, in the middle of anything and under any lock. So they may not
take a lock or wait, not even for `threading` to start a thread, which takes one too. What they may do is start a bare
thread; that one starts a proper thread, whose traces `threading` removes when it ends.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import Any


def call_later(function: Callable[..., Any], *arguments: Any) -> None:
    """Call `function(*arguments)` soon, in another thread. Never waits."""
    _thread.start_new_thread(_start, (function, arguments))


def _start(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=function, args=arguments, name="fastload-finish", daemon=True).start()
