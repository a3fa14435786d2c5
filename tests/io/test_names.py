"""Names as users have them: long, equal, with line breaks, not UTF-8."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from timm.utils.misc import natural_key

from fgvc.errors import FgvcError
from fgvc.io.names import distinct_names, label_differences, one_line, refuse_breaking, result_names, sort_order_remark


def test_names_of_results_never_collide() -> None:
    files = [Path(name) for name in ("a/x.jpg", "b/x.jpg", "a/X.png", "a/x-2.jpg", "c/x.jpg", "y.jpg")]
    names = result_names(files)
    assert names == ["x", "x-2", "X-3", "x-2-2", "x-4", "y"]
    assert len({name.casefold() for name in names}) == len(files)


def test_names_of_results_fit_a_file_system_and_are_text(tmp_path: Path) -> None:
    files = [Path("叶" * 83 + ".png"), Path("叶" * 82 + "子.png"), Path(os.fsdecode(b"caf\xe9.png"))]
    names = result_names(files)
    assert names == ["叶" * 66, "叶" * 66 + "-2", "caf\N{REPLACEMENT CHARACTER}"]
    for name in names:
        (tmp_path / f".4194304.{name}.npz").write_bytes(b"")


def test_one_line_stays_one_and_one_column() -> None:
    assert one_line(Path("a\tb/c\nd\x1b[2J\u2028.png")) == r"a\tb/c\nd\x1b[2J\u2028.png"
    assert one_line(os.fsdecode(b"caf\xe9")) == r"caf\udce9"
    assert one_line("麻雀 ä b") == "麻雀 ä b"


def test_folders_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert distinct_names([Path("runs/a/plain"), Path("runs/b/plain")]) == ["a/plain", "b/plain"]
    assert distinct_names([Path("x/plain"), Path("x/dcl")]) == ["plain", "dcl"]
    assert distinct_names([Path("p/a/run"), Path("q/a/run"), Path("q/b/run")]) == ["p/a/run", "q/a/run", "q/b/run"]
    monkeypatch.chdir(tmp_path)
    assert distinct_names([Path()]) == [tmp_path.name]


@pytest.mark.parametrize("name", ["leaf\nrust", "leaf\trust", "leaf\x1b[31m", "leaf\u2029", "leaf\udce9"])
def test_classes_whose_names_break_lines_are_refused(name: str) -> None:
    with pytest.raises(FgvcError, match=r"labels\.json: the class 'leaf.*rename it"):
        refuse_breaking(["fine", name], where=Path("labels.json"))


def test_other_names_of_classes_are_taken() -> None:
    refuse_breaking(["Kälte  麻雀\u3000é", 'a "b" <i>, c;', "\N{SNOWMAN}"], where=Path("x"))


def test_outputs_that_mean_other_classes_are_named() -> None:
    assert label_differences(("a", "b"), ["a", "b"]) == []
    (turned,) = label_differences(["a", "b", "c"], ["c", "b", "a"])
    assert turned == "labels: 2 of 3 outputs mean another class, the first of them output 0: 'a' against 'c'"
    (other,) = label_differences(["a", "b"], ["b", "c", "d"])
    assert other == "labels: 2 classes against 3; those that the other lacks: a against c, d"
    (subset,) = label_differences(["a", "b"], ["a"])
    assert subset.endswith("those that the other lacks: b against none")
    numbers = [str(n) for n in range(1, 13)]
    (sorted_apart,) = label_differences(sorted(numbers), numbers)
    assert "output 1: '10' against '2'" in sorted_apart
    assert "sorted as text (1, 10, 11, 12, 2, ...)" in sorted_apart


@pytest.mark.parametrize(
    "names", [["1", "10", "11", "2"], ["leaf 9", "leaf 10"], ["b", "a10", "a9"], ["Aphid", "Rust", "blight"]]
)
def test_a_remark_says_where_timm_would_sort_otherwise(names: list[str]) -> None:
    as_text, as_timm = sorted(names), sorted(names, key=natural_key)
    assert "sorted as text" in sort_order_remark(as_text)
    assert ", ".join(as_timm) in sort_order_remark(as_text)
    assert "sorted by number" in sort_order_remark(as_timm)


def test_an_order_of_ones_own_gives_no_remark() -> None:
    assert sort_order_remark(["2", "10", "1"]) == ""


def test_names_that_sort_alike_everywhere_give_no_remark() -> None:
    assert sort_order_remark(["001.Albatross", "002.Auklet", "010.Bunting"]) == ""
    assert sort_order_remark(["healthy", "phoma", "rust"]) == ""
    assert sort_order_remark([]) == ""
