"""Adapters in zip and tar archives, taken into quarantine member by member."""

from __future__ import annotations

import bz2
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

from tunewright.adapters.admission.quarantine import LARGEST, MEGABYTE, MOST_MEMBERS, Intake, require_plain_path
from tunewright.core.errors import UserError

_TARS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
"""Compressions, by the bytes that they begin with."""

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
"""Bytes of a zip's list of members, which Python reads in one piece."""


def take_archive(archive: Path, intake: Intake) -> None:
    """Copy the adapter in an archive, itself in quarantine already, beside it; one folder around all is taken off.

    Raises:
        UserError: no zip or tar, a damaged one, or members that are not allowed.
    """
    with archive.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"PK"):
        with _damage_told(intake.where):
            _take_zip(archive, intake)
        return
    with _damage_told(intake.where), archive.open("rb") as file:
        opened = next((opener for magic, opener in _TARS.items() if start.startswith(magic)), None)
        if opened is None:
            _take_tar(file, intake)
            return
        # Unpacked to the disk first: a reader of tar seeks, and would unpack all that lies between each time.
        plain = archive.with_name(".unpacked")
        _unpack(opened(file), plain, intake.where)
        with plain.open("rb") as unpacked:
            _take_tar(unpacked, intake)


@contextmanager
def _damage_told(where: str) -> Iterator[None]:
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
        NotImplementedError,  # zip: a compression that Python does not have
        struct.error,
        ValueError,
        OverflowError,
    ) as error:
        raise UserError(f"not a zip or tar archive that can be read: {error}", where=where) from None


def _unpack(source: IO[bytes], target: Path, where: str) -> None:
    written = 0
    try:
        with target.open("xb") as file:
            while chunk := source.read(MEGABYTE):
                written += len(chunk)
                if written > LARGEST + MEGABYTE:
                    raise UserError(
                        f"it unpacks to over {LARGEST // MEGABYTE:,} MB, which is more than an adapter has", where=where
                    )
                file.write(chunk)
    except OSError as error:
        if error.errno is None:  # gzip and bz2 say so of damaged data; the disk's refusals have a number
            raise UserError(f"not an archive that can be read: {error}", where=where) from None
        raise


class _Bounded(io.BufferedIOBase):
    """A file of which no reader gets more than a megabyte at once: a header cannot ask for all memory."""

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


def _take_tar(file: IO[bytes], intake: Intake) -> None:
    bounded = _Bounded(file)
    prefix = _Prefix()
    # Not ``errors``' default: a name that is no UTF-8 would come as another.
    with tarfile.open(fileobj=bounded, mode="r:", errors="strict", format=tarfile.PAX_FORMAT) as tar:
        for member in tar:
            intake.count(member.name)
            where = f"{intake.where}, {member.name!a}"
            if member.isdir():
                _require_plain_folder(member.name, where)
                continue
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                kind = "a file with holes" if member.issparse() else _TAR_KINDS.get(member.type, "of an unknown kind")
                raise UserError(f"{kind}, not a plain file", where=where)
            name = prefix.within(member.name, where)
            content = tar.extractfile(member)
            assert content is not None, "a plain file"
            with content:
                intake.take(name, content)


def _take_zip(archive: Path, intake: Intake) -> None:
    _require_small_directory(archive, intake.where)
    prefix = _Prefix()
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            intake.count(member.filename)
            where = f"{intake.where}, {member.filename!a}"
            mode = member.external_attr >> 16
            if member.orig_filename != member.filename:  # zipfile cuts a name at a zero byte
                raise UserError("a name with control characters", where=where)
            if member.is_dir():
                _require_plain_folder(member.filename, where)
                continue
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "of another kind"
                raise UserError(f"{kind}, not a plain file", where=where)
            if member.flag_bits & 1:
                raise UserError("it is encrypted", where=where)
            name = prefix.within(member.filename, where)
            with opened.open(member) as content:
                intake.take(name, content)


def _require_small_directory(archive: Path, where: str) -> None:
    """Refuse a zip whose list of members is larger than an adapter's, before Python reads it whole."""
    with archive.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _ZIP_END.size - 20))
        tail = file.read()
    if len(tail) < _ZIP_END.size or tail[-_ZIP_END.size :][:4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise UserError(
            "not a zip that ends with its list of members: it is cut off, or something follows", where=where
        )
    *_, members, directory, _offset, _comment = _ZIP_END.unpack(tail[-_ZIP_END.size :])
    if tail.startswith(b"PK\x06\x07") or members > MOST_MEMBERS or directory > _ZIP_DIRECTORY:
        raise UserError(f"over {MOST_MEMBERS} files and folders: no adapter has so many", where=where)


def _require_plain_folder(name: str, where: str) -> None:
    """Folders are made as files need them; one in an archive only has to be harmless."""
    plain = name.rstrip("/").removeprefix("./")
    if plain != "." and name:
        require_plain_path(plain, where)


class _Prefix:
    """The folder around all files of an archive, if there is one: that of its first file."""

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
            raise UserError(f"it is not in the folder {self._folder!a}, as the files before it are", where=where)
        return plain[len(self._folder) :]
