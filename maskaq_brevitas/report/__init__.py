"""Figures and pictures of a run."""

from maskaq_brevitas.quant.cost import multiply_accumulates
from maskaq_brevitas.report.figures import Cost
from maskaq_brevitas.report.figures import PlaceFigures
from maskaq_brevitas.report.figures import QuantizerFigures
from maskaq_brevitas.report.figures import sqnr
from maskaq_brevitas.report.report import AccuracyRow
from maskaq_brevitas.report.report import Report
from maskaq_brevitas.report.report import make_report

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
