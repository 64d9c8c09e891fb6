"""Every way to normalise a network: one entry of `NORMALIZERS` adds one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import is_parametrized

from cpnb.convert import (
    CP_KINDS,
    Skip,
    canonicalize,
    layers_to_convert,
    replace_layers,
    skip_rule,
    to_dense,
)
from cpnb.layers import CPLayer, FactoredLayer, evaluation_mode
from cpnb.methods.conditioning import RELU_GAIN, condition_, reparametrize_
from cpnb.methods.scaling import Rescaling, rescale_

_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_FIRST_ITERATIONS = 15  # of the power method, as torch takes them at the start
_EPSILON = 1e-8  # of the paper of weight norm, beside the variance


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

    - ``"weight_data_init"``: ``data``, a batch of standardised images.
    - ``"standardized"``: ``gain=None`` for rows of standard deviation 1, which want a
      norm layer behind them; a number divides by √fan_in, too, and does without.
    - ``"oni"``: ``iterations=5``, ``gain=√2``.
    - ``"conditioned"``: ``mode="row"``, ``detach=False``, ``gain=√2``; see
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
    return NORMALIZERS[name].function(model, skip, generator, **options)


def remove_normalizer(model: nn.Module, *, keep_cp: bool = False) -> nn.Module:
    """Copy a model with stock layers in the place of reparametrised ones.

    It computes the same function, after spectral norm that of evaluation.

    Args:
        model: Any module, also one without a normalizer.
        keep_cp: Keep CP layers as such, conditioned ones with their row scales in the
            factors, instead of storing their kernels.

    >>> remove_normalizer(normalize(nn.Linear(3, 2), "weight"))
    Linear(in_features=3, out_features=2, bias=True)
    """
    layers = {}
    for name, layer in model.named_modules():
        plain = _without_parametrizations(layer)
        if isinstance(layer, CPLayer) and not keep_cp:
            plain = to_dense(plain)
        if plain is not layer:
            layers[name] = plain
    new: Any = replace_layers(model, layers)
    if hooks := getattr(new, "training_hooks", []):
        new.training_hooks = [h for h in hooks if not isinstance(h, Rescaling)]
    return new


@torch.no_grad()
def _without_parametrizations(layer: Any) -> Any:
    """A plain layer that holds the tensors that were computed, or the layer itself."""
    kind: Any = parametrize.type_before_parametrizations(layer)
    canonical = issubclass(kind, CPLayer)
    if kind is type(layer) or not (canonical or kind in CP_KINDS):
        return layer
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
    return new.train(layer.training)


def _per_layer(
    normalise: Callable[..., nn.Module | None],
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
        chosen: dict[str, Any] = layers_to_convert(model, skip, CP_KINDS)
        kinds = (*CP_KINDS, FactoredLayer)
        weighted = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
        for name, layer in weighted.items():
            if isinstance(layer, FactoredLayer) and not skipped(name, layer):
                if not isinstance(layer, factored) or is_parametrized(layer):
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
        for name in [name for name in weighted if name in chosen]:  # draws in order
            layer = copy.deepcopy(chosen[name])
            chosen[name] = normalise(layer, generator, **options) or layer
        return replace_layers(model, chosen)

    return function


def _batch(
    model: nn.Module, skip: Skip, generator: torch.Generator | None
) -> nn.Module:
    def followed(layer: Any, generator: torch.Generator | None) -> nn.Module:
        norm = _BATCH_NORMS[max(1, len(layer.weight.shape) - 2)](len(layer.weight))
        norm = norm.to(next(layer.parameters()))
        return nn.Sequential(layer, norm).train(layer.training)

    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return copy.deepcopy(model)
    behind_layers = _per_layer(followed, factored=FactoredLayer, output=False)
    return behind_layers(model, skip, generator)


def _weight(layer: Any, generator: torch.Generator | None) -> None:
    parametrizations.weight_norm(layer, dim=0)


@torch.no_grad()
def _weight_data_init(
    model: nn.Module, skip: Skip, generator: torch.Generator | None, data: Tensor
) -> nn.Module:
    """Start v at random, then g and the bias so that outputs are standardised."""
    new = _per_layer(_weight)(model, skip, generator)
    handles: dict[nn.Module, Any] = {}

    def standardize_output(layer: Any, inputs: Any, output: Tensor) -> Tensor:
        handles.pop(layer).remove()
        axis = 1 if hasattr(layer, "in_channels") else output.ndim - 1
        others = [n for n in range(output.ndim) if n != axis]
        variance, mean = torch.var_mean(output, others, correction=0, keepdim=True)
        g = (variance + _EPSILON).rsqrt()
        length = layer.parametrizations["weight"].original0
        length.mul_(g.view(length.shape))
        if layer.bias is None:
            return output * g
        layer.bias.copy_((-mean * g).flatten())
        return (output - mean) * g

    parametrized: list[Any] = [m for m in new.modules() if is_parametrized(m)]
    for layer in parametrized:
        kernel = layer.parametrizations["weight"]
        drawn = _normal(kernel.original1.shape, generator, kernel.original1)
        kernel.original1.copy_(0.05 * drawn)
        kernel.original0.fill_(1)
        if layer.bias is not None:
            layer.bias.zero_()
        handles[layer] = layer.register_forward_hook(standardize_output)
    with evaluation_mode(new):  # no dropout, and batch norm as it is stored
        new(data.to(next(new.parameters())))
    return new


def _normal(
    size: Sequence[int], generator: torch.Generator | None, like: Tensor
) -> Tensor:
    """As torch's own starts, drawn in the dtype of ``like``."""
    device = like.device if generator is None else generator.device
    drawn = torch.randn(*size, generator=generator, device=device, dtype=like.dtype)
    return drawn.to(like.device)


