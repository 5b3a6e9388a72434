"""Runs one after another in the processes that a launcher started: python several_runs.py runs.json.

The file holds a list of [folder, nested keys of the configuration]. Starting processes is what costs, so several runs share one start.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gradreg.train.devices import Devices
from gradreg.train.recipe import configuration
from gradreg.train.run_to_folder import run_to_folder

if __name__ == "__main__":
    devices = None
    for folder, settings in json.loads(Path(sys.argv[1]).read_text()):
        config = configuration(settings)
        devices = Devices(config)
        run_to_folder(Path(folder), config, devices=devices)
    if devices is not None:
        devices.close()
