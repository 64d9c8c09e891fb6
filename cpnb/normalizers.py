"""Every way to normalise a network behind one call: `normalize`, `remove_normalizer`.

`NORMALIZERS` says of each what it constrains.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from cpnb._checks import check_module
from cpnb._normalizers.conditioned_cp import ConditionedCP
from cpnb._normalizers.table import NORMALIZERS, Normalizer
from cpnb.base import CPLayer
from cpnb.conversion import is_weighted
from cpnb.hooks import model_hooks
from cpnb.rescaling import Rescaling
from cpnb.surgery import Skip, replace_layers

__all__ = ["NORMALIZERS", "Normalizer", "normalize", "remove_normalizer"]


def normalize(
    model: nn.Module, name: str, *, skip: Skip = (), **options: Any
) -> nn.Module:
    """Copy a model with its convolution and linear layers normalised.

    Acts on `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and `nn.Linear`; another convolution
    or linear layer has to be skipped. CP layers, which are parametrised already, are
    taken by the norm layers, ``"conditioned"``, ``"scaling"`` and ``"canonical"``,
    low-rank layers by the norm layers and ``"scaling"``; other names refuse them.

    ``"batch"``, ``"group"`` and ``"layer"`` put a norm layer behind every layer, with
    ``output=True`` also behind the last one in the order of the modules; linear layers
    are taken to map ``(n, features)``. In a model that has batch norm already they
    exchange that instead. The other names replace kernels by a parametrisation, and
    compute them anew in each forward pass, `nn.utils.parametrize`; such layers load
    and save their ``state_dict`` and can be copied, not pickled: call
    `remove_normalizer` before. `param_groups` knows which of the parameters decay.

    Options, with a default unless in parentheses:

    - ``"group"``: ``group_size=16``, channels in a group, or more where 16 does not
      divide their number.
    - ``"weight_data_init"``: ``data=`` (a batch of images, standardised) that goes
      through the network in evaluation mode, ``generator``.
    - ``"spectral"``: ``n_power_iterations=1``, ``eps``, ``generator``.
    - ``"orthogonal"``: ``gain="learnable"``; ``orthogonal_map``: None takes the Q of
      the QR decomposition, at the cost of a few matrix products; ``"householder"``,
      ``"cayley"`` and ``"matrix_exp"`` are torch's, slow where one side is long;
      ``generator`` for torch's.
    - ``"standardized"``: ``gain=None`` for standard deviations of 1, which want a norm
      layer behind them: put that in first. A gain divides by √fan_in, too, and does
      without. ``output=False`` leaves the last layer alone.
    - ``"oni"``: ``iterations=5``, at most 7, ``gain=√2``.
    - ``"conditioned"``: ``mode="row"``, ``"column"`` or ``"row-column"``, per group;
      ``detach=False``; ``gain=√2``. In a CP layer σ is the gain, and a column, in a
      convolution, all that reads one input channel.
    - ``"scaling"``: ``mode``, ``c``, ``every`` and ``before_norm`` of `Rescaling`.
    - ``"canonical"``: ``rank``, ``init`` and ``generator`` of `canonicalize`.

    A ``gain`` multiplies the constrained kernel: a number, or ``"learnable"`` for a
    parameter of each layer that starts where the kernel keeps its Frobenius norm.

    Args:
        model: Any module; also a single layer. It is not touched.
        name: A key of `NORMALIZERS`.
        skip: Names of layers to leave alone, or a predicate ``(name, layer) -> bool``.
        **options: As above.

    Returns:
        A new model.

    Raises:
        TypeError: If a layer is of a kind that cannot be normalised, or an option is of
            the wrong type or unknown.
        ValueError: If a name is unknown, an option out of range, there is nothing to
            normalise, or a layer is normalised already, shares its weights, or has
            weights the normalizer is not defined for.

    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> normalize(net, "group")
    Sequential(
      (0): Sequential(
        (0): Linear(in_features=8, out_features=4, bias=True)
        (1): GroupNorm(1, 4, eps=1e-05, affine=True...)
      )
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    >>> normalize(net, "conditioned", gain=3.0)[0].weight.detach().norm(dim=1)
    tensor([3.0000, 3.0000, 3.0000, 3.0000])
    """
    check_module(model)
    if name not in NORMALIZERS:
        raise ValueError(f"name is {name!r}, expected one of {list(NORMALIZERS)}.")
    known = NORMALIZERS[name].options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"{unknown} are no options of {name!r}, expected some of {list(known)}."
        )
    for flag in ("output", "detach"):
        if not isinstance(given := options.get(flag, False), bool):
            raise TypeError(f"{flag} is {given!r}, expected True or False.")
    return NORMALIZERS[name].apply(model, skip, **options)


def remove_normalizer(model: nn.Module, *, keep_cp: bool = False) -> nn.Module:
    """Copy a model with stock layers in the place of reparametrised ones.

    The new model computes the same function, in training and in evaluation; after
    spectral norm, whose estimate moves in training, that of evaluation. Norm layers
    stay: they are stock layers, and not all of them could be folded. The given model is
    not touched and works on, also as a copy of another or with copies of its own.

    Args:
        model: Any module, also one without a normalizer.
        keep_cp: Keep CP layers as such, conditioned ones at the same rank with their
            row scales in the factors, instead of storing their kernels.

    Returns:
        A new model.

    Raises:
        TypeError: If a CP layer has hooks, which would be lost.

    >>> layer = normalize(nn.Linear(3, 2), "weight")
    >>> remove_normalizer(layer)
    Linear(in_features=3, out_features=2, bias=True)
    """
    check_module(model)
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CPLayer):
            if not keep_cp:
                layers[name] = layer.to_dense()
            elif isinstance(layer, ConditionedCP):
                layers[name] = layer.plain()
        elif is_weighted(layer) and parametrize.is_parametrized(layer):
            layers[name] = _without_parametrizations(layer)
    new = replace_layers(model, layers)
    if model_hooks(new):
        kept = [hook for hook in model_hooks(new) if not isinstance(hook, Rescaling)]
        new.training_hooks = kept
    return new


@torch.no_grad()
def _without_parametrizations(layer: nn.Module) -> nn.Module:
    """A copy of the class the layer had, holding the tensors that were computed."""
    new = copy.deepcopy(layer).eval()  # spectral norm moves its estimate in training
    # Not remove_parametrizations: it takes the property off the class, which copies of
    # a layer share, and so would break the others.
    computed = {name: getattr(new, name) for name in new.parametrizations}
    trained = {
        name: any(p.requires_grad for p in listed.parameters())
        for name, listed in new.parametrizations.items()
    }
    new.__class__ = parametrize.type_before_parametrizations(layer)
    del new.parametrizations
    _drop_loading_hooks(new)
    others = new._parameters
    new._parameters = {}
    for name, tensor in computed.items():
        new.register_parameter(name, nn.Parameter(tensor.clone(), trained[name]))
    new._parameters |= others
    return new.train(layer.training)


def _drop_loading_hooks(layer: nn.Module) -> None:
    """Take off what weight norm adds to load old files, and cannot be pickled."""
    hooks = layer._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", hook).__module__ == parametrizations.__name__:
            del hooks[key]
