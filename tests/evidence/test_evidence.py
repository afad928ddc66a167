"""Evidence on disk: what is written reads back, and what is not evidence is refused with its place."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from making.evidence import cross_fitted, make_evidence, make_items
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.evidence.files import (
    EVIDENCE_FILE,
    ITEMS_FILE,
    PROMPTS_FILE,
    PromptMessages,
    find_evaluation,
    load_evidence,
    load_items,
    load_messages,
)
from tunewright.evidence.schema import Contrast
from tunewright.evidence.verdict import verdict

GOLDEN = Path(__file__).parents[1] / "golden" / "banking77"
ITEMS = make_items(8)
EVIDENCE = make_evidence(ITEMS)


def test_evidence_and_items_round_trip(tmp_path: Path) -> None:
    write_text(tmp_path / EVIDENCE_FILE, EVIDENCE.model_dump_json(indent=2))
    write_text(tmp_path / ITEMS_FILE, "".join(f"{item.model_dump_json()}\n" for item in ITEMS))
    assert load_evidence(tmp_path) == load_evidence(tmp_path / EVIDENCE_FILE) == EVIDENCE
    assert load_items(tmp_path) == ITEMS


def test_cross_fitted_evidence_round_trips(tmp_path: Path) -> None:
    folded = cross_fitted(EVIDENCE)
    write_text(tmp_path / EVIDENCE_FILE, folded.model_dump_json())
    assert load_evidence(tmp_path) == folded
    older = {k: v for k, v in EVIDENCE.model_dump(mode="json").items() if k not in {"design", "folds"}}
    write_text(tmp_path / EVIDENCE_FILE, json.dumps(older))
    assert load_evidence(tmp_path) == EVIDENCE


def test_text_with_odd_line_ends_stays_one_item(tmp_path: Path) -> None:
    odd = ITEMS[0].model_copy(update={"input": "a\u2028b\x85c\nd\x0ce"})
    write_text(tmp_path / ITEMS_FILE, f"{odd.model_dump_json()}\n{ITEMS[1].model_dump_json()}\n")
    assert load_items(tmp_path) == [odd, ITEMS[1]]


def test_read_items_names_an_invalid_line(tmp_path: Path) -> None:
    write_text(tmp_path / ITEMS_FILE, f'{ITEMS[0].model_dump_json()}\n{{"key": 1}}\n')
    with pytest.raises(UserError, match="Invalid test item") as caught:
        load_items(tmp_path)
    assert caught.value.where == f"{tmp_path / ITEMS_FILE}:2"


def test_missing_files_are_named(tmp_path: Path) -> None:
    for load, name in ((load_items, ITEMS_FILE), (load_evidence, EVIDENCE_FILE)):
        with pytest.raises(UserError, match="tunewright evaluate") as caught:
            load(tmp_path)
        assert caught.value.where == str(tmp_path / name)
    assert load_messages(tmp_path) is None


def test_evidence_of_schema_2_opens_and_keeps_its_version(tmp_path: Path) -> None:
    older = EVIDENCE.model_dump(mode="json") | {"schema_version": 2}
    write_text(tmp_path / EVIDENCE_FILE, json.dumps(older))
    assert load_evidence(tmp_path).model_dump(mode="json") == older
    golden = load_evidence(GOLDEN)
    assert golden.schema_version == 2 and verdict(golden).decision == "can't tell"


def test_prompts_hold_each_message_once_and_read_back(tmp_path: Path) -> None:
    system, shown = {"role": "system", "content": "Cite.\u2028"}, {"role": "user", "content": "a"}
    questions = [{"role": "user", "content": f"question {number}"} for number in range(3)]
    messages = PromptMessages()
    numbers = [messages.add([system, shown, question]) for question in questions]
    assert messages.add([shown, system]) == (2, 1)
    write_text(tmp_path / PROMPTS_FILE, messages.text)
    found = load_messages(tmp_path)
    assert found is not None and len(found) == 5
    assert [[found[number - 1] for number in each] for each in numbers] == [[system, shown, q] for q in questions]


@pytest.mark.parametrize(
    "change", [{"schema_version": "2"}, {"contrasts": []}, {"margin": "much"}, {"unknown": 1}, {"arms": None}]
)
def test_read_evidence_refuses_other_content(tmp_path: Path, change: dict[str, object]) -> None:
    write_text(tmp_path / EVIDENCE_FILE, json.dumps(EVIDENCE.model_dump() | change))
    with pytest.raises(UserError, match="Not evidence of schema 2 or 3"):
        load_evidence(tmp_path)


def test_evidence_of_an_older_schema_asks_for_another_evaluation(tmp_path: Path) -> None:
    write_text(tmp_path / EVIDENCE_FILE, json.dumps({"schema_version": 1, "bleu_signature": "nrefs:1"}))
    with pytest.raises(UserError, match="Evidence of schema 1; this tunewright reads schema 2 or 3") as caught:
        load_evidence(tmp_path)
    assert "Evaluate again" in str(caught.value.fix)


def test_newest_evaluation_is_found_next_to_older_schemas(tmp_path: Path) -> None:
    old = {"schema_version": 1, "lineage": {"created": "2026-10-01T00:00:00+00:00"}}
    write_text(tmp_path / "old" / EVIDENCE_FILE, json.dumps(old))
    write_text(tmp_path / "new" / EVIDENCE_FILE, EVIDENCE.model_dump_json())
    assert find_evaluation(tmp_path) == tmp_path / "new"
    write_text(tmp_path / "old" / EVIDENCE_FILE, json.dumps(old | {"lineage": {"created": "2026-12-01"}}))
    with pytest.raises(UserError, match="schema 1"):
        load_evidence(find_evaluation(tmp_path))


def test_evidence_refuses_non_finite_numbers() -> None:
    fields = EVIDENCE.contrasts[0].model_dump() | {"p_value": float("nan")}
    with pytest.raises(ValidationError, match="p_value"):
        Contrast.model_validate(fields)
