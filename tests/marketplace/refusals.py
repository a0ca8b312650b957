"""`with refused("over_power_cap", missing_w=400): ...`: the call refuses with that code and those extras."""

from typing import Any

import pytest

from marketplace.errors import MarketError


def refused(code: str, **extra: Any) -> Any:
    return pytest.raises(MarketError, check=lambda error: error.code == code and extra.items() <= error.extra.items())
