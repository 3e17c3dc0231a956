"""Uploading models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def upload(model: Any, name: str, variant: str | None, options: Mapping[str, Any]) -> None:
    """What `save_pretrained(…, push_to_hub=True)` of diffusers does after saving.

    Args:
        model: A diffusers model.
        name: Name of the repository, if the options have no `repo_id`.
        variant: Variant of the weight files.
        options: `repo_id`, `commit_message`, `private`, `create_pr` and `token`, as diffusers takes them.
    """
    known = ("commit_message", "private", "create_pr", "token")
    given = {key: options[key] for key in known if key in options}
    model.push_to_hub(options.get("repo_id", name), variant=variant, **given)
