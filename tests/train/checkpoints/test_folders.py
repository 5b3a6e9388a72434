"""Checkpoints are whole or absent, and their damage is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradreg.train.checkpoints.folders import MANIFEST, Checkpoints


def write(checkpoints: Checkpoints, step: int, content: bytes = b"weights") -> Path:
    with checkpoints.new(step) as folder:
        (folder / "model").write_bytes(content)
        (folder / "state").write_bytes(b"state of %d" % step)
    return checkpoints.folder / f"step-{step:012d}"


def newest(checkpoints: Checkpoints) -> tuple[str | None, list[str]]:
    said: list[str] = []
    found = next(checkpoints.whole(said.append), None)
    return None if found is None else found.name, said


def test_the_newest_are_kept_and_described(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (5, 90, 1000):
        last = write(checkpoints, step)
    assert [path.name for path in checkpoints.all()] == ["step-000000001000", "step-000000000090"]
    assert set(json.loads((last / MANIFEST).read_text())["files"]) == {"model", "state"}
    assert newest(checkpoints) == ("step-000000001000", [])


def test_a_failure_leaves_the_earlier_ones_and_nothing_else(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 1)
    with pytest.raises(TypeError, match="not 'NoneType'"):
        write(checkpoints, 2, None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000001"]
    assert newest(checkpoints) == ("step-000000000001", [])


def test_what_a_killed_process_left_is_no_checkpoint_and_is_removed_by_the_next(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    write(checkpoints, 1)
    leftover = tmp_path / "step-000000000002.unfinished"
    leftover.mkdir()
    (leftover / "model").write_bytes(b"half")
    assert newest(checkpoints)[0] == "step-000000000001"
    write(checkpoints, 3)
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: (c / "model").write_bytes(b"weight"), "model has 6 bytes, not 7"),
        (lambda c: (c / "model").write_bytes(b"Weights"), "model is not what was written"),
        (lambda c: (c / "state").unlink(), "state is missing"),
        (lambda c: (c / MANIFEST).unlink(), "manifest.json cannot be read: FileNotFoundError"),
        (lambda c: (c / MANIFEST).write_bytes(b"\xff{"), "manifest.json cannot be read: UnicodeDecodeError"),
        (lambda c: (c / MANIFEST).write_text("[]"), "manifest.json cannot be read: TypeError"),
    ],
    ids=["truncated", "bit flipped", "file gone", "manifest gone", "manifest garbage", "manifest of another form"],
)
def test_a_damaged_one_is_passed_over_for_the_one_before_it(tmp_path, damage, words):
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 1)
    damage(write(checkpoints, 2))
    found, said = newest(checkpoints)
    assert found == "step-000000000001"
    assert said == [f"checkpoint step-000000000002 is damaged ({words}); going back to the one before it."]


def test_writing_a_step_again_replaces_a_damaged_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (write(checkpoints, 2) / "model").unlink()
    assert newest(checkpoints)[0] is None
    write(checkpoints, 2)
    assert newest(checkpoints) == ("step-000000000002", [])
