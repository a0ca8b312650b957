"""How the kernels are compiled: ahead of nothing, cached on disk (NUMBA_CACHE_DIR), one thread, deterministic.

`_nrt=False`: kernels allocate nothing, and without numba's reference counting of every array that they look into they run four
times faster (see the decisions benchmark). `inlined`: a call would copy every field of State, Tables and Cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from numba import njit

_F = TypeVar("_F", bound=Callable[..., Any])
_OPTIONS: Final[dict[str, Any]] = {"cache": True, "_nrt": False}
_REORDERED: Final[dict[str, Any]] = {"fastmath": {"reassoc", "nnan", "nsz", "contract"}}


def kernel(function: _F) -> _F:
    """Compiles a function that reads and writes the arrays it is given and allocates none."""
    return cast("_F", njit(**_OPTIONS)(function))


def inlined(function: _F) -> _F:
    """As `kernel`, inlined into its callers."""
    return cast("_F", njit(forceinline=True, **_OPTIONS)(function))


def inlined_sum(function: _F) -> _F:
    """As `inlined`; its sums may be taken in any order (three times faster)."""
    return cast("_F", njit(forceinline=True, **_REORDERED, **_OPTIONS)(function))
