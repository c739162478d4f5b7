"""Figures and pictures of a run."""

from maskaq_brevitas.quant.cost import multiply_accumulates
from maskaq_brevitas.report.figures import Cost, PlaceFigures, QuantizerFigures, sqnr
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
