"""The reason why a block of a known kind stays rigid."""


class UnsupportedBlockError(Exception):
    """Raised by a finder for a block of its kind that it cannot cut; the message completes "… stays rigid: …"."""
