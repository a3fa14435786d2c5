"""Rounds of erasing: what is masked, when, and what is left after a kill between or inside rounds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.techniques.ae_psl.rounds import GRID, MaskRounds
from fgvc.techniques.ae_psl.settings import AePslSettings
from fgvc.techniques.ae_psl.technique import AePsl
from fgvc.techniques.api import EpochStart
from fgvc.techniques.registry import build_technique
from fgvc.training import trainer

ROWS = np.array([1, 2, 4, 7])


def corner(rows: NDArray[np.int64], method: str, change, size: int) -> Iterator[tuple]:
    """A network that always looks at the upper left cell of a 4 x 4 map of what is not erased yet; row 4 is unreadable."""
    for row in rows:
        part = np.array([row])
        images = change(torch.ones(1, 3, 64, 64), part)[:, 0]
        blocks = torch.nn.functional.avg_pool2d(images[:, None], 16)[0, 0]
        maps = torch.zeros(1, 4, 4)
        maps.view(-1)[int(blocks.flatten().argmax())] = 1.0
        fine = maps.repeat_interleave(16, 1).repeat_interleave(16, 2)
        yield part, np.array([row != 4]), fine if row != 4 else fine[:0]


def start(folder: Path, number: int, losses: list[float], maps=corner, **changed: object) -> EpochStart:
    facts = EpochStart(
        number=number, epochs=6, fresh=True, seed=0, folder=folder, images=9, rows=ROWS, losses=losses,
        colour=(9, 8, 7), maps=maps, first=lambda do: do(), say=lambda text: None,
    )  # fmt: skip
    return replace(facts, **changed)


def technique(**settings: object) -> AePsl:
    settings = {"rounds": 3, "region": {"value": 0.8, "area": (0.0, 0.2)}} | settings
    return build_technique(AePslSettings.model_validate(settings))


def erased(psl: AePsl, row: int) -> NDArray[np.bool_]:
    image = psl.on_sample(np.full((64, 32, 3), 200, dtype=np.uint8), row)
    mask = (image == np.array([9, 8, 7])).all(2)
    assert (mask | (image == 200).all(2)).all()
    return mask


def test_every_round_adds_what_the_network_looks_at_now(tmp_path: Path) -> None:
    psl = technique()
    psl.before_epoch(start(tmp_path, 0, []))
    assert not erased(psl, 1).any()
    psl.before_epoch(start(tmp_path, 2, [1.0, 1.0]))
    first = erased(psl, 1)
    assert first[:16, :8].all()
    assert first.sum() == 16 * 8, "one of 4 x 4 cells, stretched over the image"
    psl.before_epoch(start(tmp_path, 4, [1.0, 1.0, 1.0, 1.0]))
    second = erased(psl, 1)
    assert (first & ~second).sum() == 0
    assert second.sum() == 2 * first.sum(), "what was erased can't be looked at again"
    assert not erased(psl, 4).any(), "unreadable"
    assert not erased(psl, 3).any(), "not of the training split"


def test_empty_maps_are_counted_and_erase_nothing(tmp_path: Path) -> None:
    def silent(rows: NDArray[np.int64], *others: object) -> Iterator[tuple]:
        for part, readable, maps in corner(rows, *others):
            yield part, readable, maps * float(part[0] == 1)

    lines: list[str] = []
    psl = technique()
    psl.before_epoch(start(tmp_path, 2, [1.0, 1.0], maps=silent, say=lines.append))
    assert [erased(psl, row).any() for row in ROWS.tolist()] == [True, False, False, False]
    assert any("2 maps were empty" in line for line in lines), "row 4 is unreadable, which is no empty map"


def test_all_rounds_together_stay_within_the_cap_and_some_images_are_spared(tmp_path: Path) -> None:
    psl = technique(largest=0.1)
    (tmp_path / "cap").mkdir()
    for epoch in (2, 4):
        psl.before_epoch(start(tmp_path / "cap", epoch, [1.0] * epoch))
    assert int(0.1 * GRID**2) == psl._masks.grids(2, ROWS[:1]).sum()
    (tmp_path / "half").mkdir()
    psl = technique(probability=0.5)
    many = np.arange(400)
    psl.before_epoch(start(tmp_path / "half", 2, [1.0, 1.0], rows=many[many != 4], images=400))
    assert 0.4 < np.mean([psl._masks.grids(1, many[many != 4]).any((1, 2))]) < 0.6


def test_the_rounds_stop_where_the_loss_no_longer_comes_down(tmp_path: Path) -> None:
    psl = technique(rounds=6, stop=1.5)
    losses = [1.0, 1.2, 1.6, 1.0, 1.0]  # the third round ends above 1.5
    assert [psl._round_of(start(tmp_path, number, losses[:number])) for number in range(6)] == [0, 1, 2, 2, 2, 2]
    assert technique(rounds=6, stop=None)._round_of(start(tmp_path, 5, losses)) == 5


def test_a_kill_inside_a_round_costs_only_what_was_not_written(tmp_path: Path) -> None:
    computed_rows: list[int] = []

    def dying(rows, method, change, size):
        for number, chunk in enumerate(corner(rows, method, change, size)):
            if number == 2:
                raise KeyboardInterrupt
            yield chunk

    def counting(rows, method, change, size):
        computed_rows.extend(rows.tolist())
        return corner(rows, method, change, size)

    with pytest.raises(KeyboardInterrupt):
        technique().before_epoch(start(tmp_path, 2, [1.0, 1.0], dying))
    assert not MaskRounds(tmp_path / "masks").path(1).is_file()
    psl = technique()
    psl.before_epoch(start(tmp_path, 2, [1.0, 1.0], counting))
    assert computed_rows == [4, 7], "the first two were done"
    (tmp_path / "whole").mkdir()
    whole = technique()
    whole.before_epoch(start(tmp_path / "whole", 2, [1.0, 1.0]))
    np.testing.assert_array_equal(psl._masks.grids(1, ROWS), whole._masks.grids(1, ROWS))
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {"round-1.npy", "rounds.json"}


def test_masks_that_are_gone_in_mid_round_are_an_error_with_a_name(tmp_path: Path) -> None:
    psl = technique()
    psl.load_state_dict({"round": 1})
    with pytest.raises(FgvcError, match=r"round-1\.npy: the masks of this round are gone"):
        psl.before_epoch(start(tmp_path, 2, [1.0, 1.0], fresh=False))


DAMAGE = {
    "gone": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "a bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_masks_are_written_anew_in_mid_round(tmp_path: Path, kind: str) -> None:
    psl = technique()
    psl.before_epoch(start(tmp_path, 2, [1.0, 1.0]))
    masks, state = psl._masks.grids(1, ROWS), psl.state_dict()
    DAMAGE[kind](tmp_path / "masks" / "round-1.npy")
    lines: list[str] = []
    for fresh in (False, True):
        again = technique()
        again.load_state_dict(state)
        again.before_epoch(start(tmp_path, 3, [1.0] * 3, fresh=fresh, say=lines.append))
        np.testing.assert_array_equal(again._masks.grids(1, ROWS), masks)
    assert len(lines) == 1
    assert "round-1.npy: gone or damaged" in lines[0]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_round_that_nobody_trained_with_is_made_anew(tmp_path: Path, kind: str) -> None:
    psl = technique()
    psl.before_epoch(start(tmp_path, 2, [1.0, 1.0]))
    masks = psl._masks.grids(1, ROWS)
    DAMAGE[kind](tmp_path / "masks" / "round-1.npy")
    again = technique()
    again.before_epoch(start(tmp_path, 2, [1.0, 1.0]))
    np.testing.assert_array_equal(again._masks.grids(1, ROWS), masks)


def test_a_torn_line_of_a_killed_round_is_made_anew_and_those_of_another_net_do_not_count(tmp_path: Path) -> None:
    rounds, computed_rows = MaskRounds(tmp_path), []

    def erase(rows: NDArray[np.int64]) -> Iterator[tuple]:
        computed_rows.append(rows.tolist())
        for row in rows:
            yield np.array([row]), np.full((1, GRID, GRID), row % 2 == 0)

    def dying(rows: NDArray[np.int64]) -> Iterator[tuple]:
        yield from list(erase(rows))[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rounds.make(1, epoch=4, images=9, rows=ROWS, erase=dying)
    partial = tmp_path / "round-1.partial"
    partial.write_bytes(partial.read_bytes()[:-20])
    rounds.make(1, epoch=4, images=9, rows=ROWS, erase=erase)
    assert computed_rows == [ROWS.tolist(), ROWS.tolist()[2:]]
    assert rounds.grids(1, np.arange(9)).any((1, 2)).tolist() == [row in (2, 4) for row in range(9)]
    with pytest.raises(KeyboardInterrupt):
        rounds.make(1, epoch=4, images=9, rows=ROWS, erase=dying)
    rounds.make(1, epoch=5, images=9, rows=ROWS, erase=erase)
    assert computed_rows[-1] == ROWS.tolist()
    assert rounds.whole(1, epoch=5) is not None
    assert rounds.whole(1, epoch=4) is None


def test_a_round_that_was_reached_stays_whatever_becomes_of_the_schedule(tmp_path: Path) -> None:
    psl = technique()
    for round_, epoch in ((1, 4), (2, 5)):
        psl.before_epoch(start(tmp_path, epoch, [1.0] * epoch))
        assert psl.state_dict()["round"] == round_, "one at a time, though both are due"
    longer = technique()
    longer.load_state_dict(psl.state_dict())
    longer.before_epoch(start(tmp_path, 4, [1.0] * 4, epochs=60))
    assert longer.state_dict()["round"] == 2, "by the new schedule it would be the first"
    shorter = technique()
    shorter.before_epoch(start(tmp_path / "none", 2, [1.0] * 2, epochs=3, fresh=False))
    assert shorter.state_dict() == {"round": 0}, "in mid-epoch no round begins"


def test_more_rounds_than_epochs_are_refused(recipe_tree: dict) -> None:
    with pytest.raises(
        FgvcError, match=r"techniques\.ae_psl\.rounds: 3 rounds need as many epochs; train\.epochs is 2"
    ):
        validate(Recipe, recipe_tree | {"techniques": {"ae_psl": {}}}, where="test")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_real_run_erases_where_the_network_looked(tmp_path: Path, recipe_tree: dict, workers: int) -> None:
    train = recipe_tree["train"] | {"epochs": 2, "workers": workers}
    tree = recipe_tree | {"train": train, "image": {"size": 64}, "techniques": {"ae_psl": {"rounds": 2}}}
    run = trainer.train(validate(Recipe, tree, where="test"), tmp_path / "run")
    rounds = MaskRounds(run / "masks")
    index = np.arange(48 + 12 + 12)
    grids = rounds.grids(1, index)
    assert grids.any((1, 2)).sum() > 24, "most of the 48 training images"
    assert grids.mean((1, 2)).max() <= 0.2
    losses = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    again = trainer.train(validate(Recipe, tree | {"train": train | {"workers": 0}}, where="test"), tmp_path / "again")
    assert losses == [line.split(",") for line in (again / "metrics.csv").read_text().splitlines()], (
        "workers see the masks"
    )


def test_errors_of_the_images_get_out_of_offline_maps() -> None:
    import timm

    from fgvc.models.cam.offline import offline_maps

    def images() -> Iterator[tuple]:
        raise IndexError("row 7")
        yield

    with pytest.raises(IndexError, match="row 7"):
        list(offline_maps(timm.create_model("test_resnet"), images(), "GradCAM"))


def test_images_that_came_later_move_no_memory_of_an_image(tmp_path: Path, recipe_tree: dict) -> None:
    root = tmp_path / "data"
    shutil.copytree(recipe_tree["data"]["root"], root)
    tree = recipe_tree | {"data": {"kind": "folder", "root": str(root)}, "image": {"size": 64}}
    for kind, settings in {"ae_psl": {"rounds": 2}, "cam_erasing": {"source": "previous_epoch"}, "cutout": {}}.items():
        part = tree | {"techniques": {kind: settings}}
        short = validate(Recipe, part | {"train": recipe_tree["train"] | {"max_steps": 2}}, where="test")
        trainer.train(short, tmp_path / kind)
        copy = next((root / "train").rglob("*.png")).with_name("0new.png")
        shutil.copy(next((root / "train").rglob("*.png")), copy)
        recipe = validate(Recipe, part, where="test")
        with pytest.raises(FgvcError, match=r"1 added: train/\w+/0new\.png"):
            trainer.train(recipe, tmp_path / kind)
        trainer.train(recipe, tmp_path / kind, recorded=True)
        copy.unlink()
        trainer.train(recipe, tmp_path / f"{kind}-whole")
        a, b = (tmp_path / name / "ckpt/last/net.safetensors" for name in (kind, f"{kind}-whole"))
        assert a.read_bytes() == b.read_bytes(), kind


def test_offline_maps_leave_the_net_as_it_was() -> None:
    import timm

    from fgvc.models.cam.offline import offline_maps

    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=3, drop_rate=0.5).train()
    next(net.parameters()).requires_grad_(False)
    frozen = [p.requires_grad for p in net.parameters()]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x, y = torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2])
    ((rows, maps),) = offline_maps(net, [(x, y, np.arange(3))], "GradCAM")
    assert rows.tolist() == [0, 1, 2]
    assert maps.shape == (3, 64, 64)
    assert float(maps.min()) >= 0
    assert float(maps.max()) <= 1
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == frozen
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
