"""What a stranger installs: the wheel, in an empty environment beside the packages of its extras, runs README's code and the command."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import gradreg

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # builds and installs


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel and the source distribution, by their suffix."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def empty(distributions, tmp_path_factory):
    """The Python of a new environment that has the wheel, and beside it the packages that this one has."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(packages),
        str(distributions[".whl"]),
    ]
    subprocess.run(install, check=True, capture_output=True)
    # As the index would install torch and jax; .pth files, which name checkouts such as this one, are not read in folders added so.
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *arguments: str, folder: Path) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_small_and_has_what_it_needs(distributions):
    assert distributions[".whl"].stat().st_size < 1_000_000
    names = zipfile.ZipFile(distributions[".whl"]).namelist()
    inside = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "gradreg").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == inside
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(distributions[".gz"]) as source:
        assert f"gradreg-{gradreg.__version__}/hatch_build.py" in source.getnames()


def test_a_package_index_accepts_it_and_every_link_leads_to_the_repository(distributions):
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions.values())]
    assert subprocess.run(check, capture_output=True, text=True, check=True).stdout.count("PASSED") == 2
    wheel = zipfile.ZipFile(distributions[".whl"])
    metadata = wheel.read(f"gradreg-{gradreg.__version__}.dist-info/METADATA").decode()
    (repository,) = re.findall(r"^Project-URL: Repository, (.*)$", metadata, flags=re.MULTILINE)
    links = re.findall(r"\]\(([^)]+)\)", metadata)
    assert len(links) > 20
    assert all(link.startswith((repository, "https://arxiv.org/")) for link in links)


def test_readme_s_code_runs_from_the_wheel(empty, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    where = "import gradreg; print(gradreg.__version__, gradreg.__file__)\n"
    for block in blocks:
        (tmp_path / "readme.py").write_text(block + where, encoding="utf-8")
        version, file = run(empty, "readme.py", folder=tmp_path).split()
        assert version == gradreg.__version__
        assert Path(file).is_relative_to(empty.parents[1])


def test_the_command_runs_from_the_wheel(empty, tmp_path):
    assert run(empty, "-m", "gradreg", "--version", folder=tmp_path) == f"gradreg {gradreg.__version__}\n"
    assert "digits-noisy-labels" in run(empty, "-m", "gradreg", "recipes", folder=tmp_path)
