"""Hypothesis draws the same examples every time, on any machine; ``--soak`` runs whole what ``make test`` runs a sample of."""

import pytest
from hypothesis import settings

settings.register_profile("seeded", derandomize=True, database=None, deadline=None)
settings.load_profile("seeded")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run the tests marked soak: every point of what is sampled otherwise")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: a whole sweep, for minutes; runs with --soak only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak"):
        soaking = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soaking)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
