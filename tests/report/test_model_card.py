"""Model cards, read back by the hub's own classes."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from making.evidence import make_evidence, make_items
from making.full_evidence import GENERAL, full_evidence
from tunewright.evidence.verdict import verdict
from tunewright.render.markdown import plain
from tunewright.report.model_card import CardSubject, model_card

BASE = "meta-llama/Llama-3.1-8B-Instruct"
LINEAGE: dict[str, Any] = {
    "digest": "a" * 64,
    "created": "2026-10-28T16:02:00+00:00",
    "seed": 7,
    "packages": {"tunewright": "0.1.0", "peft": "0.21.2"},
    "base": {"spec": "/home/ada/bases/llama", "commit": None, "digest": "b" * 64},
    "dataset": {
        "digest": "c" * 64,
        "mix": None,
        "splits": {name: {"digest": name[0] * 64, "examples": 1200} for name in ("train", "dev", "test")},
    },
    "config": {
        "data": {"sources": ["/home/ada/secret.jsonl", "hf://datasets/org/courts"]},
        "train": {"lora_r": 16, "learning_rate": 0.0002, "target_modules": ["q_proj", "v_proj"]},
    },
}
SUBJECT = CardSubject("legal-aaaaaaaaaaaa", LINEAGE, "ada/legal", BASE, "apache-2.0", has_system_prompt=True)


def test_metadata_are_the_hubs_own() -> None:
    evidence = full_evidence()
    data: Any = ModelCard(model_card(SUBJECT, evidence)).data
    assert data.base_model == BASE
    assert data.base_model_relation == "adapter"
    assert (data.library_name, data.license, data.datasets) == ("peft", "apache-2.0", ["org/courts"])
    assert data.tags == ["tunewright", "lora", f"base_model:adapter:{BASE}"]
    tuned = evidence.arm(evidence.contrasts[0].treatment)
    assert [result.metric_type for result in data.eval_results] == [evidence.metric, "bleu"]
    for result in data.eval_results:
        score = tuned.score(result.metric_type)
        assert result.metric_value == pytest.approx(100 * score.value, abs=0.005)
        assert result.metric_args["interval_95"][0] <= result.metric_value <= result.metric_args["interval_95"][1]
        assert (result.dataset_split, result.metric_args["items"]) == ("test", score.scored)


def test_card_has_the_verdict_with_every_reason_and_the_measurements() -> None:
    evidence = make_evidence(make_items(60)).model_copy(update={"regressions": GENERAL})
    text = ModelCard(model_card(SUBJECT, evidence)).text
    for reason in verdict(evidence).reasons:
        assert plain(reason) in text
    for arm in evidence.arms:
        assert f"| {plain(arm.name)} |" in text
    assert "| train | 1,200 | `tttttttttttt` |" in text
    assert "| `learning\\_rate` |" not in text
    assert "| `learning_rate` | 0.0002 |" in text
    assert f'PeftModel.from_pretrained(base, "{SUBJECT.repository}")' in text


@pytest.mark.parametrize("evidence", [None, full_evidence()])
def test_card_has_no_path_and_no_row(evidence: Any) -> None:
    card = model_card(SUBJECT, evidence)
    assert "/home/ada" not in card
    assert "secret.jsonl" not in card


def test_card_without_evidence_says_so_and_names_the_command() -> None:
    card: Any = ModelCard(model_card(SUBJECT, None))
    assert card.data.eval_results is None
    assert "Verdict: no evidence" in card.text
    assert "`tunewright evaluate legal-aaaaaaaaaaaa`" in card.text


def test_card_of_an_imported_adapter_says_that_the_data_are_unknown() -> None:
    foreign = {key: LINEAGE[key] for key in ("digest", "created")}
    card: Any = ModelCard(model_card(CardSubject("other", foreign, None, None, None, has_system_prompt=False), None))
    assert "training data are unknown" in card.text
    assert "No licence has been stated" in card.text
    assert card.data.base_model is None
