"""Verbs of :class:`tunewright.Project` under one name, as the command line has them."""

from __future__ import annotations

from tunewright.adapters import verbs
from tunewright.adapters.import_options import ImportOptions
from tunewright.api.deprecated import keywords
from tunewright.data import preview, remote, remove, verify
from tunewright.data import verbs as data
from tunewright.data.remove_options import RemoveOptions
from tunewright.evaluation import data_verbs, label_review, stored
from tunewright.evaluation.verbs import current_split_power
from tunewright.export import verbs as exports
from tunewright.export.hub_options import HubOptions
from tunewright.open_project import OpenProject
from tunewright.synthesis import verbs as synthesis


class ProjectGroup(OpenProject):
    """The same open project with other verbs: ``tunewright data add`` is ``project.data.add``."""

    def __init__(self, project: OpenProject) -> None:
        self.__dict__ = project.__dict__  # a base that one group loads is loaded for all


class ProjectAdapters(ProjectGroup):
    """Verbs on a project's adapters."""

    import_ = keywords(verbs.import_, ImportOptions)
    list = verbs.list_all
    push = verbs.push
    show = stored.show_adapter
    sign = verbs.sign
    verify = verbs.verify


class ProjectData(ProjectGroup):
    """Verbs on a project's data."""

    blame = data.blame
    check_files = preview.check_files
    checkout = data.checkout
    cluster_counts = data.cluster_counts
    diff = data.diff
    export = data.export
    fix_file = preview.fix_file
    leakage = data.leakage
    log = data.log
    metadata = data.metadata
    preview_file = preview.preview_file
    pull = remote.pull
    push = remote.push
    remove = keywords(remove.remove, RemoveOptions)
    sheets = preview.sheets
    show = data.show
    trained_by = data.trained_by
    verify = verify.verify
    version = data.version

    add = data_verbs.add
    check = data_verbs.check
    contamination = data_verbs.contamination
    exact_match_misleads = data_verbs.exact_match_misleads
    scores_by_distance = data_verbs.scores_by_distance
    scores_by_template = data_verbs.scores_by_template
    split_power = current_split_power

    apply_reviews = label_review.apply_reviews
    import_reviews = label_review.import_reviews
    review = label_review.review
    review_status = label_review.review_status
    stored_suspects = label_review.stored_suspects
    suspects = label_review.find_suspects

    estimate_from_documents = synthesis.estimate_from_documents
    estimate_generate = synthesis.estimate_generate
    from_documents = synthesis.from_documents
    generate = synthesis.generate
    generated_effect = synthesis.generated_effect


class ProjectExport(ProjectGroup):
    """Verbs that export a project's adapters for other engines."""

    compressed = exports.compressed
    gguf = exports.gguf
    hub = keywords(exports.hub, HubOptions)
    merge = exports.merge
    ollama = exports.ollama
