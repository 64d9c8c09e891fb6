"""Every way to normalise a network: one entry of `NORMALIZERS` adds one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import is_parametrized

from cpnb.convert import (
    CP_KINDS,
    Skip,
    canonicalize,
    has_hooks,
    layers_to_convert,
    replace_layers,
    skip_rule,
    to_dense,
)
from cpnb.layers import CPLayer, FactoredLayer, evaluation_mode
from cpnb.methods.conditioning import RELU_GAIN, condition_, reparametrize_
from cpnb.methods.scaling import Rescaling, rescale_

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # a row for every output
_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def normalize(
    model: nn.Module,
    name: str,
    *,
    skip: Skip = (),
    generator: torch.Generator | None = None,
    **options: Any,
) -> nn.Module:
    """Copy a model with its convolution and linear layers normalised.

    CP layers are taken by ``"batch"``, ``"conditioned"``, ``"scaling"`` and
    ``"canonical"``, low-rank layers by ``"batch"`` and ``"scaling"``. Most names put
    torch's parametrizations on the kernels; such layers can be copied and saved, but
    not pickled before `remove_normalizer`. Options, with defaults:

    - ``"oni"``: ``iterations=5``, ``gain=√2``.
    - ``"conditioned"``: ``mode="row"``, ``gain=√2``; see
      `cpnb.methods.conditioning.condition_`.
    - ``"scaling"``: ``data``, ``mode="unit"``, ``c=1.0``, ``every=1``; see `Rescaling`,
      which the new model carries along in ``training_hooks`` for `cpnb.fit`.
    - ``"canonical"``: ``rank`` and ``init`` of `cpnb.canonicalize`.

    Args:
        model: Any module, also a single layer.
        name: A key of `NORMALIZERS`.
        skip: Names of layers to leave alone, or a predicate ``(name, layer) -> bool``.
        generator: Source of randomness; torch's default one if None.
        **options: As above.

    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> normalize(net, "conditioned", gain=3.0)[0].weight.detach().norm(dim=1)
    tensor([3.0000, 3.0000, 3.0000, 3.0000])
    """
    if name not in NORMALIZERS:
        raise ValueError(f"name is {name!r}, expected one of {list(NORMALIZERS)}.")
    return NORMALIZERS[name](model, skip, generator, **options)


def remove_normalizer(model: nn.Module, *, keep_cp: bool = False) -> nn.Module:
    """Copy a model with stock layers in the place of reparametrised ones.

    It computes the same function; hooks of a reparametrised layer are refused.

    Args:
        model: Any module, also one without a normalizer.
        keep_cp: Keep CP layers as such, conditioned ones with their row scales in the
            factors, instead of storing their kernels.

    >>> remove_normalizer(normalize(nn.Linear(3, 2), "weight"))
    Linear(in_features=3, out_features=2, bias=True)
    """
    layers = {}
    for name, layer in model.named_modules():
        plain = _without_parametrizations(name, layer)
        if isinstance(layer, CPLayer) and not keep_cp:
            plain = to_dense(plain)
        if plain is not layer:
            layers[name] = plain
    new: Any = replace_layers(model, layers)
    if hooks := getattr(new, "training_hooks", []):
        new.training_hooks = [h for h in hooks if not isinstance(h, Rescaling)]
    return new


@torch.no_grad()
def _without_parametrizations(name: str, layer: Any) -> Any:
    """A plain layer that holds the tensors that were computed, or the layer itself."""
    kind: Any = parametrize.type_before_parametrizations(layer)
    canonical = issubclass(kind, CPLayer)
    if kind is type(layer) or not (canonical or kind in CP_KINDS):
        return layer
    if has_hooks(layer) or "forward" in vars(layer):
        raise TypeError(
            f"layer {name!r} is a {kind.__name__} with hooks or a forward of its own, "
            "which would be lost. Remove them first."
        )
    # Not remove_parametrizations: it takes the property off the class, which copies of
    # a layer share, and so would break the others.
    like = next(layer.parameters())
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    if canonical:
        options |= {"rank": layer.rank, "signed": layer.signed}
        options |= {"forward_mode": layer.forward_mode, "generator": torch.Generator()}
        new: Any = kind(*kind.arguments(layer), **options)
    else:
        new = nn.utils.skip_init(kind, *CP_KINDS[kind].arguments(layer), **options)
    with evaluation_mode(layer):  # spectral norm moves its estimate in training
        for name, parameter in new.named_parameters():
            path, _, last = name.rpartition(".")
            owner: Any = layer.get_submodule(path)
            parameter.copy_(getattr(owner, last))
            made_of = [getattr(owner, last)]
            if is_parametrized(owner, last):
                made_of = owner.parametrizations[last].parameters()
            parameter.requires_grad_(any(p.requires_grad for p in made_of))
    if canonical:  # in a conditioned layer σ is the gain, and not trained
        new.unit.copy_(layer.unit)
        new.scale.requires_grad_(new.lam.requires_grad)
        new.init = layer.init
    return new.train(layer.training)


def _per_layer(
    normalise: Callable[..., Any],
    *,
    factored: type[nn.Module] | tuple[()] = (),
    output: bool = True,
) -> Callable[..., nn.Module]:
    """Turn a function of a layer into one of a model, a ``function`` of the table.

    Args:
        normalise: Changes a copy of a layer, or returns another for it.
        factored: The factored layers that it takes, too.
        output: Whether to take the last layer of a model, too.
    """

    def function(
        model: nn.Module, skip: Skip, generator: torch.Generator | None, **options: Any
    ) -> nn.Module:
        skipped = skip_rule(model, skip)
        chosen: dict[str, Any] = layers_to_convert(model, skip, _KINDS)
        kinds = (*CP_KINDS, FactoredLayer)
        weighted = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
        for name, layer in weighted.items():
            if isinstance(layer, FactoredLayer) and not skipped(name, layer):
                known = isinstance(layer, factored) and type(layer).stock in _KINDS
                if not known or is_parametrized(layer):
                    raise TypeError(
                        f"layer {name!r} is a {type(layer).__name__}, whose kernel is "
                        "computed anew in each forward, expected a dense layer. Call "
                        "remove_normalizer first, or pass the layer in skip."
                    )
                chosen[name] = layer
        if not output and "" not in weighted:
            chosen.pop([*weighted][-1], None)
        if not chosen:
            raise ValueError(
                f"model is a {type(model).__name__} with no convolution or linear "
                "layer to normalise. Check the model and skip."
            )
        for name in chosen:
            layer = copy.deepcopy(chosen[name])
            chosen[name] = normalise(layer, **options) or layer
        return replace_layers(model, chosen)

    return function


def _batch(
    model: nn.Module, skip: Skip, generator: torch.Generator | None
) -> nn.Module:
    def followed(layer: Any) -> nn.Module:
        norm = _BATCH_NORMS[max(1, len(layer.weight.shape) - 2)](len(layer.weight))
        norm = norm.to(next(layer.parameters()))
        return nn.Sequential(layer, norm).train(layer.training)

    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return replace_layers(model, {})
    behind_layers = _per_layer(followed, factored=FactoredLayer, output=False)
    return behind_layers(model, skip, generator)


def orthogonalized(matrix: Tensor, iterations: int) -> Tensor:
    """Centre rows, then push all singular values up towards 1, none above (ONI).

    ``S = ZZᵀ + 1e-5 I`` of the centred Z, over its norm; ``B ← 1.5 B − 0.5 B³S`` from
    the identity, towards ``S^(−1/2)``; then ``BZ``. With more rows than columns the
    same from the right, with ZᵀZ.
    """
    centered = matrix - matrix.mean(-1, keepdim=True)
    tall = matrix.shape[-2] > matrix.shape[-1]
    flat = centered.mT if tall else centered
    eye = torch.eye(flat.shape[-2], dtype=matrix.dtype, device=matrix.device)
    gram = flat @ flat.mT + 1e-5 * eye
    norm = torch.linalg.matrix_norm(gram, keepdim=True)
    gram = gram / norm
    # The same B with Y = BS beside it: B alone loses what BS = SB, and diverges in
    # float32 within ten steps (Higham 2008, Functions of Matrices, chapter 6).
    root = 1.5 * eye - 0.5 * gram
    product = gram @ root
    for _ in range(1, iterations):
        step = 1.5 * eye - 0.5 * root @ product
        root = step @ root
        product = product @ step
    flat = root @ flat / norm.sqrt()
    return flat.mT if tall else flat


def _oni(layer: Any, iterations: int = 5, gain: float = RELU_GAIN) -> None:
    reparametrize_(layer, gain, partial(orthogonalized, iterations=iterations))


def _scaling(
    model: nn.Module,
    skip: Skip,
    generator: torch.Generator | None,
    data: Tensor,
    mode: str = "unit",
    c: float = 1.0,
    every: int | str = 1,
) -> nn.Module:
    if skip != ():
        raise ValueError(
            f"skip is {skip!r}, expected none for 'scaling', which moves weights from "
            "each layer into the next."
        )
    new: Any = replace_layers(model, {})
    rescale_(new, data, mode=mode, c=c)
    hook = Rescaling(data, mode, c, every)
    new.training_hooks = [*getattr(new, "training_hooks", []), hook]
    return new


# Called as ``function(model, skip, generator, **options)``.
NORMALIZERS: dict[str, Callable[..., nn.Module]] = {
    # A copy of the model, to compare with.
    "none": lambda model, skip, generator: replace_layers(model, {}),
    # Behind every layer but the output; a model that has batch norm stays as it is.
    # Ioffe, Szegedy 2015, arXiv:1502.03167.
    "batch": _batch,
    # W = g v/‖v‖ for every output, length and direction apart; torch's. Salimans,
    # Kingma 2016, arXiv:1602.07868.
    "weight": _per_layer(parametrizations.weight_norm),
    # Centred rows, orthogonalised by Newton's iteration, times a gain. Huang et al.
    # 2020, arXiv:2004.00917.
    "oni": _per_layer(_oni),
    # W = gain · EV with E from the norms of V's rows, columns or both, see
    # `cpnb.methods.conditioning`.
    "conditioned": _per_layer(condition_, factored=CPLayer),
    # Weights moved along the symmetry of ReLU, now and after training steps (SBWN),
    # see `cpnb.methods.scaling`.
    "scaling": _scaling,
    # CWN: every layer in CP form, W = σ Σ_r λ_r â_r∘b̂_r∘ĉ_r∘d̂_r. Veeramacheneni et
    # al. 2022, arXiv:2206.01509.
    "canonical": lambda model, skip, generator, **options: canonicalize(
        model, skip=skip, generator=generator, **options
    ),
}
