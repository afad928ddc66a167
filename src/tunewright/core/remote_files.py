"""Files below a URL of fsspec (a folder, a bucket, a web server), and the Hugging Face hub; refusals as UserErrors."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.io import write_bytes

_CREDENTIALS = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile that AWS_PROFILE names"
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"}


def _loaded(module: str, name: str) -> type[Exception] | None:
    """Return an exception class of a library, if it has been imported."""
    found: type[Exception] | None = getattr(sys.modules.get(module), name, None)
    return found


def _refused() -> tuple[type[Exception], ...]:
    """Return the exceptions of file systems; exceptions of S3 and HTTP are not OSErrors, and may not be imported."""
    names = (
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("aiohttp", "ClientError"),
    )
    also = [loaded for name in names if (loaded := _loaded(*name))]
    return OSError, ValueError, NotImplementedError, *also


def _code(error: Exception) -> str:
    """Return S3's error code, which s3fs keeps in the cause of an OSError."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _explained(error: Exception) -> tuple[str, str]:
    """Return the message and the fix for an exception."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    code = _code(error)
    no_credentials = _loaded("botocore.exceptions", "NoCredentialsError")
    no_connection = _loaded("botocore.exceptions", "ConnectionError")
    if code == "NoSuchBucket":
        return "No such bucket", "Correct its name, or create it first: a push does not create buckets."
    if no_credentials is not None and isinstance(error, no_credentials):
        return "No credentials", f"{_CREDENTIALS}."
    if code and isinstance(error, PermissionError):
        return f"Access denied ({reason})", f"{_CREDENTIALS}, and that they allow reading and writing."
    if no_connection is not None and isinstance(error, no_connection):
        return f"Cannot connect: {reason}", "Check the network, and AWS_ENDPOINT_URL if the bucket is not at AWS."
    return f"The remote cannot be used: {reason}", "Check the URL, the network and your permissions."


@cache
def _refusing_redirects() -> dict[str, Any]:
    """Return options of fsspec for the web: a redirect could lead to any address of this machine's network."""
    from aiohttp import ClientSession, TraceConfig, TraceRequestRedirectParams

    async def refuse(_session: ClientSession, _context: object, answer: TraceRequestRedirectParams) -> None:
        target = answer.response.headers.get("Location", "").partition("?")[0]  # what follows may be a credential
        fix = "Redirects are not followed. If you trust that address, use its URL."
        raise UserError(f"The server redirects to {target!r}", where=str(answer.url), fix=fix)

    trace = TraceConfig()
    trace.on_request_redirect.append(refuse)
    return {"client_kwargs": {"trace_configs": [trace]}}


