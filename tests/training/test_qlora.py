"""QLoRA: an adapter trained over an NF4 base, from the config to the evidence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import tunewright
from making.training_runs import Heard, new_config, plain_dev_loss, training_project
from tunewright.adapters.registry import WEIGHTS, Adapter
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.models.loading import load_model, with_adapters
from tunewright.serving.options import ServeOptions

IDS = torch.arange(3, 43)[None]


def _nf4_project(folder: Path, base: Path, reporter: LogReporter | None = None) -> Project:
    return training_project(folder, base, reporter, {"quantization": "nf4"})


def _set(folder: Path, before: str, after: str) -> Project:
    config = folder / "tunewright.yaml"
    text = config.read_text()
    assert before in text
    config.write_text(text.replace(before, after))
    return tunewright.open(folder, Heard())


def _warned(opened: Project) -> list[str]:
    assert isinstance(opened.reporter, Heard)
    return opened.reporter.warned


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """Return a project with an adapter trained over NF4."""
    folder = tmp_path_factory.mktemp("qlora") / "project"
    _nf4_project(folder, tiny_base_folder).train()
    return folder


@pytest.fixture(scope="module")
def adapter(project: Path) -> Adapter:
    result = tunewright.open(project).train()
    assert not result.trained
    return result.adapter


def test_qlora_loss_falls_and_lineage_records_quantization(adapter: Adapter) -> None:
    losses = [row["loss"] for row in adapter.history if "loss" in row]
    dev = [row["eval_loss"] for row in adapter.history if "eval_loss" in row]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.5
    assert dev[1] < dev[0]
    assert adapter.lineage["config"]["train"]["quantization"] == "nf4"
    assert adapter.lineage["packages"]["bitsandbytes"].startswith("0.")


def test_dev_loss_equals_that_of_the_adapter_on_an_nf4_base(
    project: Path, adapter: Adapter, tiny_base_folder: Path
) -> None:
    """Row by row, with transformers' own attention and loss, as evaluation measures it later."""
    opened = tunewright.open(project)
    reported = adapter.lineage["training"]
    kept = next(epoch for epoch in reported["epochs"] if epoch["step"] == reported["kept_step"])
    for quantization, equal in (("nf4", True), ("none", False)):
        model = with_adapters(load_model(opened.base, "float32", quantization), {"tuned": adapter.folder})  # type: ignore[arg-type]
        loss = plain_dev_loss(model, opened)
        assert (abs(loss - kept["dev_loss"]) < 1e-5 * kept["dev_loss"]) is equal


def test_peft_loads_the_adapter_on_an_nf4_base_and_on_a_16_bit_base(adapter: Adapter, tiny_base_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    logits: list[torch.Tensor] = []
    for model_config in (nf4, None):
        base = AutoModelForCausalLM.from_pretrained(
            tiny_base_folder, dtype=torch.bfloat16, device_map="cpu", quantization_config=model_config
        )
        with torch.no_grad():
            plain = base(input_ids=IDS).logits.float()
            tuned = PeftModel.from_pretrained(base, adapter.folder)(input_ids=IDS).logits.float()
        assert (tuned - plain).abs().max() > 0.1
        logits.append(tuned)
    # Weights in 4 bits are some percent off: the same adapter, near but other answers.
    assert 0.001 < float((logits[0] - logits[1]).norm() / logits[1].norm()) < 0.5


@pytest.mark.slow
def test_trained_weights_stay_float32(tiny_base_folder: Path, tmp_path: Path) -> None:
    """trl rounds those over a quantized base to bfloat16, where small steps would change nothing."""
    opened = _nf4_project(tmp_path / "project", tiny_base_folder)
    new_config(opened.folder.root, {}, dtype="bfloat16", epochs=1)
    trained = tunewright.open(opened.folder.root).train().adapter
    assert trained.lineage["training"]["kept_step"]
    weights = load_file(trained.folder / WEIGHTS)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for name, weight in weights.items():
        assert not torch.equal(weight, weight.bfloat16().float()), name


@pytest.mark.slow
def test_qlora_run_resumes_to_the_same_adapter(adapter: Adapter, tmp_path: Path, tiny_base_folder: Path) -> None:
    """The stop is in the second epoch, after an evaluation."""
    folder = tmp_path / "project"
    with pytest.raises(KeyboardInterrupt):
        _nf4_project(folder, tiny_base_folder, Heard(17)).train()
    assert _nf4_project(folder, tiny_base_folder).train().adapter.digest == adapter.digest


@pytest.mark.slow
def test_evaluation_quantizes_the_base_as_training_did(project: Path, adapter: Adapter) -> None:
    as_trained = tunewright.open(project).evaluate().evidence
    assert as_trained.lineage["decoding"]["quantization"] == "nf4"
    assert "bitsandbytes" in as_trained.lineage["packages"]
    # Also where the config has changed since, which is said.
    opened = _set(project, "quantization: nf4", "quantization: none")
    assert opened.evaluate(adapter.name).evidence == as_trained
    assert any("train section has changed" in warning for warning in _warned(opened))
    # On a base that is held whole, as vLLM may serve it, only if that is asked for.
    opened = _set(project, "quantization: none", "quantization: nf4")
    opened = _set(project, "evaluate:\n", "evaluate:\n  quantization: none\n")
    whole = opened.evaluate(adapter.name).evidence
    assert whole.id != as_trained.id
    assert whole.lineage["decoding"]["quantization"] == "none"
    journals = list((project / ".tunewright" / "generations").glob("*.jsonl"))
    assert len(journals) == 4, "the base's answers and the adapter's, each on two bases"
    _set(project, "evaluate:\n  quantization: none\n", "evaluate:\n")


@pytest.mark.slow
def test_nf4_and_unquantized_adapters_differ_and_are_not_served_together(project: Path, adapter: Adapter) -> None:
    opened = _set(project, "quantization: nf4", "quantization: none")
    other = opened.train().adapter
    assert other.digest != adapter.digest
    with pytest.raises(UserError, match=f"{adapter.name} with train.quantization nf4, {other.name} with"):
        opened.serve([adapter.name, other.name])
    with opened.serve(options=ServeOptions(port=0)).running():
        assert f"{adapter.name} is not served: it was trained with train.quantization nf4" in _warned(opened)[-1]
    service = opened.serve([adapter.name], ServeOptions(port=0))
    assert service.models[1:] == [adapter.name]
    with service.running():
        pass
    opened = _set(project, "evaluate:\n", "serve:\n  quantization: nf4\nevaluate:\n")
    service = opened.serve(options=ServeOptions(port=0))
    assert sorted(service.models[1:]) == sorted([adapter.name, other.name])
    with service.running():
        pass
