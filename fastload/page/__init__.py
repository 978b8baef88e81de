"""The page: what a node's cache holds and does, in a browser (extra `page`).

It is a process of its own, which watches the service as any operator does, over one connection whatever the number of
browsers. So no browser slows the cache, and it outlives the services that it watches. It changes nothing.

    guard     who may see it
    listener  where it listens, and the file in the cache directory by which `fastload status --open` finds it
    watcher   its connection to the service
    ring      the last hour of throughput
    view      what a browser is sent of a snapshot
    app       routes and streams
    assets    what the browser runs: no build step, no inline script; uPlot as it is published, beside its hash

`start` runs it as a child or in the background, `running` finds one. Neither needs the extra: the process does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastload.lazy import lazy_names

if TYPE_CHECKING:
    from fastload.page.listener import Running as Running
    from fastload.page.listener import running as running
    from fastload.page.process import run as run
    from fastload.page.process import start as start

__getattr__, __dir__, __all__ = lazy_names(__name__, {"listener": ["Running", "running"], "process": ["run", "start"]})
