"""Names and places, which no pattern can tell: found by presidio with a spaCy model that the user has installed.

Presidio's own patterns (e-mail, cards, phone numbers, …) are not used: those in this package check more.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING

from tunewright.core.errors import UserError
from tunewright.data.pii.findings import Finder, Finding

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine
    from spacy.language import Language

# Presidio's entities, as kinds of finding. Not its dates (nearly all are nobody's) and organisations, which presidio
# itself leaves out: "Has many false positives" (presidio-analyzer 2.2, conf/default.yaml).
_KINDS = {"PERSON": "person", "LOCATION": "location", "NRP": "nrp"}
NAME_LABELS = {"person": "person's name", "location": "place", "nrp": "nationality, religion or politics"}

_REMEMBERED = 1 << 16  # texts: classes of answers repeat, and a text is searched again after it was redacted
_WHERE = "--presidio"


def open_presidio(model: str) -> Finder:
    """Return a finder of names and places by presidio and a spaCy model.

    Args:
        model: the name of an installed spaCy model, such as en_core_web_lg, or a folder with one. It decides the
            language.

    Raises:
        UserError: presidio is not installed, or there is no such model, or one that finds neither names nor places.
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
            f"the spaCy model {model!r} cannot be loaded ({str(error).splitlines()[0]})",
            where=_WHERE,
            fix=f"Install it: python -m spacy download {model}. Installed: {there}.",
        ) from None
    nlp.max_length = sys.maxsize  # data.max_characters says how long a conversation may be
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
            f"the spaCy model {model!r} finds neither names nor places (its labels: {there})",
            where=_WHERE,
            fix="Choose one with named entities, such as en_core_web_lg.",
        )
    configuration = NerModelConfiguration(
        labels_to_ignore=sorted(labels - named), model_to_presidio_entity_mapping=entities
    )
    engine = SpacyNlpEngine(ner_model_configuration=configuration)
    # Loaded already: by itself it would try to download what it does not find.
    engine.nlp = {language: nlp}  # type: ignore[assignment]
    recognizer = SpacyRecognizer(supported_language=language, supported_entities=list(_KINDS))
    registry = RecognizerRegistry(recognizers=[recognizer], supported_languages=[language])
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[language])


def presidio_finder(analyzer: AnalyzerEngine, language: str) -> Finder:
    """Return a finder by an analyzer with recognizers of one's own: its PERSON, LOCATION and NRP are told."""
    entities = sorted(_KINDS.keys() & set(analyzer.get_supported_entities(language)))

    @lru_cache(_REMEMBERED)
    def find_names(text: str) -> tuple[Finding, ...]:
        found = analyzer.analyze(text, language=language, entities=entities) if text.strip() else []
        return tuple(Finding(_KINDS[each.entity_type], "personal", each.start, each.end) for each in found)

    return find_names
