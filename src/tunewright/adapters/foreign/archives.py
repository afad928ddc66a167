"""Adapters in zip and tar archives, copied into quarantine member by member."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tunewright.adapters.foreign.quarantine import (
    LARGEST,
    MEGABYTE,
    MOST_MEMBERS,
    QuarantinedFiles,
    require_plain_path,
)
from tunewright.core.errors import UserError

_TARS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
"""Decompressors by magic bytes."""

_TAR_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CONTTYPE: "a contiguous file",
    tarfile.GNUTYPE_SPARSE: "a file with holes",
}

_ZIP_END = struct.Struct("<4s4H2LH")
_ZIP_DIRECTORY = 64 * 1024
"""Largest central directory of a zip in bytes; Python reads it in one piece."""


def quarantine_archive(archive: Path, intake: QuarantinedFiles) -> None:
    """Extract the adapter from an archive in quarantine; one folder around all files is stripped.

    Raises:
        UserError: not a zip or tar, a damaged archive, or members that are not allowed.
    """
    with archive.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"PK"):
        with _report_damage(intake.where):
            _take_zip(archive, intake)
        return
    with _report_damage(intake.where), archive.open("rb") as file:
        opened = next((opener for magic, opener in _TARS.items() if start.startswith(magic)), None)
        if opened is None:
            _take_tar(file, intake)
            return
        # Decompressed to disk first: tar readers seek, and would decompress everything in between each time.
        plain = archive.with_name(".unpacked")
        _unpack(opened(file), plain, intake.where)
        with plain.open("rb") as unpacked:
            _take_tar(unpacked, intake)


@contextmanager
def _report_damage(where: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,  # zip: a compression that Python lacks
        struct.error,
        ValueError,
        OverflowError,
    ) as error:
        raise UserError(f"The zip or tar archive cannot be read: {error}", where=where) from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # zip: a negative offset
            raise
        raise UserError("The zip or tar archive cannot be read: an offset is negative", where=where) from None


def _unpack(source: IO[bytes], target: Path, where: str) -> None:
    written = 0
    try:
        with target.open("xb") as file:
            while chunk := source.read(MEGABYTE):
                written += len(chunk)
                if written > LARGEST + MEGABYTE:
                    raise UserError(
                        f"The archive unpacks to more than {LARGEST // MEGABYTE:,} MB, the limit for an adapter",
                        where=where,
                    )
                file.write(chunk)
    except OSError as error:
        if error.errno is None:  # gzip and bz2 report damaged data so; errors of the disk have a number
            raise UserError(f"The archive cannot be read: {error}", where=where) from None
        raise


class _Bounded(io.BufferedIOBase):
    """A file that returns at most a megabyte a read, so that a header cannot claim all memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MEGABYTE:
            raise tarfile.ReadError("a header claims to be larger than a megabyte")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _take_tar(file: IO[bytes], intake: QuarantinedFiles) -> None:
    bounded = _Bounded(file)
    prefix = _Prefix()
    # Strict, because the default of ``errors`` would change a name that is not UTF-8.
    with tarfile.open(fileobj=bounded, mode="r:", errors="strict", format=tarfile.PAX_FORMAT) as tar:
        for member in tar:
            intake.count(member.name)
            where = f"{intake.where}, {member.name!a}"
            if member.isdir():
                _require_plain_folder(member.name, where)
                continue
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                kind = "a file with holes" if member.issparse() else _TAR_KINDS.get(member.type, "of an unknown kind")
                raise UserError(f"The member is {kind}, not a plain file", where=where)
            name = prefix.within(member.name, where)
            content = tar.extractfile(member)
            assert content is not None, "a plain file"
            with content:
                intake.take(name, content)


def _take_zip(archive: Path, intake: QuarantinedFiles) -> None:
    _require_small_directory(archive, intake.where)
    prefix = _Prefix()
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            intake.count(member.filename)
            where = f"{intake.where}, {member.filename!a}"
            mode = member.external_attr >> 16
            if member.orig_filename != member.filename:  # zipfile cuts a name at a zero byte
                raise UserError("The name has control characters", where=where)
            if member.is_dir():
                _require_plain_folder(member.filename, where)
                continue
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "of another kind"
                raise UserError(f"The member is {kind}, not a plain file", where=where)
            if member.flag_bits & 1:
                raise UserError("The member is encrypted", where=where)
            name = prefix.within(member.filename, where)
            with opened.open(member) as content:
                intake.take(name, content)


def _require_small_directory(archive: Path, where: str) -> None:
    """Refuse a zip whose central directory is larger than an adapter's, before Python reads it."""
    with archive.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _ZIP_END.size - 20))
        tail = file.read()
    if len(tail) < _ZIP_END.size or tail[-_ZIP_END.size :][:4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise UserError(
            "The zip does not end with its central directory: it is truncated, or has trailing data", where=where
        )
    *_, members, directory, _offset, _comment = _ZIP_END.unpack(tail[-_ZIP_END.size :])
    if tail.startswith(b"PK\x06\x07") or members > MOST_MEMBERS or directory > _ZIP_DIRECTORY:
        raise UserError(f"More than {MOST_MEMBERS} files and folders, the limit for an adapter", where=where)


def _require_plain_folder(name: str, where: str) -> None:
    """Check that a folder's path is safe; folders themselves are created as files need them."""
    plain = name.rstrip("/").removeprefix("./")
    if plain != "." and name:
        require_plain_path(plain, where)


class _Prefix:
    """The folder around all files of an archive, taken from its first file."""

    def __init__(self) -> None:
        self._folder: str | None = None

    def within(self, name: str, where: str) -> str:
        """Return a member's path within the adapter."""
        plain = name.removeprefix("./")
        require_plain_path(plain, where)
        if self._folder is None:
            first, slash, _rest = plain.partition("/")
            self._folder = f"{first}/" if slash and first != "checkpoints" else ""
        if not plain.startswith(self._folder):
            raise UserError(f"The member is outside the folder {self._folder!a} of the earlier files", where=where)
        return plain[len(self._folder) :]
