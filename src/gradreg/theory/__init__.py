"""The theorems as small exact experiments: ``diagonal_network``, ``kernel_decay``, ``flooding``, ``stability``, ``advice`` and ``edge``.

Each module has public functions that return plain arrays in a frozen dataclass; ``gradreg lab`` tabulates and plots them.
They need only NumPy and SciPy, except where they run the PyTorch engine itself (``diagonal_network.train``, ``flooding``).
"""
