"""Ternary health: what the weights, codes and activations of every projection look like, each probe.every steps.

A line of metrics.jsonl, {"kind": "probe", "step": n, "layers": [...], "timing": {"seconds", "time"}}, stands behind the
train line of n, and holds an object for each layer and projection in the order of the model:

    layer         from 0
    projection    q, k, v, o, gate, up or down: a matrix with a scale of its own, fused with others or not
  of the model after update n, which is that of checkpoint step-n:
    minus, zero, plus    shares of the codes that are -1, 0 and 1; they add up to 1
    scale         s = mean|W|
    saturated     share of the int8 activations that are 127 or -127; absmax puts one of each token there
    absmax        largest |x| of a token's activations, the mean over tokens
    weight_norm   L2 norm of the full-precision latent W
  of update n itself:
    flipped       share of the codes that it changed
    grad_norm     L2 norm of the gradient of the global batch, before the clip
    update_norm   L2 norm of what was added to W

The full-precision twin has no codes: minus, zero, plus, flipped, scale and saturated are not in its objects. A number
that is not finite is null. A step without an update (not finite) has flipped 0 and update_norm 0.
"""
