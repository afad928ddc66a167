"""Projects that earlier versions wrote: today's code opens, verifies and continues them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from write_project import EXPECTED, READING, STATE

import tunewright
from making.command_line import tunewright as command
from tunewright.adapters.registry import Adapter
from tunewright.config.project import ProjectFolder
from tunewright.core.io import digest
from tunewright.core.progress import LogReporter
from tunewright.evaluation.frozen_answers import IncumbentModel
from tunewright.evaluation.generations import Decoding, answer_journal
from tunewright.evidence.files import EVIDENCE_FILE, load_evidence
from tunewright.models.bases import Base
from tunewright.serving.tenants import State
from tunewright.training.train import training_inputs

ARCHIVES = sorted(Path(__file__).parent.glob("project-*.tar.xz"))


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda archive: archive.name)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "project"
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(golden: Path) -> Any:
    return json.loads((golden / EXPECTED).read_text(encoding="utf-8"))


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_commands_read_what_an_earlier_version_wrote(golden: Path, expected: Any, words: tuple[str, ...]) -> None:
    ran = command(*words, "-p", golden, "--json")
    assert missing(expected["documents"][" ".join(words)], ran.document) == []


GONE = {
    ".keys[0].encrypted": "ssh-keygen has the private keys",
    ".keys[0].trusted.public_key": "every key is shown in OpenSSH's format",
    ".causes[0].next": "a sentence for people; it also names `train --sweep`",
}
"""Values that no later document has, and why; the changelog names them."""


def missing(then: Any, now: Any, where: str = "") -> list[str]:
    """The values of a document that another lacks or has changed; it may have more keys."""
    if where in GONE:
        return []
    if isinstance(then, dict) and isinstance(now, dict):
        return [line for key in then for line in missing(then[key], now.get(key, "(no such key)"), f"{where}.{key}")]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [line for n, (a, b) in enumerate(zip(then, now, strict=True)) for line in missing(a, b, f"{where}[{n}]")]
    return [] if then == now else [f"{where}: {then!r} is now {now!r}"]


def test_evidence_of_an_earlier_version_makes_verdict_and_report(golden: Path) -> None:
    designs = set()
    for file in (golden / "evaluations").glob(f"*/{EVIDENCE_FILE}"):
        evidence = load_evidence(file)
        designs.add(evidence.design)
        assert evidence.id == file.parent.name
        verdict = command("verdict", file, "-p", golden, "--json").document
        assert verdict["decision"] in ("ship", "don't ship", "can't tell")
        report = command("report", file, "-p", golden, "--json").document["report"]
        assert evidence.project in Path(report).read_text(encoding="utf-8")
    assert designs == {"held-out", "cross-fitted"}


def test_adapter_of_an_earlier_version_is_traced_to_its_rows(golden: Path) -> None:
    project = tunewright.open(golden)
    (adapter,) = (Adapter(folder) for folder in project.folder.adapters.iterdir())
    train = project.data.version().examples("train")
    trained_by = command("data", "trained-by", train[0].key, "-p", golden, "--json").document
    assert adapter.name in json.dumps(trained_by)


def test_training_settings_lead_to_the_adapter_of_an_earlier_version(golden: Path, tiny_base_folder: Path) -> None:
    """Also where other layers are recomputed, which changes no weight, or Liger's kernels depend on the machine."""
    project = tunewright.open(golden)
    (adapter,) = (Adapter(folder) for folder in project.folder.adapters.iterdir())
    recorded = adapter.lineage
    version: Any = SimpleNamespace(digest=recorded["dataset"]["digest"])

    class RecordedBase(Base):
        digest = recorded["base"]["digest"]

    base = RecordedBase("base", tiny_base_folder, None, "LlamaForCausalLM", {})
    chat: Any = SimpleNamespace(digest=recorded["template_digest"])
    settings = project.folder.config.train

    def trained_it(**keys: Any) -> bool:
        config = project.folder.config.model_copy(update={"train": settings.model_copy(update=keys)})
        return adapter.was_trained_by(digest(training_inputs(ProjectFolder(golden, config), version, base, chat)))

    for layers in ("auto", "none", 3):
        assert trained_it(gradient_checkpointing=layers)
    assert trained_it(use_liger_kernel="auto")
    assert trained_it(use_liger_kernel=False)
    assert not trained_it(use_liger_kernel=True)


def test_frozen_answers_and_replies_of_an_earlier_version_are_found_again(golden: Path) -> None:
    project = tunewright.open(golden)
    members = project.data.version().examples("test")
    (config,) = project.folder.config.evaluate.incumbents
    frozen = IncumbentModel(project.folder, config, LogReporter())
    assert frozen.estimate(members).calls == 0
    answers = frozen.answers(members, "test")
    assert answers.path.exists()
    assert [answer.answer for answer in answers.given] == [member.example.output for member in members]

    aside = project.folder.incumbents.rename(golden / "aside")
    try:
        journalled = IncumbentModel(project.folder, config, LogReporter())
        assert journalled.estimate(members).calls == 0
        assert len(journalled.endpoint.journal.answers) >= len(members)
    finally:
        aside.rename(project.folder.incumbents)


def test_generations_of_an_earlier_version_keep_their_keys(golden: Path, expected: Any) -> None:
    journals = {file.stem: file for file in (golden / ".tunewright" / "generations").iterdir()}
    assert journals.keys() <= expected["decodings"].keys()
    for name, file in journals.items():
        fields = expected["decodings"][name]
        journal = answer_journal(file.parent, Decoding(**{**fields, "stop": tuple(fields["stop"])}))
        assert journal.path == file
        assert len(journal.answers) > 10


def test_tenants_of_an_earlier_version_keep_keys_releases_and_usage(golden: Path, expected: Any) -> None:
    with State(f"sqlite:///{golden / STATE}", "bob") as state:
        assert state.verify().faults == ()
        assert state.keys.caller(expected["key"]).tenant == "acme"
        assert list(state.releases.live()) == ["courts"]
        assert [line.prompt_tokens for line in state.usage.lines("acme")] == [10, 20, 30]
