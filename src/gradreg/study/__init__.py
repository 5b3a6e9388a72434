"""Does a penalty help on my task? Any training function as a study: variants over seeds, fair baselines, and an answer with intervals."""

from gradreg.extras import needing

with needing("gradreg.study", "study"):
    from gradreg.study.comparison import Comparison, compare
    from gradreg.study.functions import FunctionTask, task
    from gradreg.study.probing import Probe, probe
    from gradreg.study.run import Run
    from gradreg.study.tuning import Tuning, tune

__all__ = ["Comparison", "FunctionTask", "Probe", "Run", "Tuning", "compare", "probe", "task", "tune"]
