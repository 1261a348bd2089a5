"""Trackers: what a job measures, at MLflow and for TensorBoard.

The driver follows the run, and each tracker has a thread of its own in the driver. The files of the
output, which a resumed run continues, are the only buffer: a tracker that was down gets the rest
from them, in this attempt or in the next one.
"""
