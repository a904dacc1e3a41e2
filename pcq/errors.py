"""What a user's mistake becomes. Our own mistakes are asserts and tracebacks, never these.

Every message says where, what was found, what is allowed and what to do, as far as each is known.
"""

from collections.abc import Iterable


class PcqError(Exception):
    """The input is wrong (exit code 2). ``str(error)`` is the whole message for the user.

    Args:
        what: what was found, as one sentence without a final full stop.
        where: file, line, tensor or rule it was found in.
        allowed: what would have been accepted.
        todo: what to do about it, as an imperative sentence.
    """

    exit_code = 2
    finished: object = None
    """A result that is there all the same."""

    def __init__(self, what: str, *, where: str = "", allowed: str = "", todo: str = "") -> None:
        self.what, self.where, self.allowed, self.todo = what, where, allowed, todo
        text = f"{where}: {what}" if where else what
        for part in (f"Allowed: {allowed}" if allowed else "", todo):
            if part:
                text = f"{text.rstrip('.')}. {part}"
        super().__init__(text if text.endswith((".", "?", "!", "`")) else text + ".")


class CheckFailed(PcqError):
    """The work was done but failed a check: parity, size, an unreadable result (exit code 3)."""

    exit_code = 3


class NoSplit(PcqError):
    """The data is as it should be, but has no split of that name."""


class Elsewhere(PcqError):
    """Of several processes another one failed; it says so itself, and this one has nothing to add."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what, where="another process")
        self.exit_code = code


class Problems(PcqError):
    """Several mistakes found in one reading, reported together, one a line."""

    def __init__(self, problems: Iterable[PcqError]) -> None:
        self.problems = tuple(problems)
        assert self.problems
        Exception.__init__(self, "\n".join(str(problem) for problem in self.problems))
        self.exit_code = max(problem.exit_code for problem in self.problems)


def raise_all(problems: list[PcqError]) -> None:
    """Raise what was collected: nothing, the one, or all together."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)


def first_line(error: BaseException) -> str:
    """What another library's exception says, for a sentence of ours: its first line, or its class if it is silent."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def refuse_other(word: object, known: Iterable[object], where: str) -> None:
    """Raise PcqError unless ``word`` is one of the ``known``."""
    if word not in (words := [*known]):
        todo = did_you_mean(str(word), [str(each) for each in words])
        raise PcqError(f"there is no {word!r}", where=where, allowed=", ".join(map(str, words)), todo=todo)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest known word, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else ""
