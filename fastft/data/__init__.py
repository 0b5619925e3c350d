"""Data sets: opening, mixing, loading and checking them."""

from fastft.data.checks import check_data as check_data
from fastft.data.checks import describe_findings as describe_findings
from fastft.data.loader import SourceLoader as SourceLoader
from fastft.data.loader import open_evaluation as open_evaluation
from fastft.data.loader import open_loader as open_loader
