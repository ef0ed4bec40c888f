"""Runs `python -m train ...` commands in forked processes, so that a command costs 0.2 s and not the import of torch.

Each child is a process of its own that goes through the real entry point and can be killed like any other. A fault is
put into it before it starts: see FAULTS. Started by command.py; speaks JSON lines on stdin and stdout.
"""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config  # what a first call would import, imported once
from torch.distributed import TCPStore
from torch.nn.parallel import DistributedDataParallel

import train.report.run  # noqa: F401
from shared import manifest
from shared.stop import run_cli
from train import anomalies, checkpoint, distributed, evaluate, loop, model, run, runtime, samples, trained, training
from train.cli import main

torch.set_num_threads(1)
leave_report, run.leave_report = run.leave_report, lambda path: "no report: tests ask for one"  # 0.5 s a run


def kill_at(call: str, n: int) -> None:
    """SIGKILL at the n-th call, counted from 1, of an os function that changes the disk; a write is done by half."""
    real, calls = getattr(os, call), 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            if call == "write":
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(os, call, counted)


def fail_writes(n: int) -> None:
    """A full disk from the n-th write into a checkpoint on."""
    real, calls = checkpoint.write_all, 0

    def write_all(fd: int, data: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= n:
            raise OSError(28, "No space left on device")
        real(fd, data)

    checkpoint.write_all = write_all


PLACES: dict[str, tuple[Any, str]] = {
    "step": (loop.Loop, "step"),
    "update": (model.Model, "requantize"),
    "reading": (loop, "rows"),
    "evaluating": (evaluate, "rows"),
    "hashing": (manifest, "_check"),
    "sampling": (samples, "generate"),
    "save": (checkpoint, "_write"),
    "copy": (checkpoint.Saver, "save"),
    "verify": (checkpoint, "verify"),
}


def signal_in(place: str, n: int, *numbers: int) -> None:
    """Send the signals to ourselves at the n-th entry, from 1, into a place."""
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), 0

    def entered(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.05)
        return real(*arguments, **named)

    setattr(owner, name, entered)


def signal_job(step: int, number: int) -> None:
    """Send a signal to this process and to its launcher, when this step begins: as schedulers signal a whole job."""
    real = loop.Loop.step

    def begun(self: Any, n: int) -> Any:
        if n == step:
            os.kill(os.getppid(), number)
            os.kill(os.getpid(), number)
        return real(self, n)

    loop.Loop.step = begun  # type: ignore[method-assign]


def poison(*steps: int) -> None:
    """The loss of these steps is NaN, and so is its gradient."""
    spike(float("nan"), *steps)


def spike(factor: float, *steps: int) -> None:
    """The loss of these steps is `factor` times what it should be, and so is its gradient."""
    real_step, real_loss, now = loop.Loop.step, model.Model.loss, 0

    def step(self: Any, n: int) -> Any:
        nonlocal now
        now = n
        try:
            return real_step(self, n)
        finally:
            now = 0

    loop.Loop.step = step  # type: ignore[method-assign]
    model.Model.loss = lambda *a: real_loss(*a) * (factor if now in steps else 1.0)  # type: ignore[method-assign]


def precision(name: str) -> None:
    """A machine whose CPU has bf16 (`name` is bf16) or has not (fp32)."""
    runtime._has_bf16 = lambda device: name == "bf16"


def draw() -> None:
    """Each step draws from the global generator, and lets what it draws shape the update."""
    real = loop.Loop.step

    def step(self: Any, n: int) -> Any:
        with torch.no_grad():
            self.model.norm.weight.mul_(1 + 0.01 * torch.rand(1))
        return real(self, n)

    loop.Loop.step = step  # type: ignore[method-assign]


def short_window(length: int, sigmas: float) -> None:
    """Spikes are found in a short run: a window of so many steps."""
    anomalies.WINDOW, anomalies.SIGMAS = length, sigmas


def forget(piece: str) -> None:
    """A resume leaves out a piece of the state: tensors whose name begins so, or a path into state.json."""
    real = checkpoint.load

    def load(folder: Any) -> Any:
        found = real(folder)
        for part in (found.model, found.optimizer):
            for name, tensor in part.items():
                if name.startswith(piece):
                    tensor.zero_()
        if piece == "random.cpu":  # zeros are no state of a generator
            found.optimizer[piece].copy_(torch.Generator().manual_seed(0).get_state())
        state = found.state["anomalies"]
        for place in (state, state["windows"]):
            if piece in place:
                place[piece] = type(place[piece])()
        return found

    training.checkpoint.load = trained.checkpoint.load = load  # type: ignore[attr-defined]


