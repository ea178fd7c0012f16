"""The rows can fail: against a product that is broken on purpose each of them turns red."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.bundles import write_adding_bundle
from tests.fault import attacks, circumstances, mutants
from tests.fault.attacks import LARGEST, OFFSET
from tests.fault.launching import Change, through
from tests.fault.looked import Looked
from tests.fault.matrix import Row, deploy, held, left, settled
from tests.sidecar_process import SidecarProcess, sidecar_process

pytestmark = pytest.mark.usefixtures("nothing_leaks")

Attack = Callable[[Row, SidecarProcess], object]
# Of what is left behind on purpose.
SETTLE_S = 2.0


def tried(attack: Attack, box: SidecarProcess) -> str:
    """Return why the row of an attack is red, as the fixtures of a row would find; empty when it is green."""
    row = Row(("mutant",))
    engine, before = box.await_engine(), held(box)
    try:
        attack(row, box)
        row.leaked |= left(box, before, SETTLE_S)
        assert box.await_engine() == engine, "the engine died"
        row.check()
    except AssertionError as error:
        return str(error) or "an assertion failed"
    return ""


@pytest.fixture
def models(tmp_path: Path, scaled: Path) -> list[Path]:
    write_adding_bundle(tmp_path / "bounded", "bounded", [OFFSET], dtype="int64", bounds=(0, LARGEST))
    return [scaled, tmp_path / "bounded"]


def serve(box: SidecarProcess, models: list[Path]) -> None:
    for path in models:
        box.admin.push(path)
    settled(box)


@pytest.mark.parametrize(
    ("mutant", "attack", "reason"),
    [
        (mutants.forgives_broken_frames, lambda row, box: attacks.frames(row, box, 200), "wrong"),
        (mutants.takes_descriptors, lambda row, box: attacks.frames(row, box, 200), "engine descriptors"),
        (mutants.takes_descriptors, lambda row, box: attacks.descriptors(row, box, 20), "engine descriptors"),
        (mutants.keeps_what_has_ended, lambda row, box: attacks.deaths(row, box, 40), "arena bytes"),
        (mutants.unsealed, lambda row, box: attacks.changes(row, box, 2), "shrink"),
        (mutants.no_private_copy, lambda row, box: attacks.flips(row, box, 5000), "wrong answers"),
        (mutants.answers_without_ids, lambda row, box: attacks.canaries(row, box, 4, 50), "requests lost|failed clients"),
    ],
)
def test_a_broken_sidecar_is_found_out(tmp_path: Path, models: list[Path], mutant: Change, attack: Attack, reason: str) -> None:
    with sidecar_process(tmp_path, through=through(mutant)) as box:
        serve(box, models)
        assert re.search(reason, found := tried(attack, box)), found


def test_arenas_without_memory_of_their_own_are_found_out(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short"
    monkeypatch.setenv(circumstances.SHORT, str(short))
    with sidecar_process(tmp_path, through=through(mutants.reserves_nothing)) as box:
        serve(box, models)
        assert "somebody was let in" in tried(lambda row, box: attacks.shortages(row, box, 8, short), box)


def test_who_fails_with_others_is_found_out(tmp_path: Path, models: list[Path]) -> None:
    with sidecar_process(tmp_path, "--batch-window", "0.02", through=through(mutants.fails_whole_batches)) as box:
        serve(box, models)
        deploy(box, tmp_path, "looked", Looked(), torch.zeros(2, 4, dtype=torch.int64))
        assert "requests lost" in tried(lambda row, box: attacks.raises(row, box, 400), box)


def test_a_broken_client_is_found_out(tmp_path: Path, models: list[Path]) -> None:
    with sidecar_process(tmp_path) as box:
        serve(box, models)

        def attack(row: Row, box: SidecarProcess) -> None:
            attacks.canaries(row, box, 8, 200, through=through(mutants.uses_what_went_unanswered))

        assert "wrong answers" in tried(attack, box)
