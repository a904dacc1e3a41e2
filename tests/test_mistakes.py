"""Every mistake gets a sentence that helps and the right exit code, and leaves nothing behind."""

import re
from pathlib import Path

import pytest

from tests.mistakes import MISTAKES, Mistake, answer, row

DOCUMENT = (Path(__file__).parent.parent / "docs/mistakes.md").read_text().splitlines()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_mistake(mistake: Mistake, tmp_path: Path) -> None:
    code, text, left = answer(mistake, tmp_path)
    assert code == mistake.code, text
    assert "Traceback" not in text
    assert re.search(mistake.says, text), text
    assert not left
    assert row(mistake, code, text) in DOCUMENT, "run: python -m tests.mistakes > docs/mistakes.md"


def test_there_are_at_least_forty() -> None:
    assert len(MISTAKES) >= 40
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES)


def test_the_hostile_pickle_is_hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    hostile = next(mistake for mistake in MISTAKES if mistake.what == "a hostile pickle")
    monkeypatch.chdir(tmp_path)
    hostile.prepare()
    torch.load("model.pt", weights_only=False)
    assert (tmp_path / "executed").exists()
