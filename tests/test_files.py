"""Files are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gradreg import files


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named_with_its_purpose(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--out must name a folder that can be written to; got '.*file/runs'"):
        files.make_directory(tmp_path / "file" / "runs", purpose="--out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*result\.json'"):
        files.write_json(tmp_path / "result.json", {})
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        files.append_text(Path("/dev/full"), "line")


def test_a_damaged_file_is_named_with_what_it_should_hold(tmp_path):
    file = tmp_path / "a.json"
    for content, why in (
        (b"[" * 100_000, "it is nested too deep"),
        (b"3", "it holds int and no mapping"),
        (b"{", "Expecting property name"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"'.*a\.json' must hold a result; it is damaged: {why}.* Remove it\."):
            files.read_json(file, holds="a result", remedy="Remove it.")
    file.unlink()
    with pytest.raises(ValueError, match="it is missing"):
        files.read_json(file, holds="a result", remedy="Remove it.")
    os.mkfifo(file)
    with pytest.raises(ValueError, match="it is no plain file"):
        files.read_json(file, holds="a result", remedy="Remove it.")
