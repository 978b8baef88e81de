"""Prometheus metrics of a node's cache, for a process without a daemon: `fastload.metrics.serve()`.

    serve(cache=None, listen="127.0.0.1:9432", *, textfile=None, textfile_every_s=15.0, allow_remote=False) -> Serving

returns at once; threads of its own do the rest until `Serving.close()`. What they show is the snapshot of the service
that runs for the cache's directory at that moment, asked for as an operator does: each scrape asks once, and nothing is
asked between them. So watching starts, keeps and holds up nothing, and the process that serves need not be one that
trains. The daemon calls the same function with the addresses of its config; `serve` itself asks the service nothing,
so the daemon's loop may call it.
"""

from __future__ import annotations

from fastload.metrics.serving import Serving, serve

__all__ = ["Serving", "serve"]
