"""Study files: a base recipe, arms that change it, seeds and a budget; and the runs that follow from them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from fgvc.config.loading import leaves, load, merge, override, recipe_tree, section, validate
from fgvc.config.recipe import Recipe
from fgvc.config.section import Section
from fgvc.config.shipped import recipe_file
from fgvc.config.training import Train
from fgvc.data.recipe import resolve_data
from fgvc.errors import FgvcError
from fgvc.studies.table import FLOOR

Budget = Literal["epochs", "seconds", "own"]
Fold = tuple[int, int]  # which of how many
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+_=-]*")  # of an arm: it names a folder


class Study(Section):
    """A study's settings. The first arm is the base: every other is compared with it, seed by seed."""

    base: str = Field(description="a recipe: a file, from the study's folder, or the id of one that comes with fgvc")
    settings: dict[str, Any] = Field(
        {}, description="of all arms, over the base recipe's: sections, or dotted keys such as optim.lr"
    )
    seeds: tuple[int, ...] = Field(
        (0, 1, 2), min_length=1, description="each trains every arm once; arms are paired by it"
    )
    folds: tuple[tuple[int, ...], int] | None = Field(
        None,
        description="5: every run is repeated for each of 5 folds of train, which it validates on and does not learn from (as "
        "data.fold: by whole groups where there are groups), and the answers of all folds are pooled; [[0, 1], 5]: for folds 0 "
        "and 1 alone; null: the data's one validation split",
    )
    budget: tuple[Budget, ...] = Field(
        ("epochs",),
        min_length=1,
        description="epochs: all arms train for as many as the base arm; seconds: for as long as the base arm, by the measured "
        "costs of their steps; own: for as many epochs as they say. Several make a table each",
    )
    arms: dict[str, tuple[dict[str, Any], ...]] = Field(
        min_length=1,
        description="name -> settings over all of the above, or a list of them: trials, of which validation chooses one",
    )
    localise: bool = Field(True, description="where the data have boxes, measure where the runs look")

    @field_validator("budget", mode="before")
    @classmethod
    def _several(cls, budget: object) -> object:
        return (budget,) if isinstance(budget, str) else budget

    @field_validator("folds", mode="before")
    @classmethod
    def _all(cls, folds: object) -> object:
        return (tuple(range(folds)), folds) if isinstance(folds, int) else folds

    @field_validator("folds")
    @classmethod
    def _of_several(cls, folds: tuple[tuple[int, ...], int] | None) -> tuple[tuple[int, ...], int] | None:
        if folds is None:
            return None
        numbers, count = folds
        if count < 2 or not numbers or len(set(numbers)) < len(numbers) or not 0 <= min(numbers) <= max(numbers) < count:
            raise ValueError("how many there are, 2 or more, or [numbers, how many], such as 5 or [[0, 1], 5]; each number once")
        return folds

    @property
    def each_fold(self) -> tuple[Fold | None, ...]:
        """Values of `data.fold` in turn; None: the recipe's."""
        return (None,) if self.folds is None else tuple((number, self.folds[1]) for number in self.folds[0])

    @field_validator("seeds", "budget")
    @classmethod
    def _distinct(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(values)) < len(values):
            raise ValueError("each once")
        return values

    @field_validator("arms", mode="before")
    @classmethod
    def _trials(cls, arms: object) -> object:
        if not isinstance(arms, Mapping):
            return arms
        for name in arms:
            if not NAME.fullmatch(str(name)):
                raise ValueError(f"{name!r}: a name of letters, digits, + - _ =, since it names a folder")
            if name == FLOOR:
                raise ValueError(f"{name!r}: is the line of the logistic regression on the frozen net; choose another name")
        return {str(name): trials if isinstance(trials, list) else [trials or {}] for name, trials in arms.items()}

    @field_validator("arms")
    @classmethod
    def _some(cls, arms: dict[str, tuple[dict[str, Any], ...]]) -> dict[str, tuple[dict[str, Any], ...]]:
        if empty := [name for name, trials in arms.items() if not trials]:
            raise ValueError(f"{empty[0]}: no trial; give settings, {{}} for none")
        return arms


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting of an arm; its recipe has the base's seed, the study's first fold and its own epochs."""

    arm: str
    number: int  # from 1
    settings: Mapping[str, Any]  # dotted key -> value, over what all arms share
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of its runs. An arm's first trial has the arm's name, so that more trials may follow."""
        return self.arm if self.number == 1 else f"{self.arm}.{self.number}"

    @property
    def overrides(self) -> str:
        """Text of its settings, much as the command line takes them."""
        return " ".join(f"{key}={json.dumps(value, default=str)}" for key, value in self.settings.items())

    def run_recipe(self, epochs: int, seed: int, fold: Fold | None) -> Recipe:
        """Make the recipe of one run."""
        train = self.recipe.train.model_copy(update={"epochs": epochs, "seed": seed})
        data = self.recipe.data if fold is None else self.recipe.data.model_copy(update={"fold": fold})
        tree = self.recipe.model_copy(update={"train": train, "data": data}).model_dump(mode="json")
        return resolve_data(validate(Recipe, tree, where=f"arm {self.name}, {epochs} epochs"))  # some settings go with a length


