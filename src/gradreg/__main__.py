"""``python -m gradreg``: the command line, in the form that launchers such as ``accelerate launch -m`` need."""

import sys

from gradreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
