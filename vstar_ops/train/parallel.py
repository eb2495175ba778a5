"""Training on several processes, by torch's own engine: ``torchrun --nproc-per-node 2 -m vstar_ops.train``.

All processes keep the same weights and draw the same batches from the same random numbers. Each runs its
shard of the batch through :class:`torch.nn.parallel.DistributedDataParallel`. A mean over the rows or
candidates of a shard is weighted by their number in that shard. So the gradient, and with it the run, is that
of one process up to rounding; only dropout draws different noise in each process. The main process, the first
one, evaluates and writes the files. On CUDA each process has the GPU of its local rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class World:
    """The processes of a run, one unless ``torchrun`` has started more, and the device of this one."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = torch.device("cpu") if device is None else device

    @property
    def constant_shapes(self) -> bool:
        """Whether a step runs rows in vain rather than wait for their number: where the device works ahead of
        the host."""
        return self.device.type != "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this process evaluates and writes."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """The ``value`` of the main process."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def shard(self, batch: Tensor) -> Shard:
        """This process' part of a batch."""
        return Shard(self, batch)

    def wrap(self, model: nn.Module) -> Callable[..., Any]:
        """``call(method, *arguments)``, which calls a method of the model; backward averages the gradients of
        all processes."""
        calls = _Calls(model)
        if self.size == 1:
            return calls
        # The buffers are a function of the data, equal everywhere.
        return DistributedDataParallel(calls, broadcast_buffers=False)

    @contextmanager
    def rank_rng(self) -> Iterator[None]:
        """Draw different random numbers in each process.

        The shared generator advances by the same amount, whatever is drawn inside and by how many processes.
        """
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng(devices=[]):  # a GPU's generator is seeded anew, so that no state is kept
            torch.manual_seed(seed + self.rank)
            yield


class Shard:
    """Consecutive rows of a batch, and their weight in means over the batch.

    If a batch has fewer rows than there are processes, some processes get none. They run its first row with
    weight 0, because all must take part in the same calls.

    Attributes:
        rows: the rows of the batch that this process runs.
    """

    def __init__(self, world: World, batch: Tensor) -> None:
        self.world = world
        rows = batch.tensor_split(world.size)[world.rank]
        self.counts = len(rows) > 0
        self.rows = rows if self.counts else batch[:1]

    def weights(self, *counts: Tensor | int) -> list[float]:
        """A factor per count, for means over that number of entries of this shard.

        DistributedDataParallel averages gradients over the processes. With these factors that average is the
        mean over the entries of all shards.
        """
        if self.world.size == 1:
            return [1.0] * len(counts)
        own = torch.tensor([float(c) * self.counts for c in counts], dtype=torch.float64)
        total = own.clone()
        distributed.all_reduce(total)
        return (own * self.world.size / total.clamp(min=1)).tolist()

    def averages(self, means: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
        """Means over all shards, by name, out of this shard's ``means`` and their weights."""
        found = dict(zip(means, torch.stack(list(means.values())).cpu().tolist()))  # the host waits once
        if self.world.size == 1:
            return found
        values = torch.tensor([weights[name] and weights[name] * x for name, x in found.items()])
        distributed.all_reduce(values)
        return dict(zip(found, (values / self.world.size).tolist()))


class _Calls(nn.Module):
    """A model whose methods are called by name, because DistributedDataParallel only knows ``forward``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self.model, method)(*arguments, **options)


def choose_device(name: str) -> torch.device:
    """The device of this process by the option ``--device``.

    Raises:
        ValueError: there is no such device, or several processes were told to share one GPU.
    """
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else None
        device = device or torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return device
    rank, count = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if device.index is not None and rank is not None:
        raise ValueError(f"--device must be cuda under torchrun, which numbers the GPUs itself, got {name!r}")
    index = device.index if device.index is not None else int(rank or 0)
    if index >= count:
        raise ValueError(f"--device {name}: GPU {index} is not there, torch sees {count}")
    return torch.device("cuda", index)


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The processes that ``torchrun`` has started, joined over gloo, and nccl on CUDA; one without it."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device=device)
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    try:
        yield World(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()
