"""Attributes that stand-ins take the place of for a session, and that single tests have for real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

ForReal = Callable[[], AbstractContextManager[None]]


@contextmanager
def stand_ins(*patches: tuple[object, str, Any]) -> Iterator[ForReal]:
    """Set attributes, (owner, name, value) each, while this lasts; within `with` of what it yields they are what they were."""
    real = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]

    @contextmanager
    def for_real() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as inner:
            for attribute in real:
                inner.setattr(*attribute)
            yield

    with pytest.MonkeyPatch.context() as patch:
        for attribute in patches:
            patch.setattr(*attribute)
        yield for_real
