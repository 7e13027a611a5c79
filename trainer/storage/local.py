"""Folders of this machine or of a shared file system (NFS, Lustre), without fsspec in between.

Writers use a temporary file next to the target. `write` puts it in place by `os.replace`, `create` by `os.link`, which
fails on an existing name and is atomic on NFS too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.errors import InputError
from trainer.storage.backend import Entries, Listing, Moved, ObjectInfo, Transient, one_line

_TEMPORARY = ".muster-tmp"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_BAD_NAMES = (errno.ELOOP, errno.ENAMETOOLONG)
_COPY_BYTES = 64 * 2**20
_FOLDER_VANISHED_TRIES = 5


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except PermissionError as error:
        raise InputError(
            f"no permission for {error.filename or path} ({error.strerror}); change its owner or mode, "
            f"or choose another folder"
        ) from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise InputError(
            f"{path}: {error.strerror}; a file and a folder are in each other's place, "
            f"choose another path or move the one that is there"
        ) from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise InputError(f"{path} is on a read-only file system; choose another folder") from error
        if error.errno in _BAD_NAMES:
            raise InputError(f"{error.filename or path}: {error.strerror}; choose another path") from error
        raise Transient(one_line(error)) from error


def _sync_folder(folder: str) -> None:
    """Makes a new name in ``folder`` survive a power cut, on file systems that support it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _info(path: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}", found.st_mtime)


def _copy(source: str, target: str, moved: Moved) -> None:
    # Syncs each block: only the pace of the disk itself shows whether a large copy makes progress.
    with open(source, "rb") as reading, open(target, "wb") as writing:
        while block := reading.read(_COPY_BYTES):
            writing.write(block)
            writing.flush()
            os.fdatasync(writing.fileno())
            moved()


def _files_below(folder: str, moved: Moved, above: tuple[tuple[int, int], ...] = ()) -> Iterator[ObjectInfo]:
    """Yields every file, temporary ones too; follows links. Leaves out a name that was deleted since it was listed;
    raises for anything else that cannot be looked at. ``above``: (device, inode) of the folders above, against loops.
    """
    # Not `os.walk`: it leaves out folders that it cannot read, and folders that are links.
    moved()
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        try:
            seen = entry.stat()
        except FileNotFoundError:
            if entry.is_symlink() and os.path.lexists(entry.path) and not entry.name.startswith("."):
                raise InputError(f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there") from None
            continue
        if not stat.S_ISDIR(seen.st_mode):
            yield _info(entry.path, seen)
            continue
        here = (seen.st_dev, seen.st_ino)
        if here in above:
            raise InputError(f"{entry.path} is a link to a folder that contains it; remove the link")
        with contextlib.suppress(FileNotFoundError):
            yield from _files_below(entry.path, moved, (*above, here))


class LocalBackend:
    """Backend of local paths, which are absolute. `create` and `upload` are atomic and fsynced; `write` (metrics,
    leases) is atomic and not fsynced."""

    def read(self, path: str) -> bytes:
        with _translated(path):
            return Path(path).read_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with _translated(path), open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def write(self, path: str, data: bytes) -> None:
        with _translated(path):
            self._through_temporary(path, lambda t: Path(t).write_bytes(data), os.replace, durable=False)

    def create(self, path: str, data: bytes) -> None:
        with _translated(path):
            self._through_temporary(path, lambda t: Path(t).write_bytes(data), self._link, durable=True)

    def upload(self, path: str, source: str, moved: Moved) -> None:
        with _translated(path):
            self._through_temporary(path, lambda t: _copy(source, t, moved), os.replace, durable=True)

    def list(self, path: str, moved: Moved) -> Listing:
        return [info for info in self._below(path, moved) if not info.key.endswith(_TEMPORARY)]

    def entries(self, path: str) -> Entries:
        found = Entries([], [])
        with _translated(path), contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    found.folders.append(entry.name)
                elif not entry.name.endswith(_TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                        found.objects.append(_info(entry.path, entry.stat())._replace(key=entry.name))
        return found

    def info(self, path: str) -> ObjectInfo | None:
        with _translated(path):
            try:
                found = os.stat(path)
            except FileNotFoundError:
                return None
        return None if stat.S_ISDIR(found.st_mode) else _info(path, found)

    def delete(self, path: str) -> None:
        with _translated(path), contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with contextlib.suppress(OSError):  # not empty, or not ours: it stays
            os.rmdir(os.path.dirname(path))

    def abort_uploads(self, path: str, stale: Callable[[str], bool]) -> int:
        """Deletes temporary files of writers that were killed."""
        found = [i.key for i in self._below(path, lambda: None) if i.key.endswith(_TEMPORARY) and stale(i.key)]
        for key in found:
            self.delete(os.path.join(path, key))
        return len(found)

    def remove_empty_folders(self, path: str) -> None:
        for folder, folders, files in os.walk(path, topdown=False):
            for inner in (os.path.join(folder, name) for name in (*folders, *files)):
                if os.path.islink(inner) and not os.path.exists(inner):
                    with contextlib.suppress(OSError):
                        os.unlink(inner)
            with contextlib.suppress(OSError):  # not empty, or not ours: it stays
                os.rmdir(folder)

    def reconnect(self) -> None:
        """Does nothing: there are no connections."""

    def _below(self, path: str, moved: Moved) -> Listing:
        found = []
        with _translated(path), contextlib.suppress(FileNotFoundError):
            for info in _files_below(path, moved):
                found.append(info._replace(key=os.path.relpath(info.key, path)))
        return found

    def _through_temporary(
        self, path: str, fill: Callable[[str], object], place: Callable[[str, str], object], *, durable: bool
    ) -> None:
        folder = os.path.dirname(path)
        temporary = f"{path}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            self._fill_in_folder(folder, temporary, fill)
            if durable:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
            place(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if durable:
            _sync_folder(folder)

    def _fill_in_folder(self, folder: str, temporary: str, fill: Callable[[str], object]) -> None:
        # A concurrent `delete` may remove the empty folder after it is made and before it is filled: then try again.
        for left in reversed(range(_FOLDER_VANISHED_TRIES)):
            try:
                os.makedirs(folder, exist_ok=True)
            except FileExistsError as error:
                raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder has to be", folder) from error
            try:
                fill(temporary)
                return
            except FileNotFoundError:
                if not left or os.path.isdir(folder):
                    raise

    def _link(self, temporary: str, path: str) -> None:
        try:
            os.link(temporary, path)
        except FileExistsError:
            if os.stat(temporary).st_nlink < 2:  # 2: NFS lost the reply of a link that was made
                raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A file system without hard links. The copy is still exclusive, but a reader may see a part of it.
            with open(temporary, "rb") as source, open(path, "xb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
