"""Verbs of :class:`tunewright.Project` under one name, as the command line has them."""

from __future__ import annotations

from tunewright.adapters import signing_keys, verbs
from tunewright.adapters.import_options import ImportOptions
from tunewright.api.context import ProjectGroup
from tunewright.api.deprecated import keywords
from tunewright.evaluation import adapter_details


class ProjectAdapters(ProjectGroup):
    """Verbs on a project's adapters."""

    import_ = keywords(verbs.import_, ImportOptions)
    list = verbs.list_all
    push = verbs.push
    show = adapter_details.show
    sign = verbs.sign
    verify = verbs.verify


class ProjectKeys(ProjectGroup):
    """Verbs on this user's signing keys, and those that a project trusts."""

    create = signing_keys.create
    list = signing_keys.list_all
    passphrase = signing_keys.passphrase
    revoke = signing_keys.revoke
    show = signing_keys.show
    trust = signing_keys.trust
