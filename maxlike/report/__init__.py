"""The report of a run: one self-contained page and its curves as PNG files."""

from maxlike.report.page import write_report

__all__ = ["write_report"]
