"""Does a penalty help on my task? Any training function as a study: variants over seeds, fair baselines, and an answer with intervals."""

from gradreg.extras import needing

with needing("gradreg.study", "study"):
    from gradreg.study.comparison import Comparison, compare
    from gradreg.study.functions import FunctionTask, task
    from gradreg.study.run import Run
    from gradreg.study.tuning import Tuning, tune

__all__ = ["Comparison", "FunctionTask", "Run", "Tuning", "compare", "task", "tune"]
