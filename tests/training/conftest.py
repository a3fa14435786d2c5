"""Two processes that know one another: the session of pytest has no sockets, so they are processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

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
    script = place / "ranks.py"
    script.write_text(code + MEET)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(script), str(place)]
    started = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        yield script
        for process in started:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.kill()
            process.wait()
