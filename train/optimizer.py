"""AdamW (arXiv 1711.05101) on fp32 master weights: decay on matrices only, one global gradient clip, a skippable step.

Everything between the gradient and the updated weight stays on the device: the clip is handed to the fused kernel as a
divisor of the gradients, and an unhealthy step as its `found_inf` flag, at which the kernel leaves weights and moments
and the count of updates as they are. Nobody waits for a number to reach the host.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from train.config import OptimizerConfig


class AdamW:
    """State is three things by parameter name: exp_avg, exp_avg_sq (fp32, like the parameter), step (fp32 scalar)."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        assert all(p.dtype == torch.float32 for p in self.parameters.values()), "master weights are fp32"
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.steps = {name: torch.zeros((), device=p.device) for name, p in self.parameters.items()}
        decayed, plain = decay_groups(model)
        assert sorted(decayed + plain) == sorted(self.parameters), "the groups cover each parameter once"
        self.groups = ((decayed, 1.0), (plain, 0.0))

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the gradients as they stand, a scalar on the device."""
        return torch.nn.utils.get_total_norm([_gradient(p) for p in self.parameters.values()])

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, norm: Tensor, healthy: Tensor) -> None:
        """One update with gradients clipped to config.clip, or none where `healthy` (a bool scalar) is False.

        `norm` is `gradient_norm()`, over all ranks. Both stay on the device. The model's codes are stale afterwards.
        """
        c = self.config
        divisor = (norm.float() / c.clip).clamp(min=1.0)  # dividing by exactly 1 changes no bit
        skip = (~healthy).float()
        for names, decays in self.groups:
            parameters = [self.parameters[name] for name in names]
            adamw(
                list(parameters),
                [_gradient(p) for p in parameters],
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                [],
                [self.steps[name] for name in names],
                fused=True,
                grad_scale=divisor,
                found_inf=skip,
                amsgrad=False,
                maximize=False,
                beta1=c.beta1,
                beta2=c.beta2,
                eps=c.eps,
                lr=lr,
                weight_decay=weight_decay * decays,
            )
            increment_version(parameters)  # the fused kernel does not, and stale codes are noticed by it

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors, flat: "exp_avg.NAME", "exp_avg_sq.NAME", "step.NAME"."""
        kinds = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.steps}
        return {f"{kind}.{name}": tensor for kind, by_name in kinds.items() for name, tensor in by_name.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` gave, bit for bit. ValueError when a tensor is missing, foreign or misshapen."""
        own = self.state_dict()
        if state.keys() != own.keys():
            odd = min(state.keys() ^ own.keys())
            raise ValueError(f"the optimizer's state does not fit this model: {odd} is {_side(odd in state)}")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise ValueError(f"the optimizer's state does not fit this model: {name} has another shape or dtype")
            tensor.copy_(state[name])


def decay_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names with and without weight decay: matrices decay, norms and the embedding do not."""
    names = dict(model.named_parameters())
    decayed = [name for name, p in names.items() if p.dim() == 2 and name != "embedding"]
    return decayed, [name for name in names if name not in set(decayed)]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "backward comes first"
    return parameter.grad


def _side(present: bool) -> str:
    return "in the file only" if present else "missing"
