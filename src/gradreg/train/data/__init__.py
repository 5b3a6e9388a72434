"""Data: images in memory or streamed from files, split, augmented, and batched.

The content of a batch depends only on seed, epoch and position. ``loader.load`` gives a run its data; this file,
``configuration`` and ``catalogue`` do not import PyTorch. The path of an image:

- ``configuration``: the keys ``data`` and ``augmentation`` of a recipe
- ``catalogue``: one record for each data set: its size, classes, channel means, and how it is read
- ``readers``: reads each data set from its files
- ``datasets``: images as they are read: bytes in memory, or files to be decoded
- ``splits``: which images are trained on, validated on and tested on
- ``sampler``: which images make up a batch, and the seeds of its random numbers
- ``loader``: the training and evaluation sets, their batches, and images held in memory
- ``samples``: data sets of one's own, whose samples need not be images
- ``streaming``: images decoded by worker processes in every epoch
- ``transforms``: transforms of one image, or of a whole batch
- ``crops``, ``auto_augment``: the batch versions of crops, flips and AutoAugment
"""
