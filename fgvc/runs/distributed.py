"""Device, precision and processes of a run (plain torch). Launch several with `torchrun -m fgvc train ...`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fgvc.config.training import Train
from fgvc.errors import FgvcError


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """Device, precision and process group of this process."""

    device: torch.device
    rank: int
    world: int
    precision: Literal["fp32", "bf16", "fp16"]

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Make the loss scaler, which only fp16 needs."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def wrap(self, step: nn.Module, *, branches: bool) -> nn.Module:
        """Wrap the whole step in DDP where there are several processes. A branch may go unused in a step; the net never."""
        if self.world == 1:
            return step
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(step, device_ids=device_ids, find_unused_parameters=branches)

    def gather(self, value: Any) -> list[Any]:
        """Collect `value` of every process, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def anywhere(self, flag: Tensor) -> Tensor:
        """Whether `flag`, a () bool, is set on any process, as () bool."""
        if self.world == 1:
            return flag
        count = flag.to(self.device, torch.float32)
        dist.all_reduce(count)
        return count > 0

    def agreed(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        return bool(self.anywhere(torch.tensor(flag)))

    def same_buffers(self, net: nn.Module) -> None:
        """Give every process the first one's running statistics, which are those that are saved. DDP does so before each
        forward, but each process then adds its own images."""
        self.same_tensors(net.buffers())

    def same_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def first(self, do: Callable[[], None]) -> None:
        """Run `do` on rank 0 while the others wait (folders, the decode cache). All raise the FgvcError that it raises."""
        failed: FgvcError | None = None
        if self.main:
            try:
                do()
            except FgvcError as error:
                failed = error
        message = self.gather(None if failed is None else str(failed))[0]
        if message is not None:
            raise failed or FgvcError(message)


@contextmanager
def process_group(train: Train) -> Iterator[ProcessGroup]:
    """Set up the process group where torchrun started several processes, and tear it down again.

    Raises FgvcError for a device that is not there.
    """
    world, rank, local = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    device = _device(train.device, local)
    if device.type == "cpu":
        keep_freed_memory()
    if train.batch_size != "auto" and train.batch_size % (world * train.grad_accum_steps):
        raise FgvcError(
            f"train.batch_size: {train.batch_size} images do not split over {world} processes "
            f"x train.grad_accum_steps {train.grad_accum_steps}"
        )
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # others wait while one makes a cache or masks
    try:
        yield ProcessGroup(device, rank, world, "fp32" if train.precision == "auto" else train.precision)
    finally:
        if world > 1:
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of handing large blocks back to the kernel, which clears every page anew: on
    2 cores that is a third of a step, for some 5 % more memory. Nothing happens where the C library is another."""
    mmap_max, trim_threshold = -4, -1  # mallopt(3)
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)  # no mapping of its own for a large block
    mallopt(trim_threshold, -1)


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kind = accelerator.type if accelerator is not None else "cpu"
        return torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.zeros(1, device=device).item()  # computes: `meta` can't
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FgvcError(f"train.device: {name!r} can't be used here: {str(error).splitlines()[0]}") from error
    return device


def rng_state(device: torch.device) -> Mapping[str, Any]:
    """State of the generators that the model's own dropout draws from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the state that `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
