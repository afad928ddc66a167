"""Erasing the metadata of purged rows from imports.jsonl; the manifest gets the digest of what is left, and a new seal.

No version's own digest changes: it is that of the members.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from typing import Any

from tunewright.core.io import canonical_json, json_document
from tunewright.data.versions.manifest import MANIFEST, manifest_seal

IMPORTS = "imports.jsonl"

_METADATA = b'"metadata":'
_KEY = re.compile(rb'"([0-9a-f]{64})"')


def erased_metadata(imports: bytes, manifest: bytes, purged: Collection[str]) -> dict[str, bytes]:
    """Return the files of a version to write, in this order, so that it has no metadata of purged rows; may be empty.

    The manifest comes first: after a stop between the two files, the second call returns the imports that it expects.
    A manifest without the digest of its imports, or without its seal, is left alone, so that damage stays visible.

    Args:
        imports: the content of imports.jsonl.
        manifest: the content of manifest.json.
        purged: pair keys; rows that repeat one of these, or that it replaced, lose their metadata too.
    """
    kept = _without_metadata(imports, purged)
    if kept == imports:
        return {}
    document = _document(manifest)
    was_whole = document.get("imports") == _sha256(imports) and document.get("seal") == manifest_seal(document)
    if not was_whole:
        return {IMPORTS: kept}
    document["imports"] = _sha256(kept)
    document["seal"] = manifest_seal(document)
    return {MANIFEST: json_document(document).encode(), IMPORTS: kept}


def _without_metadata(imports: bytes, purged: Collection[str]) -> bytes:
    if not purged or _METADATA not in imports:
        return imports
    wanted = {key.encode() for key in purged}
    lines = imports.split(b"\n")
    for number, line in enumerate(lines):
        if _METADATA in line and not wanted.isdisjoint(_KEY.findall(line)):
            lines[number] = _line_without(line, purged)
    return b"\n".join(lines)


def _line_without(line: bytes, purged: Collection[str]) -> bytes:
    try:
        record = json.loads(line)
    except ValueError:
        return line  # changed by hand, which `data verify` reports
    about = {record.get("key"), record.get("of"), record.get("before"), *record.get("besides", ())}
    if about.isdisjoint(purged):
        return line
    return canonical_json({name: value for name, value in record.items() if name != "metadata"}).encode()


def _document(manifest: bytes) -> dict[str, Any]:
    try:
        document = json.loads(manifest)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
