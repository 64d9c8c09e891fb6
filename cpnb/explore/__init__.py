"""Look at networks: what their ranks cost, how their loss lies, and figures of it.

- ranks: `rank_sweep`, `RankSweep`, `RankExplorer`, `allocate_ranks`, `rank_front`,
  `truncation_report`
- speed: `cost_table`, `to_chain`
- diagnostics: `spectrum`, `spectrum_report`, `step_spectrum`,
  `top_hessian_eigenvalue`
- figures: `plots`; a slider for a drawing function of your own: `explore`
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cpnb.explore import plots
from cpnb.explore.allocation import RankChoice, allocate_ranks, rank_front
from cpnb.explore.diagnostics import (
    spectrum,
    spectrum_report,
    step_spectrum,
    top_hessian_eigenvalue,
)
from cpnb.explore.report import cost_table, to_chain, truncation_report
from cpnb.explore.sweep import RankSweep, rank_sweep

if TYPE_CHECKING:
    from cpnb.explore.rank_explorer import RankExplorer
    from cpnb.explore.widgets import explore

__all__ = [
    "RankChoice", "RankExplorer", "RankSweep", "allocate_ranks", "cost_table",
    "explore", "plots", "rank_front", "rank_sweep", "spectrum",
    "spectrum_report", "step_spectrum", "to_chain", "top_hessian_eigenvalue",
    "truncation_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # these need ipywidgets and anywidget
    modules = {"RankExplorer": "rank_explorer", "explore": "widgets"}
    if name in modules:
        return getattr(import_module(f"cpnb.explore.{modules[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
