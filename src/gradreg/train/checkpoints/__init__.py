"""Checkpoints of a run, from which it resumes as if it had not been interrupted.

- ``save_and_load``: the contents of a checkpoint: ``TrainingState.save`` and ``TrainingState.load``.
- ``folders``: the folders of checkpoints: written atomically, checked for damage, the newest few kept.
- ``policy``: when one is written: by epochs, by the clock, at the end, and on SIGTERM, SIGHUP or SIGINT.
"""
