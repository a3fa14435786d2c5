from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from fgvc.config.knots import Scheduled, value_at


class Holder(BaseModel):
    value: Scheduled


def test_a_number_is_itself_at_any_time() -> None:
    assert [value_at(Holder(value=0.3).value, progress) for progress in (0, 0.5, 1)] == [0.3] * 3


def test_knots_are_joined_by_straight_lines() -> None:
    value = Holder(value=[[0.2, 0], [0.4, 1], [1.0, 0.5]]).value
    values = [value_at(value, progress) for progress in (0, 0.2, 0.3, 0.4, 0.7, 1)]
    assert values == pytest.approx([0, 0, 0.5, 1, 0.75, 0.5])


@pytest.mark.parametrize(
    "wrong", [-1, [], [[0.5, 1], [0.5, 2]], [[0.5, 1], [0.2, 1]], [[1.5, 1]], [[0.1, -1]], "often"]
)
def test_bad_schedules_are_refused(wrong: object) -> None:
    with pytest.raises(ValidationError):
        Holder(value=wrong)
