"""Runs and bundles as objects: whatever names a recipe, a picture or a folder will do, and each result is one line."""

from __future__ import annotations

from html.parser import HTMLParser
from inspect import isfunction
from os import PathLike
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

import fgvc
from fgvc import api
from fgvc.api.recipes import as_recipe
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError, ImageError
from fgvc.images.decode import decode
from fgvc.io.display import table
from fgvc.runtime.engine import Answer, Engine, Prediction
from tests.trained import Once

TINY = {
    "model": {"backbone": "test_efficientnet", "weights": "none"},
    "image": {"size": 64},
    "train": {"max_steps": 2, "batch_size": 8, "workers": 0, "device": "cpu"},
    "export": {"exporter": "torchscript"},
}


@pytest.fixture(scope="module")
def folder(once: Once, colours: Path) -> Path:
    """A folder with a run of classes of one colour, and its bundle."""

    def fill(place: Path) -> None:
        fgvc.train(colours, place / "run", **TINY).export()

    return once.made("api-objects", fill)


@pytest.fixture
def run(folder: Path) -> fgvc.Run:
    return fgvc.Run(folder / "run")


@pytest.fixture
def bundle(folder: Path) -> fgvc.Bundle:
    return fgvc.Bundle(str(folder / "run" / "bundle"))


def test_a_folder_of_classes_an_id_and_a_recipe_train_alike(colours: Path, run: fgvc.Run, tmp_path: Path) -> None:
    by_id = fgvc.train("any/plain", str(tmp_path / "id"), data={"root": str(colours)}, **TINY)
    dotted = fgvc.train(by_id.recipe, tmp_path / "again", **{"train.max_steps": 1})
    assert run.recipe == by_id.recipe
    assert dotted.recipe.train.max_steps == 1
    assert dotted.recipe.model_copy(update={"train": run.recipe.train}) == run.recipe
    assert (run / "metrics.csv").read_bytes() == (by_id / "metrics.csv").read_bytes()


def test_what_cannot_be_trained_is_told_what_it_is(folder: Path, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match="it is a run of fgvc"):
        fgvc.train(folder / "run", tmp_path / "r")
    with pytest.raises(FgvcError, match="it is a bundle"):
        fgvc.train(folder / "run/bundle", tmp_path / "r")
    with pytest.raises(FgvcError, match="override 'train.epoch=3'.*did you mean 'epochs'"):
        fgvc.train(colours, tmp_path / "r", train={"epoch": 3})
    with pytest.raises(FgvcError, match="a setting is text, a number"):
        fgvc.train(colours, tmp_path / "r", train={"epochs": object()})
    with pytest.raises(FgvcError, match="has no name to call its run by"):
        fgvc.train(fgvc.Run(folder / "run").recipe)
    assert not list(tmp_path.iterdir())


