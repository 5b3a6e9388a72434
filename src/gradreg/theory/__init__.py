"""The theorems as small exact experiments: ``diagonal_network``, ``kernel_decay``, ``flooding`` and ``stability``.

Each module has public functions that return plain arrays in a frozen dataclass; ``gradreg lab`` tabulates and draws them.
NumPy and SciPy are all they need, except where the PyTorch engine itself is driven (``diagonal_network.train``, ``flooding``).
"""
