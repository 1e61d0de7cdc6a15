"""Rewrites models into other classes, or into smaller models, that other programs load."""

from .stock import save_stock

__all__ = ["save_stock"]
