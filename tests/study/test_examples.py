"""The studies in examples/studies: each runs, small, through study.compare, and gives a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradreg import study
from gradreg.study.functions import load_task
from gradreg.study.history import read_history

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples" / "studies"
SMALL = {
    "diabetes": {"epochs": 2, "width": 8},
    "characters": {"epochs": 1, "width": 8, "batch_size": 64},
    "segmentation": {"epochs": 3, "width": 8, "images": 80},
    "nnx_digits": {"epochs": 1, "width": 8, "batch_size": 200},
    "gru_text": {"epochs": 1, "width": 8, "train_size": 200},
    "lightning_digits": {"epochs": 2, "width": 8, "train_size": 400},
    "grpo_words": {"steps": 2, "batch_size": 4},
    "trainer_words": {"epochs": 1},
    "optax_loop": {"steps": 20, "width": 8},
}
REAL_MODELS = ("minilm_testament", "smollm_lora", "grpo_hacked_reward")
"""Those that tests/integrations/test_real_models.py runs, which loads the models once."""
WITHOUT_TORCH = ("nnx_digits", "optax_loop")


def test_every_study_is_tested():
    assert {file.stem for file in FOLDER.glob("*.py")} == {*SMALL, *REAL_MODELS}


@pytest.mark.parametrize("name", SMALL)
def test_a_study_gives_a_table(name: str, tmp_path: Path):
    found = study.compare(
        str(FOLDER / f"{name}.py"),
        penalties=["none", "sam:rho=0.05"],
        seeds=2,
        out=tmp_path,
        options=SMALL[name],
        workers=0,
        rivals=["epochs"],
    )
    assert "sam:rho=0.05" in found.markdown()
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(tmp_path.rglob("result.json"))]
    assert len(runs) == 4
    assert not any(run["diverged"] or run["warnings"] for run in runs)
    metric = load_task(str(FOLDER / f"{name}.py")).metric
    losses = {read_history(file.parent)[-1]["loss"] for file in tmp_path.rglob("result.json")}
    assert len(losses) == 4, "seeds and penalties make a difference"
    assert all(run["best"][metric.validation] is not None for run in runs)
    plain, twice = sorted({run["gradient_evaluations"] for run in runs})
    assert twice == 2 * plain == 2 * runs[0]["steps"]


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_a_study_in_jax_does_not_import_torch(name: str, tmp_path: Path):
    script = (
        "import sys; from gradreg import study; "
        f"study.compare({str(FOLDER / f'{name}.py')!r}, penalties=['sam:rho=0.05'], seeds=1, out={str(tmp_path)!r}, "
        f"options={SMALL[name]!r}, workers=0, rivals=['epochs']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
