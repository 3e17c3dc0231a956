"""Recordings: what a denoiser was called with in its own pipeline, and what it answered."""

from ofadiff.recordings.folder import Recordings, check_same_model
from ofadiff.recordings.joining import join
from ofadiff.recordings.recorded_call import RecordedCall, RecordedKeywords, answer_rows
from ofadiff.recordings.samples import RecordedSamples

__all__ = [
    "RecordedCall",
    "RecordedKeywords",
    "RecordedSamples",
    "Recordings",
    "answer_rows",
    "check_same_model",
    "join",
]
