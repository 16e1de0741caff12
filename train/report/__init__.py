"""A run as one HTML page, or several beside one another; `python -m train.report`."""

from train.report.pages import compare, write

__all__ = ["compare", "write"]
