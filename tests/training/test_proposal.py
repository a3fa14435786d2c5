"""A recipe that is proposed for images: by how many, how large, and what a step takes here."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from fgvc.cli.app import main
from fgvc.config.recipe import Recipe
from fgvc.data.recipe import load_recipe
from fgvc.errors import FgvcError
from fgvc.io.files import as_json
from fgvc.training import proposal
from fgvc.training.forecast import Forecast


def costs(recipe: Recipe, seconds: float) -> Forecast:
    train = recipe.train.model_copy(update={"batch_size": 16, "precision": "bf16"})
    return Forecast(
        recipe=recipe.model_copy(update={"train": train}),
        images={}, steps=100, forwards=1, parameters=1, step_seconds=1, hours=1,
        parts={"start-up": 20.0, "training": seconds - 60, "validation": 10.0, "export": 30.0}, peak_bytes=1, techniques={},
        notes=("train.precision: bf16, the faster", "doubt"),
    )  # fmt: skip


def leaves(folder: Path, *, sides: tuple[int, int] = (200, 170), each: int = 8) -> Path:
    for name in ("oak", "ash"):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.effect_noise(sides, 90 + number).convert("RGB").save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two nets are within reach, the second one slower."""
    nets = []
    for name in ("test_efficientnet", "test_resnet"):
        weights = tmp_path / f"{name}.safetensors"
        save_file(timm.create_model(name).state_dict(), weights)
        Path(f"{weights}.json").write_text(as_json({"mean": [0.5] * 3, "std": [0.25] * 3}))
        nets.append((name, str(weights)))
    monkeypatch.setattr(proposal, "within_reach", lambda images: nets)


def test_counts_sizes_and_time_make_a_recipe(
    reach: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def by_backbone(recipe: Recipe) -> Forecast:
        return costs(recipe, 9000 if recipe.model.backbone == "test_resnet" else 600)

    monkeypatch.setattr(proposal, "forecast", by_backbone)
    data, out = leaves(tmp_path / "leaves"), tmp_path / "my.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["init", "--data", str(data), str(out)])
    assert not ended.value.code
    recipe = load_recipe(out)
    assert (recipe.data.kind, recipe.data.root) == ("folder", data)
    assert recipe.model.backbone == "test_efficientnet"  # the other would take too long
    train = recipe.train
    assert (recipe.image.size, train.epochs, train.batch_size, train.precision) == ((160, 160), 12, 16, "bf16")
    assert recipe.ema is not None
    assert recipe.ema.decay == 0.95
    printed = capsys.readouterr()
    assert "image.size: 160, of pictures whose shorter side has 170 pixels" in printed.out
    assert "about 10 min on this machine, from the start to the bundle" in printed.out
    assert f"next: fgvc train {out}" in printed.err
    head = out.read_text().splitlines()
    assert head[0].startswith("# yaml-language-server: $schema=file://")
    assert any("train.precision: bf16, the faster" in line for line in head[:20])


def test_what_takes_too_long_gets_smaller(reach: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_pixels(recipe: Recipe) -> Forecast:
        return costs(recipe, 60 + 9_000 * recipe.train.epochs / 12 * recipe.image.size[0] ** 2 / 160**2)

    monkeypatch.setattr(proposal, "forecast", by_pixels)
    proposed = proposal.propose(leaves(tmp_path / "leaves"))
    assert proposed.tree["image"]["size"] == 96
    assert proposed.tree["train"]["epochs"] == 12
    assert proposed.forecast.seconds <= proposal.BUDGET * 1.05
    assert "since 12 epochs at 160 would take about 2 h 30 min here" in " ".join(proposed.reasons)


def test_where_no_size_is_small_enough_epochs_are_fewer() -> None:
    slow = costs(Recipe.model_validate({"data": {"root": "x"}, "model": {"backbone": "resnet18"}}), 60 + 60_000)
    chosen, _ = proposal.within_budget(slow, size=224, epochs=12)
    assert chosen["image.size"] == 160
    a_run = 60_000 * chosen["train.epochs"] / 12 * (160 / 224) ** 2
    assert chosen["train.epochs"] == proposal.FEWEST_EPOCHS or a_run <= proposal.BUDGET


@pytest.mark.parametrize(
    ("images", "epochs"), [(10, 12), (5000, 12), (10_000, 6), (100_000, 3)]
)
def test_a_large_set_has_fewer_epochs(images: int, epochs: int) -> None:
    assert proposal.epochs_for(images) == epochs


def test_a_short_run_has_a_short_average() -> None:
    assert [proposal.decay_for(steps) for steps in (39, 96, 280, 10**6)] == [0.9, 0.948, 0.982, 0.999]


def test_sizes_are_those_that_the_pictures_fill() -> None:
    assert [proposal.size_for([side])[0] for side in (40, 100, 159, 224, 3000)] == [96, 96, 160, 224, 224]
    assert proposal.size_for([])[0] == 224


def test_a_folder_that_is_no_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FgvcError, match="not there"):
        proposal.propose(tmp_path / "nowhere")
