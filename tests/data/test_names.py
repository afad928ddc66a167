"""Names and places through presidio's own engine, with a spaCy model that is made here, of rules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from data_helpers import Listener, example, new_project, unlike_pairs, write_jsonl

from making.command_line import tunewright
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.options import AddOptions
from tunewright.data.pii import find, redact, scan, warned
from tunewright.data.pii.personal import open_presidio, presidio_finder
from tunewright.data.pii.secret_patterns import Finder
from tunewright.data.versions import load_version

NAMES = {
    "PERSON": ["Maria Weber", "Ana", "李明"],
    "GPE": ["Bonn"],
    "NORP": ["Dutch"],
    "ORG": ["Acme"],
    "DATE": ["Monday"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a spaCy model that knows a handful of names."""
    pytest.importorskip("presidio_analyzer", reason="presidio-analyzer is not installed")
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler", config={"phrase_matcher_attr": "ORTH"})
    ruler.add_patterns([{"label": label, "pattern": name} for label, names in NAMES.items() for name in names])
    folder = tmp_path_factory.mktemp("spacy") / "model"
    nlp.to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def names(model: str) -> Finder:
    """Return the finder."""
    return open_presidio(model)


def _found(text: str, names: Finder) -> list[tuple[str, str]]:
    return [(each.kind, text[each.start : each.end]) for each in find(text, names)]


def test_presidio_finder_finds_names_places_and_origins_only(names: Finder) -> None:
    text = "Maria Weber of Acme, a Dutch woman, moves to Bonn in May; mail maria@uni-bonn.de"
    assert _found(text, names) == [
        ("person", "Maria Weber"),
        ("nrp", "Dutch"),
        ("location", "Bonn"),
        ("email", "maria@uni-bonn.de"),
    ]
    assert [kind for kind, _ in _found(text, lambda _: [])] == ["email"]


def test_names_are_personal_data_reported_without_values(names: Finder) -> None:
    result = scan([("a.jsonl:1", example("I am Maria Weber", "Hello from Bonn"))], also=names)
    assert result.counts == {"person": 1, "location": 1}
    assert result.of("secret") == ()
    reported = warned(result)
    assert "a.jsonl:1: person's name in messages[0] (user), 5-16" in reported
    assert "place: 1" in reported
    assert not any(value in reported + repr(result) for value in ("Maria", "Bonn"))


def test_redact_gives_a_name_one_placeholder_in_both_sides(names: Finder) -> None:
    given = example(
        "I am Maria Weber of Bonn, maria@uni-bonn.de. Ana and Anaïs know me; 李明 too.", "Maria Weber? Ana?"
    )
    redacted, counts = redact(given, also=names)
    assert [message.content for message in redacted.messages] == [
        "I am <PERSON_1> of <LOCATION_1>, <EMAIL_1>. <PERSON_2> and Anaïs know me; <PERSON_3> too.",
        "<PERSON_1>? <PERSON_2>?",
    ]
    assert counts == {"person": 5, "location": 1, "email": 1}
    assert redact(redacted, also=names) == (redacted, {})


def test_presidio_findings_are_cut_at_other_findings() -> None:
    presidio = pytest.importorskip("presidio_analyzer", reason="presidio-analyzer is not installed")

    class Greedy(presidio.LocalRecognizer):  # type: ignore[misc, name-defined]
        """Takes the whole text for a name, as models do now and then."""

        def load(self) -> None:
            """Nothing to load."""

        def analyze(self, text: str, entities: list[str], nlp_artifacts: object) -> list[object]:
            """One finding."""
            return [presidio.RecognizerResult("PERSON", 0, len(text), 0.85)]

    from presidio_analyzer.nlp_engine import NoOpNlpEngine

    registry = presidio.RecognizerRegistry(recognizers=[Greedy(supported_entities=["PERSON"])])
    greedy = presidio_finder(
        presidio.AnalyzerEngine(
            registry=registry, nlp_engine=NoOpNlpEngine(models=[{"lang_code": "en", "model_name": "none"}])
        ),
        "en",
    )
    text = "Maria <maria@uni-bonn.de>, <PERSON_1>"
    assert _found(text, greedy) == [("person", "Maria"), ("email", "maria@uni-bonn.de")]
    redacted, _ = redact(example(text, "<PERSON_1>"), also=greedy)
    assert [m.content for m in redacted.messages] == ["<PERSON_2> <<EMAIL_1>>, <PERSON_1>", "<PERSON_1>"]


def test_cli_warns_of_names_and_redacts_them(model: str, tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    pairs = [*unlike_pairs(60), ("Who lives in Bonn?", "Maria Weber lives there")]
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    added = tunewright("data", "add", path, "--presidio", model, "--json", "-p", project.root)
    assert (added.code, added.document["personal"]) == (0, {"location": 1, "person": 1})
    assert "person's name: 1" in added.stderr
    other = new_project(tmp_path / "q")
    redacted = tunewright("data", "add", path, "--presidio", model, "--redact", "--json", "-p", other.root)
    assert redacted.document["redacted"] == {"location": 1, "person": 1}
    outputs = [m.example.output for m in load_version(other.dataset).members]
    assert "<PERSON_1> lives there" in outputs


def test_open_presidio_names_the_extra_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    project = new_project(tmp_path / "p")
    path = write_jsonl(tmp_path / "pairs.jsonl", unlike_pairs(60))
    with pytest.raises(UserError, match="presidio-analyzer is not installed") as caught:
        add(project, [path], Listener(), AddOptions(presidio="en_core_web_lg"))
    assert "tunewright[presidio]" in (caught.value.fix or "")
    assert not project.dataset.exists()


def test_open_presidio_refuses_missing_and_unsuitable_models(model: str, tmp_path: Path) -> None:
    import spacy

    with pytest.raises(UserError, match="'xx_no_such_model' cannot be loaded") as caught:
        open_presidio("xx_no_such_model")
    assert "python -m spacy download xx_no_such_model" in (caught.value.fix or "")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(UserError, match="finds neither names nor places"):
        open_presidio(str(tmp_path / "blank"))