@dataclass(frozen=True, slots=True)
class Plan:
    """A study as it was read, with its trials' valid recipes."""

    path: Path
    study: Study
    overrides: tuple[str, ...]  # of the command line
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def base(self) -> Trial:
        return self.trials[0]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study. Budgets that give a trial as many epochs share it."""

    trial: Trial
    epochs: int
    seed: int
    fold: Fold | None
    budgets: tuple[Budget, ...]

    @property
    def name(self) -> str:
        fold = "" if self.fold is None else f"-f{self.fold[0]}of{self.fold[1]}"
        return f"{self.trial.name}-{self.epochs}e-s{self.seed}{fold}"

    @property
    def recipe(self) -> Recipe:
        return self.trial.run_recipe(self.epochs, self.seed, self.fold)


def read_study(path: Path, overrides: Iterable[str] = ()) -> Plan:
    """Read a study, with `section.key=value` over the base recipe and under the arms' own settings.

    Raises FgvcError naming the study's file and arm for what is no valid recipe.
    """
    study = load(Study, path)
    beside = path.parent / study.base
    shared = recipe_tree(Recipe, beside if beside.is_file() else recipe_file(study.base)).tree
    merge(shared, study.settings)
    override_texts = tuple(overrides)
    for text in override_texts:
        override(shared, text)
    trials = []
    for arm, settings in study.arms.items():
        for number, trial_settings in enumerate(settings, 1):
            tree = copy.deepcopy(shared)
            merge(tree, trial_settings)
            if study.folds is not None:
                if section(tree, ("data",)).get("fold") is not None:
                    raise FgvcError(f"{path}: arms.{arm}: data.fold says what validates, as the study's folds do; leave it out")
                merge(tree, {"data.fold": study.each_fold[0]})
            recipe = resolve_data(validate(Recipe, tree, where=f"{path}: arms.{arm}", overrides=override_texts))
            if not recipe.train.settled:
                raise FgvcError(
                    f"{path}: arms.{arm}: train.batch_size and train.precision may not be auto in a study, whose arms differ in "
                    "what they say alone; give values"
                )
            # An epoch that validation chose is judged too well by it: the more epochs, the better.
            ends = recipe.model_copy(update={"select": recipe.select or recipe.end})
            trials.append(Trial(arm, number, dict(leaves(trial_settings)), ends))
    plan = Plan(path, study, override_texts, tuple(trials))
    _refuse_incomparable(plan)
    return plan


def cells(plan: Plan, epochs: Mapping[tuple[str, Budget], int]) -> list[Cell]:
    """List the runs of all trials that have `epochs` under a budget, seed by seed and fold by fold, so that every arm has one
    before any has two."""
    runs = []
    for seed, fold, trial in product(plan.study.seeds, plan.study.each_fold, plan.trials):
        lengths: dict[int, list[Budget]] = {}
        for budget in plan.study.budget:
            if (trial.name, budget) in epochs:
                lengths.setdefault(epochs[trial.name, budget], []).append(budget)
        runs += [Cell(trial, length, seed, fold, tuple(budgets)) for length, budgets in lengths.items()]
    return runs


def _refuse_incomparable(plan: Plan) -> None:
    """Raise FgvcError where arms have other data or another graph: they are compared image by image under one graph."""
    first = plan.base.recipe
    for trial in plan.trials:
        for key in ("data", "deploy", "export"):
            if getattr(trial.recipe, key) != getattr(first, key):
                raise FgvcError(
                    f"{plan.path}: arms.{trial.arm}: {key} differs from the base arm's; give it in settings"
                )
        if (trial.recipe.select == "best") != (first.select == "best"):
            raise FgvcError(
                f"{plan.path}: arms.{trial.arm}: select: best lets validation choose an epoch, in all arms or in none"
            )
        nets = [(recipe.model.backbone, recipe.model.onnx, recipe.image.size) for recipe in (trial.recipe, first)]
        if nets[0] != nets[1]:
            key = "model.backbone" if first.model.onnx is None else "model.onnx"
            raise FgvcError(
                f"{plan.path}: arms.{trial.arm}: another graph than the base arm's ({key}, image.size); a study has one"
            )
        if trial.recipe.train.epochs != first.train.epochs and plan.study.budget != ("own",):
            raise FgvcError(f"{plan.path}: arms.{trial.arm}: sets train.epochs, which goes with budget: own alone")
        if "train.seed" in trial.settings or trial.recipe.train.seed != Train().seed:
            raise FgvcError(f"{plan.path}: arms.{trial.arm}: sets train.seed; a study has seeds")
        if trial.recipe.train.refit:
            raise FgvcError(f"{plan.path}: arms.{trial.arm}: train.refit: a study compares; set it where you train what it chose")
        if trial.recipe.train.max_steps is not None:
            raise FgvcError(f"{plan.path}: arms.{trial.arm}: train.max_steps would break the budget; set train.epochs")
