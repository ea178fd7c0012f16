"""The form that trials take, and how far stages are run as one, chosen by a test instead of by a clock."""

from __future__ import annotations

from collections.abc import Mapping

import pytest


def prefer(monkeypatch: pytest.MonkeyPatch, *forms: str) -> None:
    """Have trials take the first of ``forms`` that a stage can be run in, and ``plain`` where that is none."""

    def fastest(seconds: Mapping[str, float], joins: bool) -> str:
        return next((form for form in forms if form in seconds), "plain")

    monkeypatch.setattr("sidecar.forms._fastest", fastest)


def run_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every stage run by itself, also where a request is alone."""
    monkeypatch.setattr("sidecar.stretches.LONGEST_S", 0.0)
