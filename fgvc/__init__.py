"""fgvc: raise the accuracy of the classifier you already deploy without changing a node of its graph.

In Python: `from fgvc import api` to train, export and prove; `fgvc.export.bundle` and `fgvc.serve.engine`, which need no
torch, to predict.
"""

__version__ = "0.1.0"
