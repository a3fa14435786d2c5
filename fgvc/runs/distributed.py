"""Device, precision and processes: bare torch behind one small object. Launch with `torchrun -m fgvc train ...`."""

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
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fgvc.config.section import Section
from fgvc.types import FgvcError


class Train(Section):
    """The budget of a run and the machine's part of it."""

    epochs: int = Field(12, ge=1, description="passes over the training set; the schedule spans all of them")
    batch_size: int = Field(
        32,
        ge=2,
        description="images per optimizer step, over all processes and accumulated parts together; a smaller set is one step",
    )
    max_steps: int | None = Field(
        None, ge=0, description="stop early after so many steps, schedule unchanged; 0: the start ships (model.head: probe)"
    )
    seed: int = Field(
        0, ge=0, description="of the head's first weights, the order, the augmentation, the techniques' draws"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="autocast; weights stay fp32, and so do all losses"
    )
    refit: bool = Field(
        False,
        description="once the run is finished, train again on the validation part as well, all else the same, in a folder of its "
        "own beside it (NAME-refit): what ships then. Where no epoch was better than the start, only the head is fitted anew",
    )
    sampling: Literal["uniform", "balanced"] = Field(
        "uniform",
        description="of an epoch's images. uniform: each once; balanced: as many, drawn with replacement so that every class "
        "comes equally often",
    )
    accumulate: int = Field(1, ge=1, description="parts that a step's images are split into, to save memory")
    recompute: bool = Field(
        False, description="activation checkpointing: less memory, about a third more time, the same result"
    )
    validate_every: int = Field(
        1, ge=1, description="epochs from one validation to the next; the last is always followed by one"
    )
    precise_bn: int = Field(
        0,
        ge=0,
        description="at the end, take the batch norms' statistics anew from so many training images as evaluation sees "
        "them (0: keep those of training, jigsaws and all)",
    )
    workers: int = Field(
        1, ge=0, description="loading processes; 0 loads between steps. The images are the same for any number"
    )
    device: str = Field("auto", description="auto | cpu | cuda | cuda:N | mps")

    def fitting(self, images: int, world: int) -> Train:
        """With a step that so many images to learn from can fill, in equal shares of `world` processes and accumulated parts."""
        share = world * self.accumulate
        return self.model_copy(update={"batch_size": min(self.batch_size, max(images, share) // share * share)})

    @property
    def last_step(self) -> int:
        """No later one is made, whatever the epochs."""
        return 10**12 if self.max_steps is None else self.max_steps


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where and in how many processes this run computes."""

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
        """Loss scaling, which only fp16 needs."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def wrap(self, step: nn.Module, *, branches: bool) -> nn.Module:
        """DDP around the whole step where there are several processes. A branch may go unused in a step; the net never."""
        if self.world == 1:
            return step
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(step, device_ids=device_ids, find_unused_parameters=branches)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def anywhere(self, flag: Tensor) -> Tensor:
        """() bool: whether `flag`, a () bool, is set on any process."""
        if self.world == 1:
            return flag
        count = flag.to(self.device, torch.float32)
        dist.all_reduce(count)
        return count > 0

    def agreed(self, flag: bool) -> bool:
        """The same of what the processes know on their own."""
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
        """Run on rank 0 while the others wait (folders, the decode cache). All raise the FgvcError that it raises."""
        failed: FgvcError | None = None
        if self.main:
            try:
                do()
            except FgvcError as error:
                failed = error
        said = self.gather(None if failed is None else str(failed))[0]
        if said is not None:
            raise failed or FgvcError(said)


@contextmanager
def runtime(train: Train) -> Iterator[Runtime]:
    """Set up the process group where torchrun started several processes, and tear it down again.

    Raises FgvcError for a device that is not there.
    """
    world, rank, local = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    device = _device(train.device, local)
    if device.type == "cpu":
        keep_freed_memory()
    if train.batch_size % (world * train.accumulate):
        raise FgvcError(
            f"train.batch_size: {train.batch_size} images do not split over {world} processes "
            f"x train.accumulate {train.accumulate}"
        )
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # others wait while one makes a cache or masks
    try:
        yield Runtime(device, rank, world, train.precision)
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
    """Of the generators that the model's own dropout draws from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
