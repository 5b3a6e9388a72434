"""The experiments of ``gradreg lab``: each module runs one, and defines its tables and figures."""
