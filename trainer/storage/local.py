"""Folders of this machine or of a shared file system (NFS, Lustre), without fsspec in between.

Writers use a temporary file beside the target. `os.replace` swaps it in for `write`; `os.link` gives `create` its
"unless it is there", since linking fails on an existing name and is atomic on NFS too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trainer.errors import InputError
from trainer.storage.backend import Listing, Names, ObjectInfo, Transient, one_line

_TEMPORARY = ".muster-tmp"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
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
            raise InputError(f"{path} lies on a read-only file system; choose another folder") from error
        raise Transient(one_line(error)) from error


def _sync_folder(folder: str) -> None:
    """Makes a new name in ``folder`` survive a power cut; file systems that cannot do it are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"


class LocalBackend:
    """Paths are absolute; `create` and `upload` are fsynced, `write` is atomic but not (metrics, leases)."""

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

    def upload(self, path: str, source: str) -> None:
        with _translated(path):
            self._through_temporary(path, lambda t: shutil.copyfile(source, t), os.replace, durable=True)

    def list(self, path: str) -> Listing:
        found = []
        with _translated(path):
            for folder, _, names in os.walk(path):
                for name in names:
                    full = os.path.join(folder, name)
                    info = None if name.endswith(_TEMPORARY) else self.info(full)
                    if info is not None:  # None: deleted while we were listing
                        found.append(info._replace(key=os.path.relpath(full, path)))
        return found

    def folders(self, path: str) -> Names:
        with _translated(path):
            try:
                return [entry.name for entry in os.scandir(path) if entry.is_dir()]
            except FileNotFoundError:
                return []

    def info(self, path: str) -> ObjectInfo | None:
        with _translated(path):
            try:
                stat = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return None if os.path.isdir(path) else ObjectInfo(path, stat.st_size, _etag(stat), stat.st_mtime)

    def delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            with _translated(path), contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for folder in sorted({os.path.dirname(p) for p in paths}, key=len, reverse=True):
            with contextlib.suppress(OSError):  # not empty, or not ours: it stays
                os.rmdir(folder)

    def abort_uploads(self, path: str, stale: Callable[[str], bool]) -> int:
        """Temporary files of writers that were killed."""
        found = []
        with _translated(path):
            for folder, _, names in os.walk(path):
                full = [os.path.join(folder, name) for name in names if name.endswith(_TEMPORARY)]
                found += [name for name in full if stale(os.path.relpath(name, path))]
        self.delete(found)
        return len(found)

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
        """A concurrent `delete` may take the empty folder away between making it and filling it: once more, then."""
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
            self._exclusive_copy(temporary, path)

    def _exclusive_copy(self, temporary: str, path: str) -> None:
        """For file systems without hard links: still exclusive, but a reader may catch it half written."""
        with open(temporary, "rb") as source, open(path, "xb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
