"""The reason why a block of a known kind stays rigid."""

from __future__ import annotations

from collections.abc import Sequence

from ofadiff.channels import ChannelGroup


class UnsupportedBlockError(Exception):
    """Raised by a finder for a block of its kind that it cannot cut; the message completes "… stays rigid: …".

    Args:
        reason: Why.
        groups: What of the block can be cut all the same.
    """

    def __init__(self, reason: str, groups: Sequence[ChannelGroup] = ()) -> None:
        super().__init__(reason)
        self.groups = groups
