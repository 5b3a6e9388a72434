"""A pytest plugin for other projects' own tests: gradreg in every trainer, without a penalty, and a record of what failed.

``GRADREG_INJECT`` names the framework, or is empty to inject nothing; ``GRADREG_OUTCOMES`` is the file for the record.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

_outcomes: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flaky: belongs to a plugin that need not be installed")
    inject = {"": lambda: None, "lightning": _into_lightning, "transformers": _into_transformers, "trl": _into_trl}
    inject[os.environ["GRADREG_INJECT"]]()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _outcomes[report.nodeid] = "failed"
    elif report.when == "call" or report.skipped:
        _outcomes.setdefault(report.nodeid, report.outcome)


def pytest_sessionfinish() -> None:
    Path(os.environ["GRADREG_OUTCOMES"]).write_text(json.dumps(_outcomes))


def _into_lightning() -> None:
    """Every ``Trainer`` gets the callback."""
    from lightning.pytorch import Trainer

    from gradreg.integrations.lightning import GradientRegularization

    build: Any = Trainer.__init__

    def with_callback(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if not any(isinstance(c, GradientRegularization) for c in self.callbacks):
            self.callbacks.insert(0, GradientRegularization(None))

    with_callback.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]  # Lightning's command line reads it
    with_callback.__doc__ = build.__doc__
    Trainer.__init__ = with_callback  # type: ignore[method-assign]


def _into_transformers() -> None:
    """Every ``Trainer``, and every class derived from it, has the mixin beneath it."""
    import transformers
    from transformers import trainer

    from gradreg.integrations.transformers import RegularizedTrainer

    transformers.Trainer = trainer.Trainer = _in_place_of(trainer.Trainer, RegularizedTrainer)  # type: ignore[misc]


def _into_trl() -> None:
    """TRL's trainers are our adapters of them."""
    import trl
    from trl import trainer

    from gradreg.integrations import trl as adapters

    for name in ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "RLOOTrainer", "GRPOTrainer"):
        plain = getattr(trl, name)
        ours = _in_place_of(plain, getattr(adapters, f"Regularized{name}"))
        for module in (trl, trainer, sys.modules[plain.__module__]):
            setattr(module, name, ours)


def _in_place_of(plain: Any, adapter: Any) -> Any:
    """The adapter of a trainer with the look of that trainer, and without a penalty."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        adapter.__init__(self, *args, penalty=None, **kwargs)

    build.__signature__ = inspect.signature(plain.__init__)  # type: ignore[attr-defined]
    look = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (adapter,), {"__init__": build, **look})
