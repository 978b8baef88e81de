"""Memory that is lent out is heard of again."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest

from fastload.transport import lending


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_also_where_lending_it_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: deque[lending.Collected[str]] = deque()
    monkeypatch.setattr(lending, "address_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lending.lent(np.zeros(10, np.uint8), collected, "this")
    assert [each.what for each in collected] == ["this"]
