"""Files are written whole or not at all."""

from __future__ import annotations

import json
import os

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
