"""Quantize a model block by block."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, layer_views
from shrinkformer.prune.stream import BlockStream
from shrinkformer.quantize.layer import Effort, quantize_weight
from shrinkformer.quantize.observe import Fold, observe
from shrinkformer.quantize.scheme import Scheme
from shrinkformer.quantize.sites import Site, block_sites
from shrinkformer.quantize.solver import Hessian
from shrinkformer.quantize.target import Target, corrected, merge


@dataclass(frozen=True)
class Config:
    scheme: Scheme = field(default_factory=Scheme)
    effort: Effort = field(default_factory=Effort)
    layers: str = "all"
    dtype: torch.dtype = torch.float16
    centred: bool = True
    residual: bool = True
    sequential: bool = True
    max_trust: float = 1.0
    norm: bool = True


def quantize_(model, batches, config, log=None):
    streams = tuple(BlockStream(model, batches) for _ in range(2))
    sites = block_sites(model_arch(model), config.layers)
    for view in layer_views(model):
        dense = replace(view, block=copy.deepcopy(view.block, {id(model.config): model.config}))
        if not config.sequential:
            data = [observe(s, dense, view, streams, 2) for s in sites]
        for k, site in enumerate(sites):
            folds = observe(site, dense, view, streams, 2) if config.sequential else data[k]
            if not config.residual:
                folds = [replace(f, shifts=f.shifts[:1]) for f in folds]
            whole = merge(folds)
            hess = {}
            for path in site.paths:
                lin = view.linear(path)
                centred = config.centred and lin.bias is not None
                if centred not in hess:
                    hess[centred] = Hessian.of(whole.inputs.covariance() if centred else whole.inputs.second, damping=config.effort.damping, by_activity=config.effort.by_activity)
                W = lin.weight.detach().clone()
                t = corrected(W, whole, folds if config.effort.correct else [], centred=centred)
                c = quantize_weight(t.weight, None, config.scheme, effort=config.effort, dtype=config.dtype, hessian=hess[centred])
                q = c.weight.decode()
                lin.weight.data.copy_(q)
                if centred:
                    m = whole.inputs.mean
                    lin.bias.data.add_((t.shift + (W.double() - q.double()) @ m).to(lin.bias.dtype))
                if log is not None: log.append((view.index, path, c.error, c.nearest_error, t.trust, t.damping))
        streams[0].run(dense.block); streams[1].run(view.block)
    if config.norm: refit_final_norm(model, streams)


def model_arch(model): return layer_views(model)[0].architecture


def refit_final_norm(model, streams):
    base = model.base_model
    norm = getattr(base, "norm", None) or base.decoder.final_layer_norm
    sx = None
    with torch.no_grad():
        for i in range(len(streams[0])):
            y, x = (norm(s.hidden(i))[s.mask(i)].double() for s in streams)
            w = norm.weight.double(); b = getattr(norm, "bias", None)
            b = 0 if b is None else b.double()
            y = y - b; x = (x - b)
            v = torch.stack([x.sum(0), y.sum(0), (x*x).sum(0), (x*y).sum(0), torch.full_like(x[0], len(x))])
            sx = v if sx is None else sx + v
        n = sx[4]
        if getattr(norm, "bias", None) is not None:
            cov = sx[3] - sx[0]*sx[1]/n; var = sx[2] - sx[0]**2/n
            a = cov/var
            norm.bias.data.add_(((sx[1] - a*sx[0])/n).to(norm.bias.dtype))
        else: a = sx[3]/sx[2]
        norm.weight.data.mul_(a.to(norm.weight.dtype))
        print("final norm scale", a.min().item(), a.mean().item(), a.max().item())