def test_a_run_by_default_lies_in_runs_under_its_name(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = fgvc.train(colours, **TINY, **{"train.max_steps": 1}).folder
    assert folder == Path("runs") / colours.name
    assert (tmp_path / folder / "config.yaml").is_file()


def test_paths_pil_and_numpy_are_answered_alike(bundle: fgvc.Bundle, colours: Path) -> None:
    """By the engine's own answers of the decoded file."""
    path = sorted((colours / "test").rglob("*.png"))[0]
    picture = decode(path)
    (expected,) = Engine(bundle).classify([picture], top_k=3)
    several = [str(path), path, picture, Image.open(path), np.asarray(picture)]
    answers = bundle.predict(several, top_k=3)
    assert [answer.predictions for answer in answers] == [expected.predictions] * len(several)
    assert [bundle.predict(one, top_k=3)[0].predictions for one in several] == [expected.predictions] * len(several)
    assert bundle.predict(np.stack([np.asarray(picture)] * 2), top_k=3)[1].predictions == expected.predictions
    assert [answer.image for answer in answers] == [str(path), str(path), "picture 2", "picture 3", "picture 4"]
    assert answers[0].label == expected.predictions[0].label
    assert answers[0].probability == expected.predictions[0].probability


def test_a_folder_is_all_pictures_below_it(bundle: fgvc.Bundle, colours: Path) -> None:
    files = sorted(map(str, (colours / "test").rglob("*.png")))
    assert [answer.image for answer in bundle.predict(colours / "test")] == files
    assert bundle.predict([]) == ()


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (np.full((8, 8), 200, np.uint8), "L"),
        (np.dstack([np.full((8, 8, 3), 200, np.uint8), np.zeros((8, 8, 1), np.uint8)]), "RGBA"),
    ],
)
def test_grey_and_transparent_pixels_are_read_as_files_are(
    bundle: fgvc.Bundle, pixels: np.ndarray, mode: str, tmp_path: Path
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
    by_file, by_pixels, by_pil = bundle.predict([tmp_path / "a.png", pixels, Image.fromarray(pixels)])
    assert by_file.predictions == by_pixels.predictions == by_pil.predictions


def test_what_is_no_picture_is_refused_by_name(bundle: fgvc.Bundle, tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8 no")
    for given, message in (
        (tmp_path / "none.jpg", "none.jpg: no such file"),
        (tmp_path / "torn.jpg", "torn.jpg: not an image"),
        ([np.zeros((8, 8, 3), np.float32)], r"picture 0: pixels are uint8 .* not float32 \(8, 8, 3\)"),
        ([np.zeros((3, 8, 8), np.uint8)], r"picture 0: pixels are uint8 .* not uint8 \(3, 8, 8\)"),
        ([7], "picture 0: not a path, a PIL image or a numpy array, but int"),
    ):
        with pytest.raises((FgvcError, ImageError), match=message):
            bundle.predict(given)  # type: ignore[arg-type]


def test_explanations_of_a_run_and_of_its_bundle_agree(run: fgvc.Run, bundle: fgvc.Bundle, colours: Path) -> None:
    path = sorted((colours / "test").rglob("*.png"))[0]
    (ours,) = run.explain(path, methods=["cam"])
    (theirs,) = bundle.explain(decode(path))
    assert ours.label == theirs.label
    assert ours.probability == pytest.approx(theirs.probability, abs=1e-4)
    np.testing.assert_allclose(ours.raw, theirs.raw, atol=1e-4)
    assert ours.map.shape == ours.picture.size[::-1] == ours.overlay.size[::-1]
    other = next(name for name in run.classes if name != ours.label)
    assert [one.label for one in run.explain([path, path], target=other)] == [other, other]
    with pytest.raises(FgvcError, match="has no class"):
        run.explain(path, target="none")


def test_the_verbs_of_a_run_are_those_of_the_package(run: fgvc.Run, tmp_path: Path) -> None:
    scores = run.evaluate("test").scores
    np.testing.assert_array_equal(scores.confusion, api.evaluate(str(run.folder), "test").scores.confusion)
    page = run.report(tmp_path / "page.html", split="test", bundles=run.folder / "bundle", images=2)
    assert page.is_file()
    assert page._repr_html_().count("page.html") == 3
    assert fgvc.compare(run, str(run / "bundle"), split="test").paired.gain == 0


class _Html(HTMLParser):
    """Counts open tags: HTML that is cut would take what follows into it."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_result_is_one_line_and_a_table(
    run: fgvc.Run, bundle: fgvc.Bundle, colours: Path, tmp_path: Path
) -> None:
    """And its parts, for whoever prints one: none has the bytes of a network in it."""
    pictures = sorted((colours / "test").rglob("*.png"))[:2]
    recipe = api.load_recipe(run / "config.yaml")
    exported = run.export(tmp_path / "bundle")
    results = [
        run, run.history, recipe, bundle, exported, bundle.predict(pictures), bundle.predict(pictures)[0], bundle.predict([]),
        run.explain(pictures), run.explain(pictures)[0], run.evaluate("test"), run.evaluate("test").scores,
        fgvc.check(recipe), fgvc.forecast(recipe), fgvc.verify(bundle), fgvc.verify(exported, against=bundle),
        fgvc.compare(run, bundle, split="test"), fgvc.inspect(bundle.model),
        fgvc.interpolate(run, tmp_path / "half", share=0.5),
        fgvc.preview(recipe, tmp_path / "sheets", images=1), run.report(tmp_path / "page.html", split="test", images=1),
    ]  # fmt: skip
    for result in results:
        parser = _Html()
        parser.feed(result._repr_html_())  # type: ignore[attr-defined]
        assert parser.open == [], type(result)
        assert "<" in result._repr_html_() or result == ()  # type: ignore[attr-defined]
    comparison = fgvc.compare(run, bundle, split="test")
    inner = [
        exported.proven,
        exported.calibration,
        comparison.a,
        comparison.paired,
        comparison.images,
        results[10].calibrated,
    ]
    for each in [*results, *inner]:
        assert "\n" not in repr(each), type(each)
        assert len(repr(each)) < 1000, (type(each), repr(each)[:200])


def kinds_in(annotation: object) -> set[object]:
    """The classes in an annotation."""
    if isinstance(annotation, list):  # of the arguments of a Callable
        return set().union(*map(kinds_in, annotation))
    return {annotation}.union(*map(kinds_in, get_args(annotation)))


def test_whatever_takes_a_path_takes_text() -> None:
    public = [getattr(api, name) for name in api.__all__]
    verbs = [verb for verb in [*public, fgvc.Run.__init__, fgvc.Run.explain, fgvc.Bundle.__init__] if isfunction(verb)]
    hints = [
        (verb, name, kinds_in(hint))
        for verb in verbs
        for name, hint in get_type_hints(verb).items()
        if name != "return"
    ]
    assert len([kinds for *_, kinds in hints if {str, PathLike[str]} <= kinds]) > 30
    assert not [(verb.__name__, name) for verb, name, kinds in hints if Path in kinds and str not in kinds]


def test_html_of_names_is_text(tmp_path: Path) -> None:
    answer = Answer((Prediction("<b>beetle", 0, 0.9),), rejected=False, calibrated=True, image="a<i>.png")
    for html in (answer._repr_html_(), table([("<b>beetle",)], head=("<i>",))):
        assert "<b>" not in html
        assert "<i>" not in html


def test_settings_of_python_reach_the_recipe_as_they_are(colours: Path) -> None:
    settings = {
        "optim": {"lr": 1e-05}, "image": {"size": (64, 96)}, "techniques": {"mixup": {"alpha": 0.4}}, "ema": None,
        "data.val_fraction": 0.25, "cache_dir": Path("/tmp/a b: c"),
    }  # fmt: skip
    recipe = as_recipe(colours, {**TINY, **settings})
    assert recipe.optim.lr == 1e-05
    assert recipe.image.size == (64, 96)
    assert recipe.techniques.mixup.alpha == 0.4
    assert recipe.cache_dir == Path("/tmp/a b: c")
    assert recipe.ema is None
    assert as_recipe(recipe, {"ema": {"decay": 0.9}}).ema.decay == 0.9
    assert validate(Recipe, as_recipe(recipe).model_dump(mode="json"), where="test") == recipe
