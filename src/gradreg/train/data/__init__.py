"""Data: sets in memory or streamed from files, split, augmented and dealt out in batches that depend on seed, epoch and position alone.

``loading.load`` gives the sets of a run. This page and ``configuration`` import no PyTorch.
"""
