"""The models that the decoding loop is tested on."""

from __future__ import annotations

from typing import Any

import pytest

from decoding_helpers import llama, mistral, with_adapters


@pytest.fixture(scope="module", params=["llama", "mistral", "mistral-window"])
def plain(request: pytest.FixtureRequest) -> Any:
    return {"llama": llama, "mistral": lambda: mistral(None), "mistral-window": lambda: mistral(8)}[request.param]()


@pytest.fixture(scope="module")
def tenants() -> Any:
    return with_adapters(llama())
