"""Imports every module of qalign, for a process whose forked children run commands: their start then takes no time."""

import gc
import importlib
import pkgutil

import torch

import qalign

torch.set_num_threads(1)
for _module in pkgutil.walk_packages(qalign.__path__, "qalign."):
    if "__main__" not in _module.name and ".page" not in _module.name:
        try:
            importlib.import_module(_module.name)
        except ModuleNotFoundError as missing:
            if missing.name != "lm_eval":  # which is optional
                raise
gc.collect()
gc.freeze()  # so that no child looks through the libraries' objects at each collection
