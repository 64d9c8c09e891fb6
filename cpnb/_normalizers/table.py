"""The table of normalizers: what each does, and the function that does it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cpnb._normalizers import conditioning, data_init, kernels, norm_layers, stock
from cpnb._normalizers.base import refuse_options
from cpnb.initializers import CPForm
from cpnb.ranks import ModelRule, Rank
from cpnb.rescaling import Rescaling, rescale_
from cpnb.surgery import Skip, canonicalize, skip_rule


@dataclass(frozen=True)
class Normalizer:
    """One entry of `NORMALIZERS`.

    Attributes:
        summary: What it does, in a line.
        constrains: What holds before and after every optimizer step.
        keeps_function: Whether the new model, until it is trained, computes what the
            given one does.
        source: Where it comes from.
        apply: Maps a model, what to skip and the options to the new model.
    """

    summary: str
    constrains: str
    keeps_function: bool
    source: str
    apply: Callable[..., nn.Module] = field(repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the keywords that `normalize` takes for it."""
        parameters = inspect.signature(self.apply).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _none(model: nn.Module, skip: Skip) -> nn.Module:
    skip_rule(model, skip)  # refuses what is no layer
    return copy.deepcopy(model)


def _scaling(
    model: nn.Module,
    skip: Skip,
    *,
    mode: str = "unit",
    c: float = 1.0,
    every: int | str = 1,
    before_norm: bool = False,
) -> nn.Module:
    why = "for 'scaling', which moves weights from each layer into the next"
    refuse_options(model, why, skip, output=False)
    hook = Rescaling(mode, c, every=every, before_norm=before_norm)
    new = copy.deepcopy(model)
    rescale_(new, mode=mode, c=c, before_norm=before_norm)
    new.training_hooks = [*getattr(new, "training_hooks", ()), hook]
    return new


def _canonical(
    model: nn.Module,
    skip: Skip,
    *,
    rank: Rank | ModelRule | Mapping[str, Rank | ModelRule] = "same",
    init: str | Callable[..., CPForm] = "unified",
    generator: torch.Generator | None = None,
) -> nn.Module:
    return canonicalize(model, rank=rank, init=init, skip=skip, generator=generator)


NORMALIZERS = {
    "none": Normalizer(
        "A copy of the model, to compare with.", "nothing", True, "-", _none
    ),
    "batch": Normalizer(
        "A batch norm layer behind every layer but the output.",
        "mean β and deviation |γ| of every channel over the batch, in training",
        False,
        "Ioffe, Szegedy 2015, arXiv:1502.03167",
        norm_layers.batch,
    ),
    "group": Normalizer(
        "A group norm layer behind every layer but the output.",
        "mean and deviation over some channels of one image",
        False,
        "Wu, He 2018, arXiv:1803.08494",
        norm_layers.group,
    ),
    "layer": Normalizer(
        "A layer norm behind every layer but the output.",
        "mean and deviation over all channels of one image",
        False,
        "Ba, Kiros, Hinton 2016, arXiv:1607.06450",
        norm_layers.layer,
    ),
    "weight": Normalizer(
        "W = g v/‖v‖ for every output, torch's.",
        "nothing; separates the length g of a row from its direction v",
        True,
        "Salimans, Kingma 2016, arXiv:1602.07868",
        stock.weight,
    ),
    "weight_data_init": Normalizer(
        "The same with new weights, g and bias from a batch of images.",
        "nothing; at the start the outputs on the batch have mean 0 and variance 1 "
        "(variance alone in a layer without bias)",
        False,
        "Salimans, Kingma 2016, arXiv:1602.07868, section 3",
        data_init.weight_data_init,
    ),
    "spectral": Normalizer(
        "W = V/‖V‖₂, by power iteration, torch's; the scale is lost.",
        "largest singular value 1 of the (out, fan_in) matrix, to the accuracy of the "
        "iteration; not that of the convolution",
        False,
        "Miyato, Kataoka, Koyama, Yoshida 2018, arXiv:1802.05957",
        stock.spectral,
    ),
    "orthogonal": Normalizer(
        "W = gain · Q, Q from a QR decomposition per group; the gain keeps the scale, "
        "which torch's own loses.",
        "orthonormal rows of W / gain, or columns where there are fewer",
        False,
        "torch.nn.utils.parametrizations.orthogonal; Lezcano-Casado 2019, "
        "arXiv:1909.09501",
        kernels.orthogonal,
    ),
    "standardized": Normalizer(
        "W = (V − mean)/(deviation + 1e-5) for every output, before a norm layer.",
        "mean 0 and standard deviation 1 of every row",
        False,
        "Qiao, Wang, Liu, Shen, Yuille 2019, arXiv:1903.10520",
        kernels.standardized,
    ),
    "centered": Normalizer(
        "W = g (v − mean)/‖v − mean‖ for every output: weight norm, centred.",
        "mean 0 and norm |g| of every row",
        False,
        "Huang, Liu, Liu, Lang, Tao 2017, doi:10.1109/ICCV.2017.305",
        kernels.centered,
    ),
    "oni": Normalizer(
        "Centred rows, orthogonalised by Newton's iteration, times a gain, per group.",
        "no singular value of W / gain above 1, the large ones close to it",
        False,
        "Huang, Liu, Zhu, Wan, Yuan, Shao 2020, arXiv:2004.00917",
        kernels.oni,
    ),
    "conditioned": Normalizer(
        "W = gain · EV with E from the norms of V's rows, columns or both; also for CP "
        "layers.",
        "equal norms of all rows, or columns, of each group's matrix; the root mean "
        "square of the row norms is the gain",
        False,
        "Saratchandran, Wang, Lucey 2024, arXiv:2409.03424",
        conditioning.conditioned,
    ),
    "scaling": Normalizer(
        "Weights moved along the symmetry of ReLU, now and after training steps; "
        "re-derived from the abstract.",
        "norm c of every hidden row (unit), or rows as long as the columns that read "
        "them (balanced)",
        True,
        "Yuan, Xiao 2019, doi:10.1109/ACCESS.2018.2890373",
        _scaling,
    ),
    "canonical": Normalizer(
        "Every layer in CP form, W = σ Σ_r λ_r â_r∘b̂_r∘ĉ_r∘d̂_r.",
        "rank of the kernel; columns of norm 1",
        False,
        "Veeramacheneni, Wolter, Klein, Garcke 2022, arXiv:2206.01509",
        _canonical,
    ),
}
