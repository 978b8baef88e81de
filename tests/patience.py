"""How long a test waits for what must come.

A wait ends by its event. Its limit is there for what hangs only, and is the same everywhere, so that a busy machine,
where everything takes twenty times as long, fails no test. Where it is the limit that is tested, the test passes one
of its own.
"""

from __future__ import annotations

PATIENCE_S = 300.0  # below pytest's own limit (pyproject.toml), so that the failure names the wait
