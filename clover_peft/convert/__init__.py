"""Conversion of models into other classes, which servers load without this package, and into smaller models."""

from .mla import convert_to_mla
from .report import ConversionReport
from .slicing import slice_hidden_size
from .slicing_report import SlicingReport
from .stock import save_stock

__all__ = ["ConversionReport", "SlicingReport", "convert_to_mla", "save_stock", "slice_hidden_size"]
