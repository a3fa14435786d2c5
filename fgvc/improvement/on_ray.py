"""The search on a Ray cluster (`--search --on ray`): each task is one more process that shares the study's journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from fgvc.errors import FgvcError
from fgvc.improvement.search import Space, join
from fgvc.improvement.side_by_side import Job, workers

GRACE = 120.0  # seconds after the deadline, for trials to save and end
POLL = 0.5


def refuse_missing_ray() -> None:
    """Raise FgvcError where Ray is not installed."""
    if find_spec("ray") is None:
        raise FgvcError("--on ray: needs Ray: pip install 'fgvc[ray,search]'")


def share_on_ray(out: Path, space: Space, *, threads: int, seed: int, tick: Callable[[Sequence[Job]], None]) -> None:
    """Run the search on all the CPUs of the cluster (RAY_ADDRESS, else a local one), `threads` for each trial. All machines must
    see `out`, the images and the weights at the same places."""
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    helping = ray.remote(num_cpus=threads, max_retries=0)(_help)
    count = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
    tasks = [helping.remote(str(out.absolute()), seed + number) for number in range(count)]
    try:
        while tasks and space.left > -GRACE:
            _, tasks = ray.wait(tasks, num_returns=len(tasks), timeout=POLL)
            tick([])
            time.sleep(POLL)
    finally:
        for task in tasks:
            ray.cancel(task)
        ray.shutdown()


def _help(out: str, seed: int) -> None:
    """Share the search until it ends, one trial at a time."""
    with workers() as pool:
        join(Path(out), slots=1, seed=seed, pool=pool, say=print)
