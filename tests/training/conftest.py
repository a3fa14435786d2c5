"""Two processes that know one another: the session of pytest has no sockets, so they are processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.processes import script

MEET = """
if __name__ == "__main__":
    import sys

    import torch
    from torch import distributed

    torch.set_num_threads(1)
    place, rank = sys.argv[1], int(sys.argv[2])
    distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    torch.save(known(rank, 2), f"{place}/rank{rank}.pt")
    distributed.destroy_process_group()
"""


@pytest.fixture(scope="session")
def two_ranks() -> Callable[[str, Path], AbstractContextManager[Path]]:
    """`with two_ranks(code, place) as script:`, the code defining `known(rank, world)`; both have written what is known to
    them to `place/rank{0,1}.pt` when the context has ended."""
    return _two_ranks


@contextmanager
def _two_ranks(code: str, place: Path) -> Iterator[Path]:
    file = place / "ranks.py"
    file.write_text(code + MEET)
    started = [script(place / f"said{rank}", file, place, rank, env={"GLOO_SOCKET_IFNAME": "lo"}) for rank in (0, 1)]
    try:
        yield file
        for process in started:
            assert process.wait().returncode == 0, process.stderr
    finally:
        for process in started:
            process.process.kill()
            process.wait()
