"""Adapters at a URL: pushed to a folder and to a real S3 API, imported elsewhere, and served from there."""

from __future__ import annotations

import json
import uuid
import zipfile
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
import yaml
from openai import OpenAI

import tunewright as api
from making.command_line import tunewright
from making.small_adapters import create_key, import_adapter, own_keys, refused_import, tree
from tunewright.adapters.manifest import MANIFEST
from tunewright.adapters.registry import WEIGHTS
from tunewright.core.io import canonical_json
from tunewright.serving.options import DeployOptions

pytest_plugins = ("making.adapter_projects", "remote_helpers")


@pytest.fixture(autouse=True)
def _keys_of_my_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_keys(tmp_path, monkeypatch)


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket, which the environment gives access to."""
    for name, value in (("ENDPOINT_URL", s3_endpoint), ("ACCESS_KEY_ID", "testing"), ("SECRET_ACCESS_KEY", "testing")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = uuid.uuid4().hex
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


def _push(project: Path, url: str, *names: str) -> Any:
    return tunewright("adapters", "push", url, *names, "-p", project, "--json")


def test_pushed_adapter_is_imported_from_a_bucket_byte_for_byte(trained: Path, other: Path, bucket: str) -> None:
    pushed = _push(trained, f"{bucket}/team")
    assert pushed.code == 0, pushed.stderr
    (row,) = pushed.document["adapters"]
    assert (row["new"], row["url"]) == (True, f"{bucket}/team/{row['adapter']}")
    (again,) = _push(trained, f"{bucket}/team", row["adapter"][:8]).document["adapters"]
    assert not again["new"]
    came = import_adapter(other, row["url"])
    assert (came.code, came.document["adapter"], came.document["lineage"]) == (0, row["adapter"], "its own")
    stored = tree(Path(came.document["folder"]))
    own = tree(trained / "adapters" / row["adapter"])
    assert {k: v for k, v in stored.items() if k != "local.json"} == {k: v for k, v in own.items() if k != "local.json"}
    assert not import_adapter(other, row["url"]).document["new"]


def test_lacking_credentials_and_buckets_are_named(
    trained: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = _push(trained, "s3://not-there-3/x")
    assert (missing.code, "No such bucket" in missing.stdout) == (2, True)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(f"AWS_{name}", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    refused = _push(trained, bucket)
    assert (refused.code, refused.document["error"]["what"]) == (2, "No credentials")


def test_signature_made_later_is_pushed_too(ours: Path, other: Path, tmp_path: Path) -> None:
    assert tunewright("keys", "trust", create_key("ann"), "-p", other).code == 0
    assert import_adapter(other, ours, "--unsigned").code == 0
    url = f"file://{tmp_path}/store"
    assert _push(other, url).document["adapters"][0]["new"]
    assert tunewright("adapters", "sign", "-p", other).code == 0
    assert not _push(other, url).document["adapters"][0]["new"]
    assert (tmp_path / "store" / ours.name / "manifest.json.sig").exists()


def test_changed_adapters_are_neither_pushed_nor_imported(ours: Path, other: Path, tmp_path: Path) -> None:
    assert import_adapter(other, ours).code == 0
    store = tmp_path / "store"
    assert _push(other, f"file://{store}").code == 0
    stored = other / "adapters" / ours.name
    with (stored / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    refused = _push(other, f"file://{store}")
    assert (refused.code, "not copied" in refused.document["error"]["what"]) == (2, True)

    there = store / ours.name
    manifest = json.loads((there / MANIFEST).read_text())
    with (there / WEIGHTS).open("ab") as file:
        file.write(b"!")
    assert "differ from the manifest" in refused_import(other, f"file://{there}")
    for name, reason in (
        ("../../tunewright.yaml", "not part of an adapter"),
        ("/adapter_config.json", "not part of an adapter"),
        ("C:adapter_config.json", "not part of an adapter"),
        ("checkpoints/step-1\\..\\adapter_config.json", "not part of an adapter"),
        ("checkpoints//adapter_config.json", "not part of an adapter"),
        (MANIFEST, "there twice"),
    ):
        outside = {**manifest, "files": {**manifest["files"], name: manifest["files"][WEIGHTS]}}
        (there / MANIFEST).write_text(canonical_json(outside))
        assert reason in refused_import(other, f"file://{there}")
    (there / MANIFEST).unlink()
    assert "manifest.json is missing" in refused_import(other, f"file://{there}")


@pytest.mark.parametrize("url", ["file://{}/a.zip", "file://{}/a.tar.gz?signed=1", "zip://a::file://{}/a.bin"])
def test_archive_at_a_url_is_refused(url: str, other: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr(f"a/{MANIFEST}", "{}")
    assert "archives are not imported" in refused_import(other, url.format(tmp_path))


def test_server_imports_a_released_adapter_from_the_store(trained: Path, other: Path, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    for folder in (trained, other):
        path = folder / "tunewright.yaml"
        config = yaml.safe_load(path.read_text())
        config["serve"] = {"database_url": f"sqlite:///{tmp_path}/state.sqlite", "port": 0, "adapter_store": store}
        path.write_text(yaml.safe_dump(config))
    source = api.open(trained)
    adapter = source.adapters.list()[-1]
    source.evaluate(adapter.name)
    source.deploy("colors", adapter.name, DeployOptions(because="a test", untested="a test"))
    with source.state() as state:
        state.tenants.add("ann", ["colors"])
        key = state.keys.create("ann").secret
    warned = tunewright("deploy", "colors", adapter.name, "-p", other)
    assert warned.code == 2

    source.adapters.push(store)
    here = api.open(other)
    assert not here.adapters.list()
    with here.serve().running() as url:
        asked = OpenAI(base_url=f"{url}/v1", api_key=key).chat.completions.create(
            model="colors", messages=[{"role": "user", "content": "red green blue"}], max_tokens=8, temperature=0
        )
    assert asked.choices[0].message.content is not None
    (imported,) = here.adapters.list()
    assert (imported.digest, imported.imported is not None) == (adapter.digest, True)
