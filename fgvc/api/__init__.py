"""fgvc in Python: runs and bundles as objects, and the verbs of the command line as typed functions.

Wherever a file or a folder is named, text, a `Path`, and what has one (a `Run`, a `Bundle`, an `Exported`) will do.
"""

from fgvc.api.data import check, preview, probe
from fgvc.api.evaluation import compare, evaluate, localize, report
from fgvc.api.run import Run
from fgvc.api.shipping import Exported, export, verify
from fgvc.api.training import forecast, interpolate, train
from fgvc.config.recipe import Recipe
from fgvc.data.recipe import load_recipe
from fgvc.evaluation.compared import PairedAnswers
from fgvc.evaluation.evaluate import Evaluation
from fgvc.evaluation.file_preprocessing import search_file as find_preprocess
from fgvc.evaluation.localize import Localisation
from fgvc.exporting.inspect import Inspection
from fgvc.exporting.inspect import inspect_file as inspect
from fgvc.exporting.quantize import Int8
from fgvc.report.document import Page
from fgvc.report.explain import explain
from fgvc.report.preview import Preview
from fgvc.runtime.bundle import Bundle, load_bundle
from fgvc.runtime.engine import Answer, Prediction
from fgvc.runtime.explained import ExplainedPicture
from fgvc.studies.probe import ProbeResults
from fgvc.studies.variants import Variants
from fgvc.training.forecast import Forecast
from fgvc.training.interpolate import Interpolation

__all__ = [
    "Answer", "Bundle", "Evaluation", "ExplainedPicture", "Exported", "Forecast", "Inspection", "Int8", "Interpolation",
    "Localisation", "Page", "PairedAnswers", "Prediction", "Preview", "ProbeResults", "Recipe", "Run", "Variants", "check",
    "compare", "evaluate", "explain", "export", "find_preprocess", "forecast", "inspect", "interpolate", "load_bundle",
    "load_recipe", "localize", "preview", "probe", "report", "train", "verify",
]  # fmt: skip
