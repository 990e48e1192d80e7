"""The first weights of a model."""

import math
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def initialise(model: Any, init: str, zero_out: bool = False) -> None:
    """Draw the first weights of a `Model`.

    `zero_out`: the output projections are zero, so that each block begins as the identity (as in
    ReZero, arXiv 2003.04887, where a factor is zero). Otherwise they are drawn and divided by the
    square root of the number of layers.

    `hippo`: A_n = -(n + 1) over the heads, the diagonal of the HiPPO-LegS matrix (S4D-Real, arXiv
    2206.12037). `uniform`: -A uniform in [1, 16]. Either way dt is log-uniform in [dt_min, dt_max].
    """
    if init not in ("hippo", "uniform"):
        raise ValueError(f"init: expected 'hippo' or 'uniform', got {init!r}")
    if model.backbone.embeddings.weight.is_meta:  # the weights will come from a file
        return
    c = model.config
    nn.init.normal_(model.backbone.embeddings.weight, std=0.02)
    heads = [] if c.tied else [m for m in model.lm_head.modules() if isinstance(m, nn.Linear)]
    for linear in heads:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    for layer in model.backbone.layers:
        mixer = layer.mixer
        if init == "hippo":
            mixer.A_log.copy_(torch.arange(1, c.n_heads + 1).log())
        else:
            mixer.A_log.uniform_(1, 16).log_()
        mixer.D.fill_(1)
        low, high = math.log(c.dt_min), math.log(c.dt_max)
        dt = torch.empty_like(mixer.dt_bias).uniform_(low, high).exp_().clamp_(min=c.dt_floor)
        mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        if zero_out:
            mixer.out_proj.weight.zero_()
        else:
            mixer.out_proj.weight /= math.sqrt(c.n_layers)
