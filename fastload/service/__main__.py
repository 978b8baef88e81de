"""`python -m fastload.service`: a cache directory's service as a process of its own.

The starting process passes the writing end of a pipe, on which one line of JSON says how that went: `{"status":
"ready"}`, `{"status": "taken"}` where another service has the directory, or `{"status": "error", "error": [type,
message]}`.

With `--detach` the process forks at once, before it has threads, and the service is the child: in a session of its own
and without a parent, so that the process that started it need not wait for its end. The parent ends right away.
"""

from __future__ import annotations

import gc
import os
import sys


def _detach() -> None:
    if os.fork():
        os._exit(0)
    os.setsid()


if __name__ == "__main__":
    if "--detach" in sys.argv:
        _detach()
    gc.disable()  # nothing that is imported is garbage, and to look for some takes an eighth of the start
    from fastload.service.host.process import main

    gc.freeze()
    gc.enable()
    sys.exit(main(sys.argv[1:]))
