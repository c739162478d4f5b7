"""Figures and pictures of a run."""

from maskaq_brevitas.report.figures import Cost, PlaceFigures, QuantizerFigures, multiply_accumulates, sqnr
from maskaq_brevitas.report.report import AccuracyRow, Report, make_report

__all__ = [
    "AccuracyRow",
    "Cost",
    "PlaceFigures",
    "QuantizerFigures",
    "Report",
    "make_report",
    "multiply_accumulates",
    "sqnr",
]