def late() -> None:
    """As on CUDA: the numbers of a step are read after the next one was started."""
    training.reads_late = lambda device: True


def only_val() -> None:
    """Whoever opens another split than val fails."""
    real = manifest.open_stream

    def open_stream(folder: Any, found: Any, split: str) -> Any:
        assert split == "val", "the train split was opened"
        return real(folder, found, split)

    trained.open_stream = open_stream  # type: ignore[attr-defined]


def threads(number: int) -> None:
    """Another machine: torch would use so many threads here."""
    torch.set_num_threads(number)


def elsewhere(data: str) -> None:
    """Another host, where the data set's folder holds that of `data`."""
    real = run.load_manifest
    run.load_manifest = lambda folder: real(Path(data))  # type: ignore[attr-defined]


def slow(seconds: float, patience: float) -> None:
    """Verifying takes so long, or nobody waits longer than `patience`."""
    real = run.check_hashes

    def check_hashes(*arguments: Any) -> None:
        real(*arguments)
        time.sleep(seconds)

    run.check_hashes = check_hashes
    distributed.PATIENCE = timedelta(seconds=patience)


def once_a_step() -> None:
    """No fault: fails where a step has exchanged gradients oftener than once, however many micro-batches it has."""
    real_step, real_forward, exchanges = loop.Loop.step, DistributedDataParallel.forward, 0

    def forward(self: Any, *arguments: Any) -> Any:
        nonlocal exchanges
        exchanges += self.require_backward_grad_sync
        return real_forward(self, *arguments)

    def step(self: Any, n: int) -> Any:
        nonlocal exchanges
        exchanges = 0
        found = real_step(self, n)
        assert exchanges == 1, f"{exchanges} exchanges in step {n}"
        return found

    DistributedDataParallel.forward, loop.Loop.step = forward, step  # type: ignore[method-assign]


def report() -> None:
    """No fault: the run ends with its report, as runs do outside the tests."""
    run.leave_report = leave_report


def without(package: str) -> None:
    """A machine where a package is not installed."""
    for name in [name for name in sys.modules if name.startswith((f"{package}.", "train.report."))]:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]


MACHINES = (threads, precision, late, without, elsewhere, slow, once_a_step)
MISHAPS = (only_val, kill_at, fail_writes, signal_in, signal_job, poison, spike, draw, short_window, forget)
FAULTS = {fault.__name__: fault for fault in (report, *MACHINES, *MISHAPS)}


def child(request: dict[str, Any], rank: int, store: TCPStore | None) -> None:
    """Become the command; never returns. With the launcher's `store` it is one of several processes."""
    code = 1
    try:
        if store is not None:  # as torchrun does it
            os.environ |= {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(request["ranks"]))},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
            }
        for fd, path in ((1, f"{request['out']}-{rank}"), (2, f"{request['err']}-{rank}")):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, fd)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.argv = ["python -m train", *request["args"]]
        for name, *arguments in request["ranks"][rank]:
            FAULTS[name](*arguments)
        run_cli(main, "python -m train")
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
    except BaseException:  # noqa: BLE001 - a bug of ours: show it as the interpreter would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def lines_in(path: str) -> int:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - this is polled
            return file.read().count(b"\n")
    except FileNotFoundError:
        return 0


def watch(pid: int, kill_at: list[Any] | None, seconds: float) -> int:
    """Wait so long for a process; kill it where that is asked for. Its exit code, or minus the signal."""
    end = time.monotonic() + seconds
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if kill_at and lines_in(kill_at[0]) >= kill_at[1]:
            time.sleep(kill_at[2])
            end = 0.0
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1])


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        ranks = len(request["ranks"])
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        processes = []
        for rank in range(ranks):
            processes.append(os.fork())
            if processes[-1] == 0:
                child(request, rank, store)
        print(json.dumps([watch(pid, request["kill_at"], request["seconds"]) for pid in processes]), flush=True)


if __name__ == "__main__":
    serve()
