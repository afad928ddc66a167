"""Archives: paths out of the folder, bombs, and members that are not plain files."""

from __future__ import annotations

import io
import json
import stat
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from adapter_helpers import lora_config, write_adapter
from hostile.corpus import hostile
from tunewright.adapters.registry import CONFIG, WEIGHTS


def _tar(at: Path, *members: tuple[tarfile.TarInfo, bytes], mode: Any = "w:gz") -> Path:
    folder = write_adapter(at / "good")
    path = at / "evil.tar.gz"
    with tarfile.open(path, mode) as tar:
        for name in (CONFIG, WEIGHTS):
            tar.add(folder / name, f"evil/{name}")
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@hostile(r"leads out of the folder \(\.\.\)")
def a_tar_that_climbs_out(at: Path) -> Path:
    return _tar(at, (_member("evil/../../../tmp/tunewright-was-here"), b"x"))


@hostile("The path is absolute")
def a_tar_with_an_absolute_path(at: Path) -> Path:
    return _tar(at, (_member("/tmp/tunewright-was-here"), b"x"))


@hostile("a Windows path")
def a_tar_with_a_path_of_windows(at: Path) -> Path:
    return _tar(at, (_member("evil\\..\\..\\tunewright-was-here"), b"x"))


@hostile("a Windows path")
def a_tar_with_a_drive(at: Path) -> Path:
    return _tar(at, (_member("C:evil.txt"), b"x"))


@hostile("a symbolic link, not a plain file")
def a_tar_with_a_link_to_write_through(at: Path) -> Path:
    return _tar(at, (_member("evil/checkpoints", tarfile.SYMTYPE, "/tmp"), b""))


@hostile("a hard link, not a plain file")
def a_tar_with_a_hard_link(at: Path) -> Path:
    return _tar(at, (_member("evil/README.md", tarfile.LNKTYPE, "/etc/passwd"), b""))


@hostile("a device, not a plain file")
def a_tar_with_a_device(at: Path) -> Path:
    info = _member("evil/README.md", tarfile.CHRTYPE)
    info.devmajor, info.devminor = 1, 5
    return _tar(at, (info, b""))


@hostile("a pipe, not a plain file")
def a_tar_with_a_pipe(at: Path) -> Path:
    return _tar(at, (_member("evil/README.md", tarfile.FIFOTYPE), b""))


@hostile("a file with holes")
def a_tar_with_a_sparse_file(at: Path) -> Path:
    info = _member("evil/README.md")
    info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40), "GNU.sparse.numblocks": "1"}
    return _tar(at, (info, b"x"))


@hostile("The file is there twice")
def a_tar_with_the_configuration_twice(at: Path) -> Path:
    return _tar(at, (_member(f"evil/{CONFIG}"), json.dumps(lora_config(use_dora=True)).encode()))


@hostile("More than 64 files and folders")
def a_tar_of_very_many_members(at: Path) -> Path:
    return _tar(at, *((_member(f"evil/README.md/{number}", tarfile.DIRTYPE), b"") for number in range(10_000)))


@hostile("larger than 1 MB")
def a_tar_that_unpacks_to_a_thousand_times_its_size(at: Path) -> Path:
    return _tar(at, (_member("evil/README.md"), bytes(64 << 20)))


@hostile("a header claims to be larger than a megabyte")
def a_tar_whose_header_asks_for_all_memory(at: Path) -> Path:
    path = at / "evil.tar"
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 6 << 30
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20))
    return path


@hostile("archive cannot be read")
def a_tar_that_is_cut_off(at: Path) -> Path:
    path = _tar(at)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


@hostile("archive cannot be read")
def no_archive_at_all(at: Path) -> Path:
    (at / "evil.zip").write_bytes(b"not an archive" * 100)
    return at / "evil.zip"


@hostile("outside the folder 'evil/'")
def a_tar_with_files_beside_its_folder(at: Path) -> Path:
    return _tar(at, (_member("README.md"), b"x"))


def _zip(at: Path, *members: tuple[zipfile.ZipInfo, bytes]) -> Path:
    folder = write_adapter(at / "good")
    path = at / "evil.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name in (CONFIG, WEIGHTS):
            opened.write(folder / name, name)
        for info, content in members:
            opened.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


@hostile(r"leads out of the folder \(\.\.\)")
def a_zip_that_climbs_out(at: Path) -> Path:
    return _zip(at, (zipfile.ZipInfo("../../../../tmp/tunewright-was-here"), b"x"))


@hostile("The path is absolute")
def a_zip_with_an_absolute_path(at: Path) -> Path:
    return _zip(at, (zipfile.ZipInfo("/tmp/tunewright-was-here"), b"x"))


@hostile("a symbolic link, not a plain file")
def a_zip_with_a_link(at: Path) -> Path:
    info = zipfile.ZipInfo("README.md")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return _zip(at, (info, b"/etc/passwd"))


@hostile("The file is there twice")
def a_zip_with_the_weights_twice(at: Path) -> Path:
    return _zip(at, (zipfile.ZipInfo(WEIGHTS), b"other weights"))


@hostile("The member is encrypted")
def a_zip_with_an_encrypted_member(at: Path) -> Path:
    path = _zip(at, (zipfile.ZipInfo("README.md"), b"x"))
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(magic) + offset] |= 1
    path.write_bytes(data)
    return path


@hostile("larger than 1 MB")
def a_zip_bomb(at: Path) -> Path:
    return _zip(at, (zipfile.ZipInfo("README.md"), bytes(64 << 20)))


@hostile("larger than 1 MB|archive cannot be read")
def a_zip_bomb_that_lies_of_its_size(at: Path) -> Path:
    path = _zip(at, (zipfile.ZipInfo("README.md"), bytes(64 << 20)))
    data = bytearray(path.read_bytes())
    at_directory = data.rindex(b"PK\x01\x02")
    struct.pack_into("<L", data, at_directory + 24, 10)  # ten bytes, says the list of members
    path.write_bytes(data)
    return path


@hostile("More than 64 files and folders")
def a_zip_of_very_many_members(at: Path) -> Path:
    return _zip(at, *((zipfile.ZipInfo(f"README.md/{number}/"), b"") for number in range(10_000)))


@hostile("truncated, or has trailing data")
def a_zip_with_another_zip_after_it(at: Path) -> Path:
    path = _zip(at)
    path.write_bytes(path.read_bytes() + b"\0" * 30)
    return path


@hostile("archive cannot be read")
def a_zip_whose_bytes_are_not_what_it_says(at: Path) -> Path:
    path = _zip(at)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    return path


@hostile("not part of an adapter")
def a_zip_within_a_zip(at: Path) -> Path:
    inner = _zip(at).read_bytes()
    (at / "evil.zip").unlink()
    return _zip(at, (zipfile.ZipInfo("inner.zip"), inner))
