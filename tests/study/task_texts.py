"""The text of a file with a task, from the body of its function."""

from __future__ import annotations

import textwrap

STEP = "regularizer.backward(lambda: model(torch.ones(1, 1)).sum())\n"
MODEL = "model = torch.nn.Linear(1, 1)\nregularizer = run.regularizer(model)\n"
LOOP = f"{MODEL}for epoch in run.epochs(2):\n    {STEP}    run.log(test_accuracy=0.5 + 0.1 * run.seed)\n"


def task_text(body: str, *, header: str = '@study.task(metric="accuracy")', signature: str = "run") -> str:
    """A file whose task begins in line 5."""
    return (
        f"from gradreg import study\nimport torch\nMODEL = torch.nn.Linear(1, 1)\nKEPT = []\n{header}\ndef train({signature}):\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
    )
