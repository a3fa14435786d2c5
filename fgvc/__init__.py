"""fgvc: raise the accuracy of the classifier you already deploy without changing a node of its graph.

In Python: `from fgvc import api` to train, export and prove; `fgvc.runtime.bundle` and `fgvc.runtime.engine`, which need no
torch, to predict.
"""

import os

__version__ = "0.1.0"

# onnxruntime (1.29 and later) reports its use to its makers unless it is told not to before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
