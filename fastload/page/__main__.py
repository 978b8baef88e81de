"""`python -m fastload.page`: the page of a cache directory. See `fastload.page.process`."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    if "--detach" in sys.argv:  # before there are threads
        if os.fork():
            os._exit(0)
        os.setsid()
    from fastload.page.process import main

    sys.exit(main(sys.argv[1:]))
