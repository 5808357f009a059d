"""Loads the service without what it never uses, which is a quarter of its start."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lean() -> Iterator[None]:
    """No look for garbage among modules that all stay, and no rich: structlog and httpx load it for terminals."""
    hidden = "rich" not in sys.modules
    if hidden:
        sys.modules["rich"] = None  # type: ignore[assignment]  # what makes an import say that there is none
    gc.disable()
    try:
        yield
    finally:
        if hidden:
            del sys.modules["rich"]
        gc.freeze()
        gc.enable()
