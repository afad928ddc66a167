"""Report texts for inputs with several references, and for few clusters."""

from __future__ import annotations

from factories import make_evidence, make_history, make_items
from report_evidence import ITEMS
from tunewright.evidence.blocks import contrasts_section
from tunewright.evidence.common import References
from tunewright.report.page import render_report, summary

COUNTS = References(items=30, inputs=5, several=5, references=30)


def test_summary_counts_items_and_names_their_inputs_when_inputs_have_several_references() -> None:
    evidence = make_evidence(make_items(30), metric="bleu").model_copy(update={"references": COUNTS})
    assert "of these 30 items (5 distinct inputs with 6.0 references each), " in summary(evidence).meaning
    assert "of these 30 items, " in summary(make_evidence(make_items(30), metric="bleu")).meaning
    page = render_report(evidence, make_items(30), make_history())
    assert "30 held-out test items in 15 clusters, 5 distinct inputs with 6.0 references each, kept apart" in page


def test_contrasts_name_no_independent_items_when_clusters_are_few() -> None:
    few = [item.model_copy(update={"cluster": f"c{n % 2}"}) for n, item in enumerate(make_items(30))]
    assert "2 clusters: too few to estimate" in str(contrasts_section(make_evidence(few)))
    assert "independent items" not in str(contrasts_section(make_evidence(few))).replace(
        "too few to estimate how many independent items", ""
    )
    assert "worth" in str(contrasts_section(make_evidence(ITEMS)))
