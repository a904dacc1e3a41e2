"""Files appear whole or not at all: write beside the name, flush to disk, rename."""

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pcq.errors import PcqError

LEFT = 1 << 20
"""Bytes that are left on a disk where a library ran out of room; its last write may have been of more."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary file's path beside ``path``; when the block ends well it becomes ``path``.

    The temporary name keeps the suffix, because some writers choose their format by it. Whatever ends the block early
    (an exception, Ctrl-C) removes the temporary file and leaves an older ``path`` as it was. A symbolic link is
    written through.

    Raises:
        PcqError: ``path`` cannot be written, or the disk is full.
    """
    with _begun(path) as temporary:
        mode = stat.S_IMODE(os.stat(temporary).st_mode)
        with room(temporary.parent):
            yield temporary
        os.chmod(temporary, mode)  # safetensors puts a file that only its owner may read in its place
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, os.path.realpath(path))
    with contextlib.suppress(OSError):  # a folder cannot be flushed everywhere, and the file itself is safe already
        folder = os.open(temporary.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def refuse_unwritable(path: str | Path) -> None:
    """Say of an output's place before any work what :func:`atomic` would say after it.

    Raises:
        PcqError: no file can be made there.
    """
    with _begun(path):
        pass


@contextlib.contextmanager
def _begun(path: str | Path) -> Iterator[Path]:
    """A new empty file beside ``path``, which is gone in the end, unless it has another name by then."""
    target = Path(os.path.realpath(path))
    temporary = _beside(target, secrets.token_hex(4))
    if os.path.exists(target) and not os.path.isfile(target):
        what = "a folder" if os.path.isdir(target) else "not a regular file"
        raise PcqError(f"cannot be written: it is {what}", where=str(path), todo="Name a file")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(target)  # a name that is too long, or a folder that is closed to us: better said now
        try:  # the file is made inside, so that no signal can come between its making and its removal
            made = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            os.close(made)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in FULL or error.filename in (str(temporary), str(target)):
            raise unwritable(error, path) from error
        raise


@contextlib.contextmanager
def room(folder: Path) -> Iterator[None]:
    """Within it a library that lacks room and raises an error of its own (safetensors, torch) raises OSError.

    So does what we say of such an error.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        ours = isinstance(error, PcqError) and error.__cause__ is None
        # A quota, or the largest file: the disk has room. torch raises its own error after the system's.
        rust = re.search(r"\(os error (\d+)\)", str(error))
        numbers = (int(rust[1]) if rust is not None else None, getattr(error.__context__, "errno", None))
        full = any(number in FULL for number in numbers)
        if not ours and (full or shutil.disk_usage(folder).free < LEFT):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what is needed for a while only, where the system keeps such: ``TMPDIR``, or else ``/tmp``.

    Raises:
        PcqError: there is no room left in it.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, room(Path(folder)):
            yield Path(folder)
    except OSError as error:
        if error.errno not in FULL:
            raise
        todo = "Free some space, or name a folder on another disk in the environment variable TMPDIR"
        raise PcqError("no room left for temporary files", where=tempfile.gettempdir(), todo=todo) from error


def _beside(target: Path, chance: str) -> Path:
    return target.with_name(f".{target.stem[:100]}.{chance}.partial{target.suffix}")


def sweep(path: str | Path) -> None:
    """Remove what writers of ``path`` left beside it that were killed; nobody may be writing it now (:func:`held`)."""
    target = Path(os.path.realpath(path))
    name = _beside(Path(glob.escape(target.name)), "[0-9a-f]" * 8).name
    for left in target.parent.glob(name):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: str | Path) -> Iterator[None]:
    """Within it nobody else who asks for ``path`` may write it; where nothing was written, an empty file goes again.

    The lock is the system's, so that a process that is killed leaves none. Where the system has none, none is made.

    Raises:
        PcqError: another process holds it, or ``path`` cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritable(error, path) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            todo = "Wait for it, stop it, or give another name with --out"
            raise PcqError("another run is writing it", where=str(path), todo=todo) from error
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            if os.fstat(file).st_size == 0:
                Path(path).unlink(missing_ok=True)
    finally:
        os.close(file)


def reserve(file: BinaryIO, size: int) -> None:
    """Make the file ``size`` bytes long and, where the system can, take the room on the disk now.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    file.truncate(size)


def unwritable(error: OSError, path: str | Path) -> PcqError:
    """The sentence for an output that the system refuses."""
    if error.errno in FULL:
        return PcqError("no room left to write it", where=str(path), todo="Free some space, or choose another disk")
    folder = (Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)).parent
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not folder.is_dir():
        what = f"cannot be written: there is no folder {folder}"
        return PcqError(what, where=str(path), todo="Make the folder, or choose another")
    missing = error.errno == errno.ENOENT  # of a system folder that takes no files
    reason = "its folder takes no files" if missing else error.strerror or type(error).__name__
    return PcqError(f"cannot be written: {reason.lower()}", where=str(path), todo="Choose another place")
