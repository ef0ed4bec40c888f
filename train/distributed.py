"""Several processes as one trainer, started by torchrun. Alone, every function here is the identity.

Ranks hold equal weights and take rows r, r + W, ... of each global batch; gradients and losses are averaged, so all
ranks see the same numbers and decide the same. Rank 0 alone verifies, reads and writes the run, and speaks; what it
has found it tells the others. What ends one process ends all, with one line on stderr.
"""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from shared.progress import duration

T = TypeVar("T")

# How long one process waits for another. Rank 0 verifies the data set while the others wait: 4 GB in an hour is 1 MB/s.
PATIENCE = timedelta(hours=1)

# Kept until the process ends: a group that ends with the last DistributedDataParallel waits, holding the interpreter's
# lock, for its threads, and one of these may just need that lock to let go of a tensor.
_groups: list[object] = []


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which of its machine's devices this process takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_writer() -> bool:
    return rank() == 0


def is_restarted() -> bool:
    """Whether torchrun has started this command again, after a process of it had failed (--max-restarts)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes for the length of the block: nccl between GPUs, gloo between CPUs.

    An exception that leaves the block ends the others too: their connections to this process break, and what they do
    next with them raises. The first to end keeps its stderr and says why; those that end with it or after it are mute.
    """
    if world_size() == 1:
        yield
        return
    os.environ.setdefault("NCCL_ALGO", "Ring")  # one order of adding; NVLS adds in the switch, in an order of its own
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = None
    try:
        store = _of_this_start(next(rendezvous("env://", timeout=PATIENCE))[0])
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=PATIENCE)
        _groups.append(dist.group.WORLD)
        yield
    except Exception as error:
        if store is not None and not _is_first_to_end(store):
            sys.stderr = open(os.devnull, "w")  # noqa: PTH123 - for what is left of this process
        if dist.is_initialized():  # destroying nccl's group would wait for what the dead will never join
            dist.distributed_c10d._abort_process_group()
        if said := _lost(error):
            raise ValueError(said) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _of_this_start(store: Store) -> Store:
    """`store` under a prefix that no earlier start of this job has used. All ranks must be here.

    torchrun keeps its store over restarts, and with it what the dead have left there: a process that comes a moment
    before rank 0 would take the address of the one before for its. (Counting restarts is no way out: hosts count their
    own.) So each says a word that nobody has said before, and rank 0 answers that word with the prefix.
    """
    mine = uuid4().hex
    if not is_writer():
        store.set(f"word/{rank()}", mine)
        prefix = store.get(f"answer/{mine}").decode()  # waits
        store.set(f"heard/{prefix}/{rank()}", "")
        return PrefixStore(prefix, store)
    deadline, answered = time.monotonic() + PATIENCE.total_seconds(), set()
    while not store.check([f"heard/{mine}/{r}" for r in range(1, world_size())]):
        for r in range(1, world_size()):
            if store.check([key := f"word/{r}"]) and (word := store.get(key).decode()) not in answered:
                store.set(f"answer/{word}", mine)
                answered.add(word)
        if time.monotonic() > deadline:
            raise dist.DistStoreError("timed out")
        time.sleep(0.01)
    return PrefixStore(mine, store)


def _is_first_to_end(store: Store) -> bool:
    try:
        return bool(store.compare_set("first to end", "", str(rank())) == str(rank()).encode())
    except RuntimeError:  # gone with the process that kept it
        return True


def _lost(error: Exception) -> str | None:
    """What to say of `error` if it is the end of a connection to another process. gloo has no exception of its own."""
    if not isinstance(error, RuntimeError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return None
    if re.search("time(d )?out", str(error).lower()):
        what = f"another process of this job did not answer (waited up to {duration(PATIENCE.total_seconds())})"
    else:
        what = "another process of this job has ended: see what it said, or what the launcher says of it"
    return f"{what}; the same command goes on from the newest checkpoint"


def data_parallel(module: nn.Module) -> nn.Module:
    """`module`, whose backward averages the gradients of its parameters over all ranks while it still computes.

    Torch lays its buckets out anew once a first backward is over, in the order in which gradients came, and sums over
    three ranks and more depend on the layout in their last bit: Loop.share gets this over before any step that counts.
    """
    if world_size() == 1:
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.13 on
        return DistributedDataParallel(
            module,
            init_sync=False,  # rank 0 gives its state to all, moments too: Loop.share
            broadcast_buffers=False,  # codes, which each rank derives from the same weights
            gradient_as_bucket_view=True,
        )


def accumulating(module: nn.Module) -> AbstractContextManager[None]:
    """For the forward and backward of all micro-batches but the last: gradients add up here and are not exchanged."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def add_up(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all ranks; the same tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_writer(find: Callable[[], T]) -> T:
    """What rank 0 finds, anything small, on all ranks: the others wait for it."""
    if world_size() == 1:
        return find()
    box = [find() if is_writer() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return cast(T, box[0])


def copy_from_writer(tensors: Sequence[Tensor]) -> None:
    """Overwrite each tensor by that of rank 0, bit for bit."""
    for tensor in tensors if world_size() > 1 else ():
        dist.broadcast(tensor, src=0)


def any_rank(value: bool) -> bool:
    """Whether `value` holds on any rank: how all ranks agree to stop. It does not wait for the device."""
    return bool(add_up(torch.tensor(int(value))).item())


def smallest(value: int) -> int:
    """The smallest `value` of all ranks."""
    if world_size() == 1:
        return value
    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MIN)
    return int(number.item())
