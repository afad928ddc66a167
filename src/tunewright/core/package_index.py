"""The package indexes that uv and pip are configured with, and the address of a wheel on one of them."""

from __future__ import annotations

import configparser
import html
import netrc
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import platformdirs

from tunewright.core.errors import UserError

if TYPE_CHECKING:
    import ssl

    import httpx

PUBLIC = "https://pypi.org/simple"
"""The index of uv and pip without a configuration."""
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_OFF = ("UV_OFFLINE", "UV_NO_INDEX", "PIP_NO_INDEX")


def package_indexes(by_hand: str) -> list[httpx.URL]:
    """Return the user's package indexes with credentials: those of both tools, since either may be in use.

    ``by_hand`` is the advice of an error.

    Raises:
        UserError: a variable forbids an index, a configuration cannot be read, or an address is no URL.
    """
    for name in _OFF:
        if os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off"):
            raise UserError(f"{name} is set, so no package index is asked", fix=f"Unset {name}. {by_hand}")
    uv, pip = _uv_settings(), _pip_settings()
    defaults = [os.environ.get(name, "") for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")]
    extra = [os.environ.get(name, "") for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "PIP_EXTRA_INDEX_URL")]
    for section in uv:
        defaults.append(section.get("index-url", ""))
        extra += section.get("extra-index-url", [])
        for index in section.get("index", []):
            if not index.get("explicit"):
                (defaults if index.get("default") else extra).append(f"{index.get('name', '')}={index['url']}")
    defaults.append(pip.get("index-url", ""))
    extra.append(pip.get("extra-index-url", ""))
    own = [address for text in defaults for address in text.split()]
    return list(dict.fromkeys(map(_url, [*own, *" ".join(extra).split(), *([] if own else [PUBLIC])])))


def _url(address: str) -> httpx.URL:
    """Return the URL of ``[NAME=]URL`` with its credentials: its own, uv's variables for the name, or netrc's."""
    import httpx

    name, _, text = address.rpartition("=") if re.match(r"[\w.-]*=", address) else ("", "", address)
    try:
        url = httpx.URL(text.rstrip("/") + "/")
    except httpx.InvalidURL:
        # The address itself may contain a password.
        raise UserError("The address of the package index is no URL", fix="Correct PIP_INDEX_URL.") from None
    if url.userinfo:
        return url
    prefix = f"UV_INDEX_{re.sub('[^A-Z0-9]', '_', name.upper())}_"
    user, password = (os.environ.get(prefix + part, "") for part in ("USERNAME", "PASSWORD"))
    if not (name and (user or password)):
        with suppress(OSError, netrc.NetrcParseError):
            found = netrc.netrc(os.environ.get("NETRC")).authenticators(url.host)
            user, password = (found[0], found[2] or "") if found else ("", "")
    return url.copy_with(username=user, password=password) if user or password else url


def _uv_settings() -> list[Mapping[str, Any]]:
    """Return the tables of uv's configuration files that name indexes, the user's before the system's."""
    if os.environ.get("UV_NO_CONFIG"):
        return []
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    system = Path(os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(os.pathsep)[0])
    named = os.environ.get("UV_CONFIG_FILE")
    files = [Path(named)] if named else [own / "uv" / "uv.toml", system / "uv" / "uv.toml", Path("/etc/uv/uv.toml")]
    tables = []
    for file in files:
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            try:
                settings = tomllib.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"uv's configuration cannot be read: {error}", where=str(file)) from None
            tables += [settings, settings.get("pip", {})]
    return tables


def _pip_settings() -> Mapping[str, str]:
    """Return pip's configuration of ``pip install``; a later file wins, as in pip."""
    named = os.environ.get("PIP_CONFIG_FILE", "")
    system = platformdirs.site_config_dir("pip", appauthor=False, multipath=True).split(os.pathsep)
    files = [Path(folder) / "pip.conf" for folder in [*system, "/etc"]]
    own = platformdirs.user_config_path("pip", appauthor=False, roaming=True)
    files += [Path.home() / folder / "pip.conf" for folder in (".pip", ".config/pip", own)]
    files += [Path(sys.prefix) / "pip.conf", *([Path(named)] if named else [])]
    parser = configparser.RawConfigParser()
    try:
        parser.read([] if named == os.devnull else files, encoding="utf-8")
    except (configparser.Error, ValueError) as error:
        raise UserError(f"pip's configuration cannot be read: {error}", fix="pip config debug") from None
    sections = [parser[name] for name in ("global", "install") if parser.has_section(name)]
    return {key.replace("_", "-"): value for section in sections for key, value in section.items()}


def certificates() -> ssl.SSLContext:
    """Return the authorities to trust: those of httpx, of the system, and of the files that are set for pip."""
    import httpx

    context = httpx.create_ssl_context()
    context.load_default_certs()
    for file in (os.environ.get("PIP_CERT"), os.environ.get("REQUESTS_CA_BUNDLE"), _pip_settings().get("cert")):
        if file and Path(file).is_file():
            context.load_verify_locations(cafile=file)
    return context


def find_wheel(client: httpx.Client, index: httpx.URL, name: str, wheel: str) -> httpx.URL | None:
    """Return the address of a file on an index (PEP 503 and 691); None if it is not there."""
    page = client.get(index.join(f"{name}/"), headers={"Accept": _ACCEPT})
    if page.status_code == 404:
        return None
    page.raise_for_status()
    if page.headers.get("content-type", "").startswith("application/vnd.pypi.simple.v1+json"):
        links: Iterator[str] = (file["url"] for file in page.json()["files"])
    else:
        links = map(html.unescape, re.findall(r"""<a\s[^>]*?href\s*=\s*["']([^"']+)""", page.text, re.IGNORECASE))
    for link in links:
        url = page.url.join(link)
        if unquote(url.path).endswith(f"/{wheel}"):
            # An absolute link has no credentials, and may lead to a host that they are not for.
            same = (url.scheme, url.netloc, url.userinfo) == (index.scheme, index.netloc, b"")
            return url.copy_with(userinfo=index.userinfo) if same else url
    return None
