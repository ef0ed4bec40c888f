"""One step of training, and the state that a next step depends on. No files, no clock, no printing.

The global batch is law: its loss is the mean over all its labels however it is cut into micro-batches and ranks. A step
whose loss or gradient is not finite anywhere makes no update; that is decided on the device, from numbers that all
ranks share, and nobody waits for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared.shards import TokenStream
from train import distributed, schedule
from train.config import Config
from train.model import Model
from train.optimizer import AdamW
from train.order import Order, rows
from train.probes import Probe, Readings


@dataclass(frozen=True)
class Measured:
    """What step `step` found, on the device: reading a number waits for the step to end."""

    step: int
    loss: Tensor  # mean nats of the global batch, before the update; a scalar
    grad_norm: Tensor  # of the whole gradient, before the clip; a scalar
    probe: Readings | None = None  # on rank 0, of each probe.every-th step


class Objective(nn.Module):
    """A model's loss as a module: what data parallelism wraps."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.model.loss(inputs, labels)


class Loop:
    """Model, optimizer and order: `step(n)` for n = 1, 2, ... is the whole of training."""

    def __init__(
        self, config: Config, model: Model, order: Order, stream: TokenStream, *, length: int, micro: int
    ) -> None:
        """`length` is the tokens of a sequence, `micro` the sequences at once on a device."""
        self.config, self.model, self.order, self.stream = config, model, order, stream
        self.length, self.micro = length, micro
        self.optimizer = AdamW(model, config.optimizer)
        self.objective = distributed.data_parallel(Objective(model))
        self.device = model.embedding.device

    def step(self, n: int) -> Measured:
        """The n-th update, from 1."""
        tokens = self._read(self.order.indices(n, distributed.rank(), distributed.world_size()))
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        *parts, last = torch.split(tokens, self.micro)
        with distributed.accumulating(self.objective):
            for part in parts:
                loss += self._backward(part, len(part) / len(tokens))
        loss += self._backward(last, len(last) / len(tokens))
        loss = distributed.add_up(loss) / distributed.world_size()
        norm = self.optimizer.gradient_norm()
        healthy = loss.isfinite() & norm.isfinite()
        lr, decay = schedule.lr(n, self.config.schedule), schedule.weight_decay(n, self.config.schedule)
        probe = Probe(self.model) if self._probes(n) else None
        self.optimizer.step(lr, decay, norm, healthy)
        self.model.requantize()
        return Measured(n, loss, norm, probe.measure(tokens[:1, :-1]) if probe else None)

    def _read(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """Those sequences of the data on the device, (B, T + 1) int64 for B of them.

        A GPU fetches them from pinned memory when it gets there; for a copy from any other the host would wait for it.
        """
        tokens = torch.from_numpy(rows(self.stream, indices, self.length))
        return (tokens.pin_memory() if self.device.type == "cuda" else tokens).to(self.device, non_blocking=True)

    def _backward(self, part: Tensor, weight: float) -> Tensor:
        """Add the gradient of `weight` times the loss of a micro-batch (b, T + 1); that loss, weighted, a scalar."""
        loss: Tensor = self.objective(part[:, :-1], part[:, 1:]) * weight
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _probes(self, n: int) -> bool:
        """Whether this process measures step n: what is measured is equal on all ranks."""
        every = self.config.probe.every
        return every > 0 and n % every == 0 and distributed.is_writer()

    def attempt(self, micro: int) -> None:
        """See whether `micro` sequences at once fit: forward and backward twice, as gradients accumulate; no update."""
        tokens = self._read(np.arange(micro))
        try:
            for _ in range(2):
                self.model.loss(tokens[:, :-1], tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
        finally:
            self.optimizer.zero_grad()

    def model_state(self) -> dict[str, Tensor]:
        """The parameters by name, live; codes are derived and are not state."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments, counts and random state. Training draws nothing at random, and what one day does will resume."""
        random = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return self.optimizer.state_dict() | random

    @torch.no_grad()
    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take over what `model_state` and `optimizer_state` gave, bit for bit. ValueError when it does not fit."""
        own = self.model_state()
        if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in model.items()}:
            raise ValueError("the checkpoint's parameters are not those of this model")
        for name, tensor in own.items():
            tensor.copy_(model[name])
        self.model.requantize()
        moments = {name: tensor for name, tensor in optimizer.items() if not name.startswith("random.")}
        self.optimizer.load_state_dict(moments)
        torch.set_rng_state(optimizer["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(optimizer["random.cuda"], self.device)

    def share(self) -> None:
        """Give all ranks the state of rank 0, bit for bit, and exchange gradients once, for torch to lay them out."""
        if distributed.world_size() == 1:
            return
        model, optimizer = self.model_state(), self.optimizer_state()
        distributed.copy_from_writer([*model.values(), *optimizer.values()])
        self.load(model, optimizer)
        self._backward(self._read(np.arange(self.micro)), 0.0)
        self.optimizer.zero_grad()
