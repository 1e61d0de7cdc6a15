"""Rewrites models into other classes, or into smaller models, that other programs load."""

from .slicing import slice_hidden_size
from .slicing_report import SlicingReport
from .stock import save_stock

__all__ = ["SlicingReport", "save_stock", "slice_hidden_size"]
