"""Loaded by every Python process whose PYTHONPATH names this folder: services whose high-water
marks drop nothing. The control arm of the replay; nothing else may load it."""

import sys

if any(argument.startswith("services.") for argument in sys.orig_argv):
    import numpy as np

    from causemesh.runner.marks import HighWaterMarks

    HighWaterMarks.fresh = lambda self, source, causes: np.ones(causes.height, dtype=bool)  # type: ignore[method-assign]
