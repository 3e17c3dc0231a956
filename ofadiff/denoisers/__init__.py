"""Denoisers: one file for each kind says how it is called, and the table of them."""

from ofadiff.denoisers.encoder import Encoder
from ofadiff.denoisers.inputs import example_inputs
from ofadiff.denoisers.kind import DenoiserKind
from ofadiff.denoisers.prepare import DenoiserInputs, Prepare, prepare_batch, prepare_pixels
from ofadiff.denoisers.table import DENOISERS, kind_of_model
from ofadiff.denoisers.zeros import Zeros

__all__ = [
    "DENOISERS",
    "DenoiserInputs",
    "DenoiserKind",
    "Encoder",
    "Prepare",
    "Zeros",
    "example_inputs",
    "kind_of_model",
    "prepare_batch",
    "prepare_pixels",
]
