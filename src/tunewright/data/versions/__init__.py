"""Dataset versions: immutable sets of examples with their splits, named by a digest that ignores row order.

dataset/HEAD                           the current version's digest
dataset/rows/AB.jsonl                  the rows of all versions (see ``files``)
dataset/removed.jsonl                  rows removed on purpose (see ``logs``)
dataset/versions/DIGEST12/members.tsv  pair key, split, cluster: the version's digest is theirs (see ``files``)
                          manifest.json  origin, counts and settings of the version
                          imports.jsonl  the fate of each row of the added files
"""

from tunewright.data.versions.store import (
    VERSION_FILES,
    ancestry,
    checkout,
    current_manifest,
    erase_purged,
    has_version,
    import_files,
    import_records,
    list_versions,
    load_version,
    locked,
    no_version,
    save_version,
    unfinished,
    version_folder,
    write_head,
)
from tunewright.data.versions.version import (
    IMPORTS,
    MANIFEST,
    Counts,
    DatasetVersion,
    Manifest,
    Member,
    Mix,
    Settings,
    Source,
    keys_digest,
    manifest_seal,
    members_digest,
    members_lines,
    read_manifest,
    short,
)

__all__ = [
    "IMPORTS",
    "MANIFEST",
    "VERSION_FILES",
    "Counts",
    "DatasetVersion",
    "Manifest",
    "Member",
    "Mix",
    "Settings",
    "Source",
    "ancestry",
    "checkout",
    "current_manifest",
    "erase_purged",
    "has_version",
    "import_files",
    "import_records",
    "keys_digest",
    "list_versions",
    "load_version",
    "locked",
    "manifest_seal",
    "members_digest",
    "members_lines",
    "no_version",
    "read_manifest",
    "save_version",
    "short",
    "unfinished",
    "version_folder",
    "write_head",
]
