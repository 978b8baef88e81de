"""Both ways to decode images: the C unit, and numba with simplejpeg."""

from __future__ import annotations

import pytest

from fastload.decode import native


@pytest.fixture(params=["native", "numba"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each of them."""
    if request.param == "numba":
        monkeypatch.setattr(native, "c_unit", lambda: None)
    elif native.c_unit() is None:
        pytest.skip("the C unit was not built: no compiler or no libjpeg-turbo header when fastload was installed")
    name: str = request.param
    return name
