"""The config file: what it refuses, and where; what `init` writes, and values that are written back into it."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tunewright.config import PRESETS, Config, DataConfig, TrainConfig, metric_name
from tunewright.config.io import load_config, write_config, write_section
from tunewright.core.errors import UserError


def _load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "tunewright.yaml"
    path.write_text(text)
    return load_config(path)


def test_defaults_are_the_fields_config() -> None:
    train = Config().train
    assert (train.lora_r, train.lora_alpha, train.target_modules) == (16, 32, ("q_proj", "v_proj"))
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_ratio, train.epochs) == (2e-4, "cosine", 0.1, 3)
    assert train.dtype == "bfloat16"


def test_preset_fills_only_unset_keys() -> None:
    train = TrainConfig.model_validate({"preset": "all-linear", "epochs": 2})
    assert len(train.target_modules) == 7
    assert train.epochs == 2


def test_on_and_off_are_accepted_as_choices(tmp_path: Path) -> None:
    train = _load(tmp_path, "train:\n  prefix_sharing: off\n").train
    assert train.prefix_sharing == "off"
    assert _load(tmp_path, "train:\n  prefix_sharing: on\n").train.prefix_sharing == "on"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: a\ntrian:\n  lora_r: 4\n", 2, "did you mean train?"),
        ("train:\n  epochs: 2\n  lerning_rate: 1\n", 3, "did you mean train.learning_rate?"),
        ("train:\n  epochs: 2\n  lora_r: sixteen\n", 3, "train.lora_r: input should be a valid integer"),
        ("evaluate:\n  num_fewshot: [1, 0]\n", 2, "evaluate.num_fewshot.1"),
        ("train:\n  preset: best\n", 2, "'classic' or 'all-linear'"),
        ("seed: 1\nname: a\nseed: 2\n", 3, "Duplicate key seed"),
        ("a: [", 1, "Not valid YAML"),
        ("name: a\ntrain:\n\tepochs: 2\n", 3, "\\t"),
        ("evaluate:\n  metric: exactmatch\n", 2, "did you mean exact_match?"),
        ("evaluate: {extra_metrics: [chrf, rogue_l]}\n", 1, "did you mean rouge_l?"),
        ("data:\n  duplicates: Dropped\n", 2, "did you mean drop?"),
        ("data:\n  allow: [emails]\n", 2, "did you mean email?"),
        *(
            (f"train:\n  gradient_checkpointing: {value}\n", 2, "must be auto, all, none or a number of layers, got")
            for value in ("-1", "sometimes", "true", "1.5", "null", "[1]")
        ),
        ("train:\n  use_liger_kernel: 'on'\n", 2, "must be auto, true or false, got"),
        ("train:\n  epochs: 2020-13-45\n", 2, "Invalid value: month must be in 1..12"),
        ("seed: 1\nname: !!timestamp a\n", 2, "Invalid value: not a valid date"),
        ("seed: 1\nname: !!bool a\n", 2, "Invalid value: not a valid bool"),
        ("seed: 1\nname: !!float ''\n", 2, "Invalid value: not a valid float"),
        ("- a\n", 1, "a mapping"),
        ("? [a, b]\n: 1\n", 1, "A key must be a word"),
        ("train:\n  batch_size: 5\n  micro_batch_size: 2\n", 1, "not a multiple"),
        ("data:\n  val_size: .nan\n", 2, "data.val_size"),
    ],
)
def test_config_error_names_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        _load(tmp_path, text)
    assert caught.value.where == f"{tmp_path / 'tunewright.yaml'}:{line}"
    assert words in caught.value.what


@pytest.mark.parametrize("text", ['name: "\\UFFFFFFFF"', f"%YAML 1.{'9' * 5000}\n---\nname: a"])
def test_config_that_pyyaml_cannot_read_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="Not valid YAML") as caught:
        _load(tmp_path, text)
    assert caught.value.where == str(tmp_path / "tunewright.yaml")


def _laughs(depth: int) -> str:
    levels = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, depth)]
    return "\n".join(["a0: &a0 [x, x]", *levels])


def test_tab_is_to_be_replaced_by_spaces(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _load(tmp_path, "train:\n\tepochs: 2\n")
    assert caught.value.fix is not None
    assert "spaces" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (_laughs(10), 2, r"Aliases are not supported: \*a0"),
        ("a: &a {b: *a}\n", 1, r"Aliases are not supported: \*a"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", 3, "Aliases are not supported"),
        ("name: a\na: " + "[" * 50_000, 2, r"nested too deep \(limit 32\)"),
        ("{a: " * 50_000, 1, "nested too deep"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(100)), 33, "nested too deep"),
        ("name: a\nseed: " + "9" * 401, 2, r"A number of 401 characters \(limit 400\)"),
        ("name: a\nseed: 1" + ":1" * 20_000, 2, "A number of 40,001 characters"),
        ("seed: " + ("1_" * 300) + "1.5", 1, "A number of"),
    ],
)
def test_config_that_grows_without_bound_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, words: str
) -> None:
    built: list[object] = []
    monkeypatch.setattr(yaml, "load", lambda *_, **__: built.append(1))
    with pytest.raises(UserError, match=words) as caught:
        _load(tmp_path, text)
    assert caught.value.where == f"{tmp_path / 'tunewright.yaml'}:{line}"
    assert not built


def test_config_of_more_than_a_mebibyte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="larger than 1,048,576 bytes"):
        _load(tmp_path, "#" + "x" * 2**20)


def test_config_reports_all_errors_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 errors") as caught:
        _load(tmp_path, "train:\n  lora_r: 0\n  epochs: 0\n")
    assert ":2: train.lora_r" in caught.value.what
    assert ":3: train.epochs" in caught.value.what


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"name: \xe9"])
def test_config_refuses_a_file_that_is_not_utf8(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tunewright.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="UTF-8"):
        load_config(path)


def test_empty_section_means_the_defaults(tmp_path: Path) -> None:
    assert _load(tmp_path, "train:\n  # lora_r: 8\n") == Config()


def test_written_config_reads_back_as_the_defaults(tmp_path: Path) -> None:
    assert _load(tmp_path, write_config({})) == Config()


@given(st.text(max_size=200))
def test_any_text_is_a_config_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("config") / "tunewright.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_config(path)
    except UserError as error:
        assert error.where


@pytest.mark.parametrize(
    "value", ["2024-13-45", "2024-02-30", "0", "1721952000", "yesterday", "2024-07-26T10:00:00", "true"]
)
def test_invalid_date_is_reported_with_its_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "tunewright.yaml"
    path.write_text(f"name: x\nchat:\n  date: {value}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert caught.value.where == f"{path}:3"
    path.write_text('name: x\nchat:\n  date: "2024-02-29"\n')
    assert load_config(path).chat.date.isoformat() == "2024-02-29"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("bleu", "bleu"),
        ("{exact_match: {ignore_case: true}}", "exact_match ignore_case"),
        ("{choices: [granted, 'no']}", "choices"),
        ("json", "json"),
        ("{json: {fields: [name, date]}}", "json name,date"),
        ("{regex: '[A-Z]+'}", "regex [A-Z]+"),
        ("{python: 'scoring.court:citation'}", "python scoring.court:citation"),
    ],
)
def test_metric_round_trips_as_name_or_mapping(tmp_path: Path, written: str, name: str) -> None:
    config = _load(tmp_path, f"evaluate:\n  metric: {written}\n  extra_metrics: [chrf]\n")
    assert [metric_name(m) for m in config.evaluate.metrics] == [name, "chrf"]
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert config.model_dump(mode="json", exclude_unset=True)["evaluate"]["metric"] == yaml.safe_load(written)


@pytest.mark.parametrize(
    ("written", "what"),
    [
        ("exct_match", "a metric is one of exact_match"),
        ("{choises: [a, b]}", "a metric is one of exact_match"),
        ("rouge", "did you mean rouge_l?"),
        ("{choices: [yes, no]}", "quote values that YAML reads otherwise"),
        ("{choices: [a, ' a']}", "choices must be distinct"),
        ("{regex: '('}", "evaluate.metric.regex: not a regular expression"),
        ("{json: {fieldz: [a]}}", "unknown key evaluate.metric.json.fieldz: did you mean evaluate.metric.json.fields?"),
        ("{python: scoring}", "evaluate.metric.python"),
    ],
)
def test_invalid_metric_is_reported_with_its_key(tmp_path: Path, written: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        _load(tmp_path, f"evaluate:\n  metric: {written}\n")
    assert what in caught.value.what
    assert str(caught.value.where).endswith(":2")


def test_repeated_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.extra_metrics: bleu is already measured"):
        _load(tmp_path, "evaluate:\n  metric: bleu\n  extra_metrics: [chrf, bleu]\n")


@pytest.mark.parametrize(
    "address",
    [
        "gpu-1:8100",
        "http://",
        "ftp://gpu-1",
        "http://gpu-1:8100/v1",
        "http://gpu-1?a=b",
        "http://gpu-1:81O0",
        "http://a..b",
    ],
)
def test_engine_without_an_address_is_refused(address: str, tmp_path: Path) -> None:
    file = tmp_path / "tunewright.yaml"
    file.write_text(f"serve:\n  engines: ['{address}']\n")
    with pytest.raises(UserError) as raised:
        load_config(file)
    assert "serve.engines" in raised.value.what


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