class RemoteFiles:
    """The files below a URL, without following redirects of a web server; ``str()`` gives the URL.

    Args:
        url: any URL or path that fsspec knows: a folder, s3://bucket/prefix, …
        options: fsspec's storage options (endpoint, credentials); None: from the environment.
        again: advice for a file that is missing.
    """

    def __init__(self, url: str, options: dict[str, Any] | None = None, *, again: str = "Restore the file.") -> None:
        import fsspec  # type: ignore[import-untyped]

        self.url = url.rstrip("/") or url
        self._again = again
        with self.refusals():
            if self.url.startswith(("http://", "https://")):
                options = _refusing_redirects() | (options or {})
            self.fs, root = fsspec.core.url_to_fs(self.url, **(options or {}))
            # Others may have pushed since this process looked.
            self.fs.invalidate_cache()
        self.root = str(root).rstrip("/")
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.has_folders = not protocols & _BUCKETS
        self.is_local = "file" in protocols
        self.is_web = "http" in protocols

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Raise exceptions of the file system as UserErrors."""
        try:
            yield
        except ImportError as error:
            s3 = self.url.startswith(("s3://", "s3a://"))
            fix = f"Install it: {install_command('s3')}" if s3 else "Install the fsspec package for this URL."
            raise UserError(str(error), where=self.url, fix=fix) from None
        except _refused() as error:
            if isinstance(error, UserError):
                raise
            what, fix = _explained(error)
            raise UserError(what, where=self.url, fix=fix) from error

    def has(self, name: str) -> bool:
        """Return whether the file exists."""
        with self.refusals():
            return bool(self.fs.exists(f"{self.root}/{name}"))

    def read_if_there(self, name: str) -> bytes | None:
        """Return a file's bytes; None if it does not exist."""
        with self.refusals():
            try:
                data: bytes = self.fs.cat_file(f"{self.root}/{name}")
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return None
        return data

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        data = self.read_if_there(name)
        if data is None:
            raise UserError("The file is missing", where=f"{self.url}/{name}", fix=self._again)
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: fsspec moves it into place at the end of the transaction.

        In a local folder, fsspec would copy from the temporary folder, and a full disk would leave half a file.
        """
        path = f"{self.root}/{name}"
        if self.is_local:
            write_bytes(Path(path), data)
            return
        with self.refusals():
            if self.has_folders:  # buckets have no folders, and makedirs would create a bucket with a mistyped name
                self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            with self.fs.transaction, self.fs.open(path, "wb") as file:
                file.write(data)

    def remove(self, name: str) -> None:
        """Delete a file."""
        with self.refusals():
            self.fs.rm_file(f"{self.root}/{name}")

    @contextmanager
    def opened(self, name: str) -> Iterator[RemoteFile]:
        """Open a file to be read."""
        with self.refusals():
            try:
                file = self.fs.open(f"{self.root}/{name}", "rb")
            except FileNotFoundError as error:
                if isinstance(error.__cause__, UserError):  # fsspec reports any HTTP failure as a missing file
                    raise error.__cause__ from None
                raise UserError("The file is missing", where=f"{self.url}/{name}", fix=self._again) from None
        with file:
            yield RemoteFile(self, file)

    def copy(self, source: Path, name: str) -> None:
        """Upload a local file in pieces; in a bucket it appears as a whole or not at all."""
        path = f"{self.root}/{name}"
        with self.refusals():
            if self.has_folders:
                self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self.fs.put_file(str(source), path)


class RemoteFile:
    """An open file below a URL."""

    def __init__(self, files: RemoteFiles, file: IO[bytes]) -> None:
        self._files, self._file = files, file

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most ``size``; empty at the end."""
        with self._files.refusals():
            return self._file.read(size)


PATIENCE_S = 3.0
"""Seconds to wait for the hub's first response, so that a command ends within five."""


def hub_silence(url: str) -> str | None:
    """Return why the hub does not respond to this address; None if it does.

    The hub's own client waits and retries for minutes, and a name that does not resolve blocks beyond any timeout. So a
    thread sends the request, and is abandoned if it takes too long.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    result: list[str | None] = []

    def ask() -> None:
        try:
            get_session().request("HEAD", url, timeout=PATIENCE_S, follow_redirects=False)
            result.append(None)
        except Exception as error:  # noqa: BLE001 - any error means no response, and is reported as the reason
            result.append(error_reason(error))

    thread = threading.Thread(target=ask, name="tunewright-hub", daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return result[0] if result else f"no response within {PATIENCE_S:g} s"


def error_reason(error: BaseException) -> str:
    """Return an error's class and text."""
    return f"{type(error).__name__}: {error}"


@contextmanager
def hub_refusals(kind: str, repository: str, revision: str | None, where: str, revision_where: str) -> Iterator[None]:
    """Convert the hub's refusals of a repository, a "model" or a "dataset", into UserErrors.

    ``where`` and ``revision_where`` are the keys or arguments that name the repository and its revision.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{repository} is gated",
            where=where,
            fix=f"Accept its licence on the page of {repository}, then run `hf auth login` (or set HF_TOKEN).",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision!r}", where=revision_where) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"The hub has no {kind} {repository}, or it is private",
            where=where,
            fix=f"Check the spelling. For a private {kind} run `hf auth login` (or set HF_TOKEN).",
        ) from None
