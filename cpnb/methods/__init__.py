"""What canonical networks are compared with and helped by; each file says its own."""

from cpnb.methods.degeneracy import Degeneracy, degeneracy
from cpnb.methods.factorized import (
    FrobeniusDecay,
    LowRankConv2d,
    LowRankLinear,
    ProximalL1,
    factor_norms,
    factorize,
    first_and_last,
    frobenius_decay,
)
from cpnb.methods.normalizers import NORMALIZERS, normalize, remove_normalizer
from cpnb.methods.ranks import NestedRank, fit_rank, ranks_for
from cpnb.methods.scaling import Rescaling, rescale_
from cpnb.methods.tensor_formats import FORMATS, TensorFormat, unified_variance

__all__ = [
    "FORMATS", "NORMALIZERS", "Degeneracy", "FrobeniusDecay", "LowRankConv2d",
    "LowRankLinear", "NestedRank", "ProximalL1", "Rescaling", "TensorFormat",
    "degeneracy", "factor_norms", "factorize", "first_and_last",
    "fit_rank", "frobenius_decay", "normalize", "ranks_for",
    "remove_normalizer", "rescale_", "unified_variance",
]  # fmt: skip
