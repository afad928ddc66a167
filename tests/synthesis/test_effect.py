"""The effect of generated rows: two adapters of one version, with and without them, on people's test items."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from tunewright.data.versions import load_version
from tunewright.evidence.files import load_evidence


@pytest.mark.slow
def test_generated_effect_is_measured_and_said_in_the_report(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = tiny_project(tmp_path / "p", tiny_base_folder)
    about = {"teacher": "big", "samples": 1}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{row['prompt']} again"},
                {"role": "assistant", "content": row["completion"]},
            ],
            "generated": about,
        }
        for row in pairs(60, seed=7)
    ]
    generated = write_jsonl(project / "generated.jsonl", rows)
    assert tunewright("data", "add", project / "pairs.jsonl", generated, "-p", project).code == 0
    version = load_version(project / "dataset")
    written = [m for m in version.members if m.generated]
    assert written
    names, evaluations = [], []
    for generated_too in (True, False):
        config = yaml.safe_load((project / "tunewright.yaml").read_text(encoding="utf-8"))
        config["train"] |= {"generated": generated_too}
        (project / "tunewright.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        trained = tunewright("train", "-p", project, "--json")
        assert trained.code == 0, trained.stderr
        names.append(trained.document["adapter"])
        assert trained.document["examples"] == sum(generated_too or not m.generated for m in version.examples("train"))
        evaluated = tunewright("evaluate", names[-1], "-p", project, "--json")
        assert evaluated.code in (0, 3, 4), evaluated.stderr
        evaluations.append(
            max((project / "evaluations").glob("*/evidence.json"), key=lambda f: f.stat().st_mtime).parent
        )
    share = f"{len(written)} of {len(version.examples('train'))} training rows are generated"
    comment = ("verdict", "--markdown", evaluations[0].name, "-p", project)
    assert f"{share}, with unknown effect" in tunewright(*comment).stdout
    ran = tunewright("data", "generated-effect", evaluations[0].name, evaluations[1].name, "-p", project, "--json")
    assert ran.code == 0, ran.stderr
    effect = ran.document
    assert f"{share} (0 accepted by people). With them" in tunewright(*comment).stdout
    assert (effect["generated"], effect["accepted"]) == (len(written), 0)
    assert effect["items"] == len(version.examples("test"))
    with_rows, without_rows = (load_evidence(place) for place in evaluations)
    assert effect["score_with"]["value"] == pytest.approx(with_rows.arm("tuned").scores[with_rows.metric].value)
    assert effect["score_without"]["value"] == pytest.approx(
        without_rows.arm("tuned").scores[without_rows.metric].value
    )
    assert without_rows.train_items == len(version.examples("train")) - len(written)
    assert load_evidence(evaluations[0]).generated_effect is not None
    report = tunewright("report", evaluations[0].name, "-p", project)
    assert report.code == 0, report.stderr
    page = next(evaluations[0].glob("*.html")).read_text(encoding="utf-8")
    assert share in page
    used = tunewright("data", "trained-by", written[0].key[:12], "-p", project, "--json").document
    assert {each["adapter"]: each["use"] for each in used["adapters"]} == {names[0]: "trained", names[1]: "left out"}
    shown = tunewright("adapters", "show", names[1], "-p", project, "--json").document
    assert len(shown["dataset"]["splits"][0]["left_out"]) == len(written)

    swapped = tunewright("data", "generated-effect", evaluations[1].name, evaluations[0].name, "-p", project)
    assert (swapped.code, "was trained without generated rows" in swapped.stderr) == (2, True)
