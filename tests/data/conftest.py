"""What the tests of data share."""

from training.conftest import data  # noqa: F401
