"""Writing values back into tunewright.yaml: what was asked for is changed, and nothing else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.config import PRESETS, DataConfig, TrainConfig
from tunewright.config.io import load_config, write_config, write_section
from tunewright.core.errors import UserError

COMMENTED = """\
# Ours; do not touch.
name: courts   # the short name

train:  # how
  # The rate that Ada found.
  learning_rate: 2.0e-4   # was 1e-4

  epochs: 2
evaluate: {num_fewshot: [1, 2]}  # few
"""


def _write(path: Path, text: str, **changes: object) -> tuple[str, dict[str, object]]:
    path.write_bytes(text.encode())
    wanted = load_config(path).train.model_copy(update=changes)
    written = write_section(path, wanted)
    assert load_config(path).train == wanted
    return path.read_bytes().decode(), written


def _all_linear(rate: float) -> dict[str, object]:
    return {"preset": "all-linear", "target_modules": PRESETS["all-linear"]["target_modules"], "learning_rate": rate}


def test_comments_order_and_other_keys_survive(tmp_path: Path) -> None:
    text, written = _write(tmp_path / "tunewright.yaml", COMMENTED, **_all_linear(0.0013))
    expected = COMMENTED.replace("2.0e-4 ", "0.0013 ").replace(
        "train:  # how\n", "train:  # how\n  preset: all-linear\n"
    )
    assert text == expected
    assert written == {"preset": "all-linear", "learning_rate": 0.0013}


def test_edit_leaves_an_equal_config_untouched(tmp_path: Path) -> None:
    path = tmp_path / "tunewright.yaml"
    path.write_text(COMMENTED)
    before = path.stat().st_mtime_ns
    assert write_section(path, load_config(path).train) == {}
    assert path.stat().st_mtime_ns == before


def test_targets_that_are_written_out_follow_the_preset(tmp_path: Path) -> None:
    text = "train:\n  target_modules:\n  - q_proj\n  - v_proj\n  lora_r: 8\n"
    after, written = _write(tmp_path / "tunewright.yaml", text, **_all_linear(1e-3))
    assert list(written) == ["preset", "target_modules", "learning_rate"]
    assert after.endswith(
        "target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]\n  lora_r: 8\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing yet\n",
        "name: a",
        "name: a\ntrain:\n",
        "name: a\ntrain:",
        "train: null\n",
        "train: ~ # none\nname: a\n",
        "train: {}\n",
        "train: {epochs: 2, learning_rate: 3.0e-4}\nseed: 1\n",
        "{name: a, seed: 2}",
        "train:\r\n  # Windows\r\n  epochs: 2\r\n",
        "\ufeffname: a\n",
        "train:\n    learning_rate: '0.0002'\n    preset: \"classic\"\n",
        "train:\n  learning_rate: 0.0002 # last line, no end",
        write_config({}),
        write_config({"train": {"preset": "classic"}}),
    ],
)
def test_edit_handles_every_yaml_style(tmp_path: Path, text: str) -> None:
    after, _ = _write(tmp_path / "tunewright.yaml", text, **_all_linear(0.00042))
    kept = [line for line in text.replace("\r", "").split("\n") if line.startswith(("#", "  #", "    #"))]
    assert [line for line in after.replace("\r", "").split("\n") if line in kept] == kept
    assert ("\r\n" in text) == ("\r\n" in after)
    assert text.startswith("\ufeff") == after.startswith("\ufeff")


@pytest.mark.parametrize(
    "text",
    [
        "train:\n  learning_rate:  # why\n    0.0002\n",
        "train:\n  target_modules:\n  - q_proj  # why\n  - v_proj\n",
    ],
)
def test_edit_refuses_and_keeps_an_uneditable_value(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tunewright.yaml"
    path.write_text(text)
    wanted = load_config(path).train.model_copy(update=_all_linear(0.0013))
    with pytest.raises(UserError, match="cannot be changed in place; nothing was changed") as caught:
        write_section(path, wanted)
    assert "preset: all-linear" in (caught.value.fix or "")
    assert path.read_text() == text


@given(st.floats(min_value=1e-9, max_value=1.0))
def test_edit_round_trips_a_learning_rate(tmp_path_factory: pytest.TempPathFactory, rate: float) -> None:
    rounded = float(f"{rate:.2g}")
    _write(tmp_path_factory.mktemp("rate") / "tunewright.yaml", "train:\n  epochs: 1\n", learning_rate=rounded)


def test_edit_writes_every_key(tmp_path: Path) -> None:
    changed = TrainConfig(
        lora_r=4,
        lr_scheduler_type="linear",
        micro_batch_size=8,
        on_overlength="drop",
        dtype="float32",
        warmup_ratio=0.0,
    )
    path = tmp_path / "tunewright.yaml"
    path.write_text("name: a\n")
    write_section(path, changed)
    assert load_config(path).train == changed


@pytest.mark.parametrize("text", ["name: a\n", "data:  # ours\n  # why\n  val_size: 0.2\n", "data: {val_size: 0.2}\n"])
def test_edit_writes_the_data_section_and_keeps_the_others(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tunewright.yaml"
    path.write_text(f"{text}train:\n  epochs: 2\n")
    before = load_config(path)
    wanted = before.data.model_copy(update={"split_by": "output_template"})
    assert isinstance(wanted, DataConfig)
    assert write_section(path, wanted) == {"split_by": "output_template"}
    assert load_config(path) == before.model_copy(update={"data": wanted})
    assert all(line in path.read_text() for line in text.splitlines() if "{" not in line)
