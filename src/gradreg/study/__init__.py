"""Does a penalty help on my task? Any training function as a study: variants over seeds, fair baselines, and an answer with intervals."""

from gradreg.extras import needing

with needing("gradreg.study", "study"):
    from gradreg.study.comparison import Comparison, compare
    from gradreg.study.executors.executor import Executor, ExecutorError
    from gradreg.study.executors.local import LocalExecutor
    from gradreg.study.executors.ray import RayExecutor
    from gradreg.study.executors.slurm import SlurmExecutor
    from gradreg.study.functions import FunctionTask, task
    from gradreg.study.probing import Probe, probe
    from gradreg.study.run import Run
    from gradreg.study.tuning import Tuning, tune

__all__ = [
    "Comparison",
    "Executor",
    "ExecutorError",
    "FunctionTask",
    "LocalExecutor",
    "Probe",
    "RayExecutor",
    "Run",
    "SlurmExecutor",
    "Tuning",
    "compare",
    "probe",
    "task",
    "tune",
]
