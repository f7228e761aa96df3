"""Studies: every criterion at every sparsity on networks of several seeds, against chance."""

from purepruning_interop.study.compare import Comparison, compared
from purepruning_interop.study.criteria import CRITERIA, Criterion, Method, methods_of
from purepruning_interop.study.driver import SPARSITIES, Study, run_study
from purepruning_interop.study.page import report_of

__all__ = [
    # Doing one.
    "run_study",
    "Study",
    "SPARSITIES",
    # What is compared.
    "CRITERIA",
    "Criterion",
    "Method",
    "methods_of",
    # What came of it.
    "compared",
    "Comparison",
    "report_of",
]
