"""The classes that docs/architectures.md calls proven by recording are those of the tiny pipelines."""

import json

import pytest
from recordings.tiny_pipelines import COMPONENT, PIPELINES

from ofadiff.architectures import PROVEN_BY_RECORDING


@pytest.mark.slow
def test_the_classes_proven_by_recording_are_those_of_the_tiny_pipelines(saved):
    indices = {kind: json.loads((saved(kind) / "pipeline" / "model_index.json").read_text()) for kind in PIPELINES}
    classes = {index[COMPONENT[kind]][1] for kind, index in indices.items()}
    assert sorted(classes) == list(PROVEN_BY_RECORDING)
