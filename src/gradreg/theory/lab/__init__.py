"""The experiments of ``gradreg lab``: each module runs one, and says what to tabulate and to draw."""
