"""Dataset versions: immutable sets of examples with their splits, named by a digest that no row order changes.

dataset/HEAD                           the current version's digest
dataset/rows/AB.jsonl                  the rows of all versions (see ``rows``)
dataset/removed.jsonl                  rows taken out on purpose (see ``removals``)
dataset/versions/DIGEST12/members.tsv  pair key, split, cluster: the version's digest is theirs (see ``members``)
                          manifest.json  where the version came from, what is in it, under which settings
                          imports.jsonl  what became of every row of the files that were added
"""

from tunewright.data.versions.erasing import IMPORTS
from tunewright.data.versions.manifest import (
    MANIFEST,
    Counts,
    Manifest,
    Mix,
    Settings,
    Source,
    manifest_seal,
    read_manifest,
    short,
)
from tunewright.data.versions.store import (
    VERSION_FILES,
    DatasetVersion,
    Member,
    ancestry,
    checkout,
    current_manifest,
    erase_purged,
    has_version,
    import_files,
    keys_digest,
    list_versions,
    load_version,
    locked,
    members_digest,
    members_text,
    save_version,
    unfinished,
    version_folder,
    write_head,
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
    "keys_digest",
    "list_versions",
    "load_version",
    "locked",
    "manifest_seal",
    "members_digest",
    "members_text",
    "read_manifest",
    "save_version",
    "short",
    "unfinished",
    "version_folder",
    "write_head",
]
