"""What is known of how a worker process ended, and what may help: one text for all who have workers."""

from __future__ import annotations

import signal


def how_it_ended(exit_code: int, code_of: str) -> str:
    """The end of a sentence that begins with the process; `code_of` says whose Python it ran."""
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