def _spectral(layer: Any, generator: torch.Generator | None) -> None:
    if generator is None:
        parametrizations.spectral_norm(layer)
        return
    # On the meta device torch's constructor draws nothing from its own generator.
    shell: Any = parametrizations.spectral_norm(copy.deepcopy(layer).to("meta"))
    norm = shell.parametrizations["weight"][0]
    matrix = layer.weight.detach().flatten(1)
    u, v = (_normal((size,), generator, matrix) for size in matrix.shape)
    norm._u = F.normalize(u, dim=0)
    norm._v = F.normalize(v, dim=0)
    norm._power_method(matrix, _FIRST_ITERATIONS)
    parametrize.register_parametrization(layer, "weight", norm)


def standardized(matrix: Tensor) -> Tensor:
    """Rows of mean 0, over their standard deviation (of a sample) plus 1e-5."""
    centered = matrix - matrix.mean(-1, keepdim=True)
    variance = centered.square().sum(-1, keepdim=True) / (matrix.shape[-1] - 1)
    alive = variance > 0  # the root has no gradient at 0
    deviation = torch.where(alive, variance, 1).sqrt() * alive
    return centered / (deviation + 1e-5)


def _standardized(
    layer: Any, generator: torch.Generator | None, gain: float | None = None
) -> None:
    factor = 1.0 if gain is None else gain / math.sqrt(layer.weight[0].numel())
    reparametrize_(layer, factor, standardized)


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


def _oni(
    layer: Any,
    generator: torch.Generator | None,
    iterations: int = 5,
    gain: float = RELU_GAIN,
) -> None:
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
    new: Any = copy.deepcopy(model)
    rescale_(new, data, mode=mode, c=c)
    hook = Rescaling(data, mode, c, every)
    new.training_hooks = [*getattr(new, "training_hooks", []), hook]
    return new


def _conditioned(layer: Any, generator: torch.Generator | None, **options: Any) -> None:
    condition_(layer, **options)


def _canonical(
    model: nn.Module, skip: Skip, generator: torch.Generator | None, **options: Any
) -> nn.Module:
    return canonicalize(model, skip=skip, generator=generator, **options)


@dataclass(frozen=True)
class Normalizer:
    """An entry of `NORMALIZERS`: ``function(model, skip, generator, **options)``."""

    function: Callable[..., nn.Module]
    needs_data: bool = False  # whether it takes ``data``, a batch of images


NORMALIZERS: dict[str, Normalizer] = {
    # A copy of the model, to compare with.
    "none": Normalizer(lambda model, skip, generator: copy.deepcopy(model)),
    # Behind every layer but the output; a model that has batch norm stays as it is.
    # Ioffe, Szegedy 2015, arXiv:1502.03167.
    "batch": Normalizer(_batch),
    # W = g v/‖v‖ for every output, length and direction apart; torch's. Salimans,
    # Kingma 2016, arXiv:1602.07868.
    "weight": Normalizer(_per_layer(_weight)),
    # The same with new weights, g and bias such that at the start the outputs on a
    # batch have mean 0 and variance 1. Ibid., section 3.
    "weight_data_init": Normalizer(_weight_data_init, needs_data=True),
    # W = V/‖V‖₂ of the (out, fan_in) matrix by power iteration, torch's; the scale is
    # lost. Miyato et al. 2018, arXiv:1802.05957.
    "spectral": Normalizer(_per_layer(_spectral)),
    # W = (V − mean)/(deviation + 1e-5) for every output but the last layer's, before a
    # norm layer. Qiao et al. 2019, arXiv:1903.10520.
    "standardized": Normalizer(_per_layer(_standardized, output=False)),
    # Centred rows, orthogonalised by Newton's iteration, times a gain. Huang et al.
    # 2020, arXiv:2004.00917.
    "oni": Normalizer(_per_layer(_oni)),
    # W = gain · EV with E from the norms of V's rows, columns or both, see
    # `cpnb.methods.conditioning`.
    "conditioned": Normalizer(_per_layer(_conditioned, factored=CPLayer)),
    # Weights moved along the symmetry of ReLU, now and after training steps (SBWN),
    # see `cpnb.methods.scaling`.
    "scaling": Normalizer(_scaling, needs_data=True),
    # CWN: every layer in CP form, W = σ Σ_r λ_r â_r∘b̂_r∘ĉ_r∘d̂_r. Veeramacheneni et
    # al. 2022, arXiv:2206.01509.
    "canonical": Normalizer(_canonical),
}
