"""The tables that `DENOISERS` took the place of, as views of it: `INPUTS` by class, `FAMILIES` by pipeline class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from ofadiff.denoisers.kind import CAPTIONS, DenoiserKind
from ofadiff.denoisers.table import DENOISERS, trainable_kinds


class _Inputs(MutableMapping[str, Callable[..., dict[str, Any]]]):
    """Example inputs by the name of the denoiser's class; a new entry is a new kind."""

    def __getitem__(self, name: str) -> Callable[..., dict[str, Any]]:
        found = {kind.model: kind.example_inputs for kind in DENOISERS.values()}
        return found[name]

    def __setitem__(self, name: str, example_inputs: Callable[..., dict[str, Any]]) -> None:
        known = [key for key, kind in DENOISERS.items() if kind.model == name]
        for key in known:
            DENOISERS[key] = replace(DENOISERS[key], example_inputs=example_inputs)
        if not known:
            DENOISERS[name] = DenoiserKind(name, example_inputs)

    def __delitem__(self, name: str) -> None:
        del DENOISERS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(kind.model for kind in DENOISERS.values()))

    def __len__(self) -> int:
        return len(list(iter(self)))


class _Families(Mapping[str, DenoiserKind]):
    """Kinds of text-to-image models by the name of the pipeline's class."""

    def __getitem__(self, name: str) -> DenoiserKind:
        return {pipeline: kind for kind in trainable_kinds(CAPTIONS) for pipeline in kind.components}[name]

    def __iter__(self) -> Iterator[str]:
        return (pipeline for kind in trainable_kinds(CAPTIONS) for pipeline in kind.components)

    def __len__(self) -> int:
        return len(list(iter(self)))


INPUTS, FAMILIES = _Inputs(), _Families()
