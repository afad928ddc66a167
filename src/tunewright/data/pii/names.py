"""Names and places, found by presidio with a spaCy model that the user installs.

Presidio's patterns (e-mail, cards, phone numbers, …) are not used: those of this package check more.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING

from tunewright.core.errors import UserError
from tunewright.data.pii.secret_patterns import Finder, Finding

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine
    from spacy.language import Language

# Presidio's entities by kind of finding. Dates are left out (most are not personal), and so are organisations, which
# presidio's default ignores: "Has many false positives" (presidio-analyzer 2.2, conf/default.yaml).
_KINDS = {"PERSON": "person", "LOCATION": "location", "NRP": "nrp"}
NAME_LABELS = {"person": "person's name", "location": "place", "nrp": "nationality, religion or politics"}

_REMEMBERED = 1 << 16  # texts: answers repeat, and a text is searched again after redaction
_WHERE = "--presidio"


def open_presidio(model: str) -> Finder:
    """Return a finder of names and places that uses presidio and a spaCy model.

    Args:
        model: an installed spaCy model, such as en_core_web_lg, or a folder with one. It decides the language.

    Raises:
        UserError: presidio or the model is not installed, or the model finds neither names nor places.
    """
    try:
        import presidio_analyzer  # noqa: F401
        import spacy
    except ImportError:
        fix = "Install it: pip install 'tunewright[presidio]'"
        raise UserError("presidio-analyzer is not installed", where=_WHERE, fix=fix) from None
    try:
        nlp = spacy.load(model)
    except (OSError, ValueError) as error:
        there = ", ".join(spacy.util.get_installed_models()) or "none"
        raise UserError(
            f"The spaCy model {model!r} cannot be loaded ({str(error).splitlines()[0]})",
            where=_WHERE,
            fix=f"Install it: python -m spacy download {model}. Installed: {there}.",
        ) from None
    nlp.max_length = sys.maxsize  # data.max_characters limits the length of a conversation
    language = str(nlp.lang)
    return presidio_finder(_analyzer(nlp, language, model), language)


def _analyzer(nlp: Language, language: str, model: str) -> AnalyzerEngine:
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    from presidio_analyzer.nlp_engine.ner_model_configuration import MODEL_TO_PRESIDIO_ENTITY_MAPPING
    from presidio_analyzer.predefined_recognizers import SpacyRecognizer

    entities = {**MODEL_TO_PRESIDIO_ENTITY_MAPPING, "FAC": "LOCATION"}  # FAC: as in presidio's conf/default.yaml
    finding = (nlp.analyze_pipes() or {})["attrs"].get("doc.ents", {}).get("assigns", [])
    labels = {label for pipe in finding for label in nlp.pipe_labels.get(pipe, [])}
    named = {label for label in labels if entities.get(label) in _KINDS}
    if not named:
        there = ", ".join(sorted(labels)) or "none"
        raise UserError(
            f"The spaCy model {model!r} finds neither names nor places (its labels: {there})",
            where=_WHERE,
            fix="Choose one with named entities, such as en_core_web_lg.",
        )
    configuration = NerModelConfiguration(
        labels_to_ignore=sorted(labels - named), model_to_presidio_entity_mapping=entities
    )
    engine = SpacyNlpEngine(ner_model_configuration=configuration)
    # Set the loaded model: presidio would try to download a missing one.
    engine.nlp = {language: nlp}  # type: ignore[assignment]
    recognizer = SpacyRecognizer(supported_language=language, supported_entities=list(_KINDS))
    registry = RecognizerRegistry(recognizers=[recognizer], supported_languages=[language])
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[language])


def presidio_finder(analyzer: AnalyzerEngine, language: str) -> Finder:
    """Return a finder that uses a given analyzer; it reports PERSON, LOCATION and NRP."""
    entities = sorted(_KINDS.keys() & set(analyzer.get_supported_entities(language)))

    @lru_cache(_REMEMBERED)
    def find_names(text: str) -> tuple[Finding, ...]:
        found = analyzer.analyze(text, language=language, entities=entities) if text.strip() else []
        return tuple(Finding(_KINDS[each.entity_type], "personal", each.start, each.end) for each in found)

    return find_names
