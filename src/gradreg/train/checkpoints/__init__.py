"""Checkpoints of a run, from which it resumes as if it had not been interrupted.

- ``save_and_load``: what a checkpoint holds: ``TrainingState.save`` and ``TrainingState.load``, beside each other.
- ``folders``: where checkpoints lie: folders written atomically, their damage noticed, the newest few kept.
- ``policy``: when one is written: by epochs, by the clock, at the end, and when the run is told to stop.
"""
