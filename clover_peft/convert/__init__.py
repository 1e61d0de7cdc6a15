"""Conversion of models into other stock classes, which servers load without this package."""

from .mla import convert_to_mla
from .report import ConversionReport
from .stock import save_stock

__all__ = ["ConversionReport", "convert_to_mla", "save_stock"]
