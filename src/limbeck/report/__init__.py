"""Self-contained pages and pictures of what was found."""

from limbeck.report.compare import comparison, write_comparison
from limbeck.report.page import Page
from limbeck.report.run import write_report

__all__ = ["Page", "comparison", "write_comparison", "write_report"]
