"""Old names warn, say what to write, and work."""

import pytest

import gradreg
from gradreg.deprecations import deprecated


def test_remembered_is_ema_direction() -> None:
    with pytest.warns(DeprecationWarning, match=r"gradreg\.Remembered is now gradreg\.EmaDirection; the old name goes in 0\.2"):
        old = gradreg.Remembered
    assert old is gradreg.EmaDirection
    assert gradreg.remembered(epsilon=0.2, decay=0.4).direction == old(decay=0.4)


def test_it_can_be_imported_by_its_old_name() -> None:
    with pytest.warns(DeprecationWarning, match=r"gradreg\.Remembered is now"):
        from gradreg import Remembered
    assert Remembered(ahead=True) == gradreg.EmaDirection(ahead=True)


def test_the_warning_points_at_the_line_that_asks() -> None:
    with pytest.warns(DeprecationWarning, match=r"gradreg\.Remembered") as caught:
        _ = gradreg.Remembered
    assert caught[0].filename == __file__


def test_names_that_never_were() -> None:
    with pytest.raises(AttributeError, match="module 'gradreg' has no attribute 'Rembered'"):
        _ = gradreg.Rembered
    with pytest.raises(AttributeError, match="module 'here' has no attribute 'old'"):
        deprecated("here", "old", {})


def test_old_names_are_not_public() -> None:
    assert "Remembered" not in gradreg.__all__
