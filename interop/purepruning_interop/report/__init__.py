"""Reports of runs and studies: one page of HTML that needs nothing else, not even a network."""

from purepruning_interop.report.contents import (
    Column,
    Commands,
    Curves,
    Facts,
    Profile,
    Report,
    Series,
    Table,
    View,
    colored,
)
from purepruning_interop.report.page import render, write_report

__all__ = [
    "render",
    "write_report",
    # What is in one.
    "Report",
    "Curves",
    "View",
    "Series",
    "colored",
    "Table",
    "Column",
    "Profile",
    "Facts",
    "Commands",
]
