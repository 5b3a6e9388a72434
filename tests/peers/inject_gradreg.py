"""A pytest plugin for other projects' own tests: gradreg in every trainer, without a penalty, and a record of what failed.

``GRADREG_INJECT`` names the framework, or is empty to inject nothing; ``GRADREG_OUTCOMES`` is the file for the record.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest

_outcomes: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flaky: belongs to a plugin that need not be installed")
    inject = {"": lambda: None, "lightning": _into_lightning, "transformers": _into_transformers}
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

    from gradreg.integrations.transformers import RegularizedTrainerMixin

    plain: Any = trainer.Trainer

    class Trainer(RegularizedTrainerMixin, plain):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, penalty=None, **kwargs)

    Trainer.__module__, Trainer.__qualname__, Trainer.__doc__ = plain.__module__, plain.__qualname__, plain.__doc__
    Trainer.__init__.__signature__ = inspect.signature(plain.__init__)  # type: ignore[attr-defined]
    transformers.Trainer = trainer.Trainer = Trainer  # type: ignore[misc]
