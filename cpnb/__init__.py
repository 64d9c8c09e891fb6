"""cpnb: train, truncate and explore canonical (CP-decomposed) neural networks.

Importing it loads torch and numpy only; what needs more loads it when first used.
"""

from importlib import import_module
from typing import Any

from cpnb.allocation import RankAllocation, RankChoice, allocate_ranks
from cpnb.als import als
from cpnb.augmentation import Augment
from cpnb.base import CPLayer
from cpnb.bounded import bounded_als
from cpnb.budgets import FlopRatio, ParameterRatio
from cpnb.checkpoints import load_weights, save_model
from cpnb.comparison import Comparison, compare
from cpnb.conv import CPConv1d, CPConv2d, CPConv3d
from cpnb.cp import (
    canonical_gauge,
    component_gram,
    cp_norm,
    cp_to_kernel,
    khatri_rao,
    normalize_columns,
    relative_error,
)
from cpnb.data import Dataset, Split, load_data, standardize
from cpnb.data_aware import data_aware, data_aware_als, input_covariance
from cpnb.decay import param_groups
from cpnb.decomposition import CPResult, DecompositionInfo, power_method
from cpnb.diagnostics import (
    Degeneracy,
    DegeneracyReport,
    HessianEigenvalue,
    LossSlice,
    SignalReport,
    Spectrum,
    SpectrumReport,
    StepReport,
    circular_lipschitz,
    degeneracy,
    degeneracy_report,
    filter_directions,
    gram_lipschitz,
    loss_slice,
    signal_report,
    spectrum,
    spectrum_report,
    step_report,
    top_hessian_eigenvalue,
)
from cpnb.evaluation import accuracy, evaluate
from cpnb.factorization import factorize, first_and_last
from cpnb.fine_tuning import TruncationStage, fine_tune, truncate_gradually
from cpnb.frobenius import FrobeniusDecay, frobenius_decay
from cpnb.hooks import Hook
from cpnb.importance import component_order
from cpnb.initializers import INITIALIZERS, gaussian, unified, uniform
from cpnb.keys import KeyComparison, compare_keys
from cpnb.linear import CPLinear
from cpnb.lowrank import LowRankConv2d, LowRankLinear
from cpnb.models import AlexNet, DigitsNet, LeNet
from cpnb.nested import NestedRank
from cpnb.normalizers import NORMALIZERS, Normalizer, normalize, remove_normalizer
from cpnb.nuclear import FactorNorms, factor_norms
from cpnb.probing import output_gram
from cpnb.proximal import ProximalL1, nonzero_ranks
from cpnb.ranks import break_even_rank, resolve_rank
from cpnb.recipes import Recipe
from cpnb.report import TruncationReport, truncation_report
from cpnb.rescaling import Rescaling, RescalingReport, rescale_
from cpnb.resnet import VGG, ResNet
from cpnb.rules import EffectiveRank, EnergyRank, FitRank
from cpnb.surgery import canonicalize, cp_layers, from_layer, to_dense
from cpnb.sweep import RankSweep, rank_sweep
from cpnb.tai import tai, tai_decompose
from cpnb.training import Run, fast_mode, fit
from cpnb.truncation import kept_rank, select_components, truncate
from cpnb.unified import unified_variance

__version__ = "0.1.0"

# Pictures and widgets bring matplotlib and ipywidgets with them: loaded when asked for.
_LAZY = {
    "CurveExplorer": lambda: import_module("cpnb._explorer.curves").CurveExplorer,
    "DegeneracyExplorer": lambda: (
        import_module("cpnb._explorer.degeneracy").DegeneracyExplorer
    ),
    "RankExplorer": lambda: import_module("cpnb.widgets").RankExplorer,
    "ScaleExplorer": lambda: import_module("cpnb._explorer.scale").ScaleExplorer,
    "plots": lambda: import_module("cpnb.plots"),
}

__all__ = [
    "INITIALIZERS",
    "NORMALIZERS",
    "VGG",
    "AlexNet",
    "Augment",
    "CPConv1d",
    "CPConv2d",
    "CPConv3d",
    "CPLayer",
    "CPLinear",
    "CPResult",
    "Comparison",
    "CurveExplorer",
    "Dataset",
    "DecompositionInfo",
    "Degeneracy",
    "DegeneracyExplorer",
    "DegeneracyReport",
    "DigitsNet",
    "EffectiveRank",
    "EnergyRank",
    "FactorNorms",
    "FitRank",
    "FlopRatio",
    "FrobeniusDecay",
    "HessianEigenvalue",
    "Hook",
    "KeyComparison",
    "LeNet",
    "LossSlice",
    "LowRankConv2d",
    "LowRankLinear",
    "NestedRank",
    "Normalizer",
    "ParameterRatio",
    "ProximalL1",
    "RankAllocation",
    "RankChoice",
    "RankExplorer",
    "RankSweep",
    "Recipe",
    "ResNet",
    "Rescaling",
    "RescalingReport",
    "Run",
    "ScaleExplorer",
    "SignalReport",
    "Spectrum",
    "SpectrumReport",
    "Split",
    "StepReport",
    "TruncationReport",
    "TruncationStage",
    "accuracy",
    "allocate_ranks",
    "als",
    "bounded_als",
    "break_even_rank",
    "canonical_gauge",
    "canonicalize",
    "circular_lipschitz",
    "compare",
    "compare_keys",
    "component_gram",
    "component_order",
    "cp_layers",
    "cp_norm",
    "cp_to_kernel",
    "data_aware",
    "data_aware_als",
    "degeneracy",
    "degeneracy_report",
    "evaluate",
    "factor_norms",
    "factorize",
    "fast_mode",
    "filter_directions",
    "fine_tune",
    "first_and_last",
    "fit",
    "frobenius_decay",
    "from_layer",
    "gaussian",
    "gram_lipschitz",
    "input_covariance",
    "kept_rank",
    "khatri_rao",
    "load_data",
    "load_weights",
    "loss_slice",
    "nonzero_ranks",
    "normalize",
    "normalize_columns",
    "output_gram",
    "param_groups",
    "plots",
    "power_method",
    "rank_sweep",
    "relative_error",
    "remove_normalizer",
    "rescale_",
    "resolve_rank",
    "save_model",
    "select_components",
    "signal_report",
    "spectrum",
    "spectrum_report",
    "standardize",
    "step_report",
    "tai",
    "tai_decompose",
    "to_dense",
    "top_hessian_eigenvalue",
    "truncate",
    "truncate_gradually",
    "truncation_report",
    "unified",
    "unified_variance",
    "uniform",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return _LAZY[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
