"""Data: images in memory or streamed from files, split, augmented, and dealt out in batches.

What a batch holds depends on seed, epoch and position alone. ``loader.load`` gives a run its data; this page,
``configuration`` and ``catalogue`` import no PyTorch. The way of an image:

- ``configuration``: the keys ``data`` and ``augmentation`` of a recipe
- ``catalogue``: one record for each data set: its size, classes, channel means, and how it is read
- ``readers``: reads each data set from its files
- ``datasets``: images as they are read: bytes in memory, or files still to be decoded
- ``splits``: which images are trained on, validated on and tested on
- ``sampler``: which images make up a batch, and the random numbers that belong to it
- ``loader``: the training and evaluation sets, their batches, and images held in memory
- ``streaming``: images decoded by worker processes in every epoch
- ``transforms``: what is done to one image, or to a batch at once
- ``crops``, ``auto_augment``: the batch versions of crops, flips and AutoAugment
"""
