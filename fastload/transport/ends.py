"""What is known of how a worker process ended, and what may help: one text for all who have workers."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
from multiprocessing.context import ForkProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

HOW_TO_SEND = (
    "workers that are spawned are sent the data set and its functions, so define these at the top level of a module "
    '(no lambda, and no function within another); or give workers="thread", or multiprocessing_context="fork"'
)


def is_unsendable(error: BaseException) -> bool:
    """Whether a process could not be started since what it was to be given cannot be pickled."""
    if isinstance(error, pickle.PicklingError):
        return True
    return isinstance(error, AttributeError | TypeError) and "pickle" in str(error).lower()


def how_it_ended(process: BaseProcess, code_of: str) -> str:
    """The end of a sentence that begins with the process, which has ended; `code_of` says whose Python it ran."""
    exit_code = process.exitcode or 0
    if exit_code == 1 and not _is_forked(process) and not _is_in_a_file(sys.modules["__main__"]):
        return (
            "ended with status 1: workers that are spawned read your script again, and this one is in no file (it came "
            'from stdin, from -c or from a prompt); put it into a file, or give multiprocessing_context="fork" or '
            'workers="thread"'
        )
    if exit_code == 1:
        return (
            f"ended with status 1; does {code_of} call sys.exit()? Or are processes spawned, and what your script does "
            'is not under `if __name__ == "__main__":`, so that each does it again? What it printed says more'
        )
    if exit_code >= 0:
        return f"ended with status {exit_code}; does {code_of} call os._exit() or sys.exit()?"
    number = -exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    cure = {
        "SIGKILL": "killed, as when memory runs out: lower num_workers, prefetch_factor or batch_size",
        "SIGBUS": "shared memory ran out: raise the container's memory, or lower num_workers or batch_size",
        "SIGSEGV": f'crashed in compiled code that {code_of} calls: try multiprocessing_context="spawn"',
    }.get(name, "somebody sent it that signal")
    return f"was ended by {name} ({cure})"


def _is_forked(process: BaseProcess) -> bool:
    """Whether it has the memory of its parent, and with it the script."""
    if isinstance(process, multiprocessing.Process):  # one of the default context
        return multiprocessing.get_start_method() == "fork"
    return isinstance(process, ForkProcess)


def _is_in_a_file(main: ModuleType) -> bool:
    """Whether another process can read the script that this one runs: of one from stdin, `__file__` is "<stdin>"."""
    file = getattr(main, "__file__", None)
    return file is not None and Path(file).exists()
