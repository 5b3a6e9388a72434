"""A pytest plugin for Lightning's own tests: every ``Trainer`` gets the callback, without a penalty."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flaky: of a plugin that need not be installed")
    if os.environ.get("GRADREG_INJECT") == "1":
        _inject()


def _inject() -> None:
    from lightning.pytorch import Callback, Trainer

    from gradreg.integrations.lightning import GradientRegularization

    plain: Callable[..., None] = Trainer.__init__

    # Not by functools.wraps: the signature of ``Trainer`` must stay what Lightning's command line reads from it.
    def with_callback(self: Trainer, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        callbacks: list[Callback] = self.callbacks
        if not any(isinstance(c, GradientRegularization) for c in callbacks):
            callbacks.insert(0, GradientRegularization(None))

    with_callback.__signature__ = __import__("inspect").signature(plain)  # type: ignore[attr-defined]
    with_callback.__doc__ = plain.__doc__
    Trainer.__init__ = with_callback  # type: ignore[method-assign]
