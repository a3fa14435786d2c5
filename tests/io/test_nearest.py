"""The nearest name, by edit distance."""

from __future__ import annotations

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from fgvc.io.names import _edits, nearest

word = st.text("abc", max_size=6)


def by_definition(a: str, b: str) -> int:
    """The distance of optimal string alignment, from its recurrence."""

    @cache
    def d(i: int, j: int) -> int:
        if not (i and j):
            return i + j
        ways = [d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1])]
        if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
            ways.append(d(i - 2, j - 2) + 1)
        return min(ways)

    return d(len(a), len(b))


@given(word, word)
def test_edits_are_those_of_the_recurrence(a: str, b: str) -> None:
    assert _edits(a, b) == by_definition(a, b) == _edits(b, a)


def test_the_nearest_is_named_and_none_where_all_are_far() -> None:
    names = ["resnet18", "resnet50", "resnetv2_50", "tf_efficientnet_lite0", "vit_tiny"]
    assert nearest("resnet5", names) == ["resnet50"]
    assert nearest("ResNet-50", names, 3) == ["resnet50", "resnet18", "resnetv2_50"]
    assert nearest("tf_efficientnet_lite_0", names) == ["tf_efficientnet_lite0"]
    assert nearest("convnext", names) == []
