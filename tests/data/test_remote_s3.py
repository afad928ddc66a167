"""Errors of S3, with a real S3 API on loopback, and the command line over it."""

from __future__ import annotations

import sys
import urllib.request
import uuid
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from data_helpers import Listener
from review_helpers import judge_next, review

from making.command_line import tunewright
from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.remote import pull, push
from tunewright.data.versions import load_version, short

pytest_plugins = ["remote_helpers"]


def _s3_options(endpoint: str, key: str = "testing") -> dict[str, Any]:
    return {"key": key, "secret": "testing", "client_kwargs": {"endpoint_url": endpoint}, "skip_instance_cache": True}


def test_missing_bucket_is_reported_and_not_created(one: ProjectFolder, s3_endpoint: str) -> None:
    options = _s3_options(s3_endpoint)
    for verb in (push, pull):
        with pytest.raises(UserError, match="No such bucket") as caught:
            verb(OpenFolder(one, Listener()), "s3://not-there-1/x", options=options)
        assert caught.value.where == "s3://not-there-1/x"
    assert not fsspec.filesystem("s3", **options).exists("not-there-1")


def test_wrong_credentials_are_reported(one: ProjectFolder, s3_endpoint: str) -> None:
    bucket = uuid.uuid4().hex
    fsspec.filesystem("s3", **_s3_options(s3_endpoint)).mkdir(bucket)
    _check_rights(s3_endpoint, after="0")
    try:
        for verb in (push, pull):
            with pytest.raises(UserError, match="Access denied") as caught:
                verb(OpenFolder(one, Listener()), f"s3://{bucket}/x", options=_s3_options(s3_endpoint, "AKIAWRONG"))
            assert "AWS_ACCESS_KEY_ID" in (caught.value.fix or "")
    finally:
        _check_rights(s3_endpoint, after="inf")


def _check_rights(endpoint: str, after: str) -> None:
    """From which request on moto's server asks who it is that asks."""
    url, kind = f"{endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    with urllib.request.urlopen(urllib.request.Request(url, after.encode(), kind)):
        pass


def test_unreachable_endpoint_is_reported(one: ProjectFolder, s3_endpoint: str) -> None:
    options = {**_s3_options("http://127.0.0.1:9"), "config_kwargs": {"retries": {"max_attempts": 0}}}
    with pytest.raises(UserError, match="Cannot connect: Could not connect") as caught:
        push(OpenFolder(one, Listener()), "s3://bucket/x", options=options)
    assert "AWS_ENDPOINT_URL" in (caught.value.fix or "")


def test_missing_fsspec_package_is_named(one: ProjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError) as caught:
        push(OpenFolder(one, Listener()), "s3://bucket/x")
    assert "tunewright[s3]" in (caught.value.fix or "")


def test_cli_pushes_to_the_endpoint_of_the_environment(
    one: ProjectFolder, two: ProjectFolder, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = _s3_options(s3_endpoint)
    bucket = uuid.uuid4().hex
    fsspec.filesystem("s3", **options).mkdir(bucket)
    for name, value in (("ENDPOINT_URL", s3_endpoint), ("ACCESS_KEY_ID", "testing"), ("SECRET_ACCESS_KEY", "testing")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    judge_next(review(one), "right", "edit")
    head = load_version(one.dataset).digest
    pushed = tunewright("data", "push", f"s3://{bucket}/team", "--json", "-p", one.root)
    assert (pushed.code, pushed.document["head"], pushed.document["rows"]) == (0, head, 60)
    pulled = tunewright("data", "pull", f"s3://{bucket}/team", "-p", two.root)
    assert pulled.code == 0
    assert f"Copied {short(head)}: 60 new rows" in pulled.stdout
    assert "Copied 2 verdicts (3 records of reviews)" in pulled.stdout
    assert load_version(two.dataset) == load_version(one.dataset)
    missing = tunewright("data", "push", "s3://not-there-2/x", "-p", one.root)
    assert (missing.code, "No such bucket" in missing.stderr) == (2, True)
