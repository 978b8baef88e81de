"""What the loader costs the thread that trains: `python -m bench.interference`; `__main__` says what is measured.

`cases` are the kinds of data, `counts` and `gaps` what is measured of them, each in a process of its own that `options`
starts; `loads` is what runs beside the thread that wakes up, and `report` shows what was found.
"""

from bench.interference.cases import images

__all__ = ["images"]
