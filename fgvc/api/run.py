"""A run as an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fgvc.api.evaluation import evaluate, localize, report
from fgvc.api.shipping import export
from fgvc.config.recipe import Recipe, Selected
from fgvc.io.display import Display, Results, figure
from fgvc.io.files import StrPath
from fgvc.models.cam.offline import method_name
from fgvc.report.explain import open_explainer
from fgvc.report.html_charts import curves
from fgvc.runs.folder import read_run, recorded_classes
from fgvc.runs.history import History, read_history
from fgvc.runs.loaded import load_run
from fgvc.runtime.explained import ExplainedPicture, explain_pictures
from fgvc.runtime.predict import Pictures
from fgvc.training.floor import floor_comparison


class Run(Display):
    """A run of training, by its folder. It stands wherever a run's folder is named.

    `evaluate`, `localize`, `report` and `export` are the functions of these names, whose first argument is the run.
    """

    def __init__(self, folder: StrPath) -> None:
        """Open a run. Raises FgvcError where the folder is none."""
        self.folder = Path(folder)
        self.recipe: Recipe = read_run(self.folder)
        self.classes: tuple[str, ...] = recorded_classes(self.folder)

    evaluate = evaluate
    localize = localize
    report = report
    export = export

    @property
    def history(self) -> History:
        """The epochs, learning rates, machine and times that training recorded."""
        return read_history(self.folder)

    def explain(
        self,
        images: Pictures,
        *,
        methods: Sequence[str] = ("gradcam",),
        target: str | None = None,
        select: Selected | None = None,
        device: str | None = None,
    ) -> Results[ExplainedPicture]:
        """Compute class activation maps of pictures: files, folders of them, PIL's or numpy's, one or several.

        By each of `methods`, see `fgvc explain`: maps of the class `target`, by default of the one that each picture is taken
        for. `select`, `device`: as in `evaluate`.
        """
        names = tuple(dict.fromkeys(map(method_name, methods)))
        with open_explainer(load_run(self.folder, select), names, device=device) as explainer:
            return explain_pictures(explainer, images, target=target)

    @property
    def facts(self) -> Mapping[str, object]:
        size = " x ".join(map(str, self.recipe.image.size))
        of = {"": self.folder, "net": f"{self.recipe.model.name} at {size}", "classes": len(self.classes)}
        if (result := floor_comparison(self.folder, self.recipe)) is None:
            return {**of, **self.history.facts}
        pair = result.pair
        gain = f"{100 * pair.gain:+.2f} points, 95 % interval {100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
        return of | {"validation top-1": f"{100 * pair.b_right.mean():.2f} %", "over its floor": gain}

    def _repr_html_(self) -> str:
        charts = curves([self.folder.name], [self.history])
        return Display._repr_html_(self) + "".join(figure([chart.address], chart.title, side=300) for chart in charts)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: StrPath) -> Path:
        """A file or folder of the run."""
        return self.folder / name
