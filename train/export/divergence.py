"""How far a distribution over the next token is from ours: the Kullback-Leibler divergence."""

from torch import Tensor


def mean_divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean over M positions of KL(ours || theirs) in nats, from logits (M, V) each; computed in fp64."""
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()
