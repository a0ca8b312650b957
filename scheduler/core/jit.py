"""How the kernels are compiled: ahead of nothing, cached on disk (NUMBA_CACHE_DIR), one thread, deterministic.

`_nrt=False`: kernels allocate nothing, and without numba's reference counting of every array that they look into they run four
times faster (see the decisions benchmark). `inlined`: a call would copy every field of State, Tables and Cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from numba import config, njit

# Numba's cache looks at the file of a kernel alone, but kernels inline functions of other files: a folder for each state of the
# sources, so that a change of the fit rule can never run with an old copy of it inside.
_SOURCES: Final = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
_FOLDER: Final[str] = getattr(config, "CACHE_DIR", "")  # NUMBA_CACHE_DIR; numba sets it without declaring it
if _FOLDER and not Path(_FOLDER).name.startswith("core-"):
    setattr(config, "CACHE_DIR", str(Path(_FOLDER) / f"core-{hashlib.sha256(_SOURCES).hexdigest()[:12]}"))  # noqa: B010

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
