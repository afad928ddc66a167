"""A test for each cell of the table in docs/how-to/models.md: each family at tiny size, with random weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from making.command_line import tiny_project
from making.command_line import tunewright as run
from making.tiny_bases import ARCHITECTURES, KINDS, Kind, build_base
from tunewright.adapters.lora_weights import load_lora_weights
from tunewright.config import TrainConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.engines.vllm.engine import VllmSettings
from tunewright.generation.lora_dispatch import LoraDispatch
from tunewright.models.bases import Base, resolve_base, tensor_files, untrained_tokens
from tunewright.models.families import (
    ATTENTION,
    MLP,
    TOWERS,
    check_architecture,
    load_config,
    module_name,
    read_shape,
    reads_images,
    resolve_targets,
    shape_of,
    text_name,
)
from tunewright.models.loading import load_model, with_adapters

NEW: tuple[Kind, ...] = ("mistral3", "mistral3-ministral3", "ministral3", "mixtral")
# Past the 64th position, where the tiny Ministral 3 stretches its positions and sharpens its attention.
IDS = torch.tensor([[n * 37 % 250 for n in range(100)]])


def _open(folder: Path) -> Base:
    return resolve_base(str(folder), None, folder.parent, LogReporter())


def _whole(base: Path) -> Any:
    """Load the model by its own class, including the vision tower."""
    (architecture,) = json.loads((base / "config.json").read_text())["architectures"]
    return getattr(transformers, architecture).from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(
    scope="module",
    params=["mistral3", "mixtral", *(pytest.param(kind, marks=pytest.mark.slow) for kind in NEW[1:3])],
)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each new family."""
    found: Kind = request.param
    return found


@pytest.fixture(scope="module")
def project(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project on a base of this family, with a trained adapter that has an effect."""
    folder = tmp_path_factory.mktemp(kind)
    base = build_base(folder / "base", kind)
    if reads_images(ARCHITECTURES[kind]):
        (base / "preprocessor_config.json").write_text('{"image_processor_type": "PixtralImageProcessor"}')
    project = tiny_project(folder / "project", base, count=80)
    config = project / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", "epochs: 1").replace("0.003", "0.01")
    text = text.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n")
    config.write_text(text)
    assert run("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    ran = run("train", "-p", project)
    assert ran.code == 0, ran.stderr
    return project


def _adapter(project: Path) -> Path:
    (folder,) = ProjectFolder(project).adapters.iterdir()
    return folder


@pytest.mark.parametrize("each", KINDS)
def test_load_model_computes_what_the_full_model_computes(each: Kind, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", each)
    model = load_model(_open(base), "float32", "none")
    assert not [name for name, _ in model.named_modules() if any(part in name for part in TOWERS)]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, _whole(base)(input_ids=IDS).logits)


@pytest.mark.parametrize("each", KINDS)
def test_text_name_maps_modules_and_tensors_of_a_family_to_equal_names(each: Kind, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", each)
    model = load_model(_open(base), "float32", "none")
    layers = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    texts = {str(text_name(name)): name for name in layers}
    assert all(name.startswith("model.layers.") for name in texts)
    assert [module_name(ARCHITECTURES[each], text) for text in texts] == layers
    in_files = {text_name(name) for name in tensor_files(base)}
    assert {f"{text}.weight" for text in texts} <= in_files
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= in_files


@pytest.mark.parametrize("each", NEW)
def test_untrained_tokens_are_found_in_the_text_models_embeddings(each: Kind, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = build_base(tmp_path / "base", each)
    weights = load_file(base / "model.safetensors")
    (name,) = (name for name in weights if text_name(name) == "model.embed_tokens.weight")
    weights[name][5] = 0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert untrained_tokens(_open(base), [4, 5, 6]) == [5]


@pytest.mark.parametrize("each", [kind for kind in KINDS if kind != "mixtral"])
def test_nf4_quantizes_only_linear_layers_of_the_text_model(each: Kind, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = load_model(_open(build_base(tmp_path / "base", each)), "float32", "nf4")
    held = {name for name, part in model.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)}
    assert held == {name for name, _ in model.named_modules() if name.rpartition(".")[2] in (*ATTENTION, *MLP)}
    with torch.inference_mode():
        assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("each", ["llama", "mistral"])
@pytest.mark.parametrize("biases", [False, True])
def test_shape_known_without_a_walk_is_that_of_the_model(each: Kind, biases: bool, tmp_path: Path) -> None:
    file = build_base(tmp_path / "base", each) / "config.json"
    # A Mistral ignores these keys.
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_bias": biases, "mlp_bias": biases}))
    architecture = check_architecture(file)
    known, walked = read_shape(file), shape_of(load_config(file, architecture), architecture)
    assert known.walk is None and walked.walk is not None
    assert (known.linears, known.others) == (walked.linears, walked.others)


def test_mixture_of_experts_is_refused_nf4_and_named_feed_forward_targets(tmp_path: Path) -> None:
    base = _open(build_base(tmp_path / "base", "mixtral"))
    with pytest.raises(UserError, match="MixtralForCausalLM cannot be quantized to NF4"):
        load_model(base, "float32", "nf4")
    shape = read_shape(base.folder / "config.json")
    assert resolve_targets(TrainConfig(preset="all-linear"), shape, base.architecture).target_modules == ATTENTION
    with pytest.raises(UserError, match="MixtralForCausalLM has no linear layer up_proj") as caught:
        resolve_targets(TrainConfig(target_modules=("q_proj", "up_proj")), shape, base.architecture)
    assert caught.value.where == "train.target_modules"
    assert "[q_proj, k_proj, v_proj, o_proj, experts], or to a subset" in str(caught.value.fix)


def test_plan_includes_nf4_only_for_families_that_support_it(project: Path, kind: Kind) -> None:
    plan = run("estimate-memory", "--gpu", "24GB", "-p", project, "--json").document
    weights = load_model(_open(project.parent / "base"), "float32", "none")
    assert plan["parameters"] == sum(weight.numel() for weight in weights.parameters())
    assert {way["name"].split()[0] for way in plan["ways"]} == ({"LoRA"} if kind == "mixtral" else {"LoRA", "QLoRA"})


def test_adapter_computes_the_same_in_peft_on_the_original_class(project: Path, kind: Kind) -> None:
    from peft import PeftModel

    adapter, base = _adapter(project), _open(project.parent / "base")
    whole: Any = PeftModel.from_pretrained(_whole(base.folder), adapter).eval()
    adapted = {name for name, part in whole.base_model.model.named_modules() if hasattr(part, "lora_A")}
    wanted = {module_name(base.architecture, f"model.layers.{n}.self_attn.{t}") for n in range(2) for t in ATTENTION}
    if kind != "mixtral":
        wanted |= {module_name(base.architecture, f"model.layers.{n}.mlp.{t}") for n in range(2) for t in MLP}
    assert adapted == wanted
    with safe_open(adapter / "adapter_model.safetensors", "pt") as weights:
        assert {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in weights.keys()} == wanted  # noqa: SIM118
    here = load_model(base, "float32", "none")
    assert set(load_lora_weights(adapter, here)) == wanted
    ours = PeftModel.from_pretrained(here, adapter).eval()
    with torch.inference_mode():
        found = ours(input_ids=IDS).logits
        torch.testing.assert_close(found, whole(input_ids=IDS).logits)
        with ours.disable_adapter():
            assert not torch.allclose(found, ours(input_ids=IDS).logits, atol=1e-3)


def test_mixed_batch_of_base_and_adapter_answers_each_as_alone(project: Path) -> None:
    """The peft engine serves tenants so: their weights are added to the base's layers, rows mixed."""
    base = _open(project.parent / "base")
    model = load_model(base, "float32", "none")
    adapters = LoraDispatch(model, mixed=True)
    adapters.add("tuned", load_lora_weights(_adapter(project), model))
    alone: Any = with_adapters(load_model(base, "float32", "none"), {"tuned": _adapter(project)})
    with torch.inference_mode():
        with adapters.use_adapters(["tuned", None]):
            mixed = model(input_ids=torch.cat([IDS, IDS])).logits
        torch.testing.assert_close(mixed[0], alone(input_ids=IDS).logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mixed[1], model(input_ids=IDS).logits[0], atol=1e-4, rtol=1e-4)


def test_import_accepts_the_module_names_of_each_family(project: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in ("tunewright.yaml", "dataset"):
        (tmp_path / "other" / name).symlink_to(project / name)
    stranger = shutil.copytree(_adapter(project), tmp_path / "stranger")
    for path in stranger.iterdir():
        if path.name not in ("adapter_config.json", "adapter_model.safetensors"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    ran = run("adapters", "import", stranger, "--base-matches", "-p", tmp_path / "other", "--json")
    assert ran.code == 0, ran.stdout
    model_config = json.loads((stranger / "adapter_config.json").read_text())
    (stranger / "adapter_config.json").write_text(json.dumps(model_config | {"exclude_modules": ".*(a+)+b"}))
    ran = run("adapters", "import", stranger, "--base-matches", "-p", tmp_path / "other", "--json")
    assert ran.code == 2
    assert "exclude_modules" in ran.document["error"]["where"]


def test_vllm_finds_each_layer_of_an_adapter(project: Path, kind: Kind) -> None:
    """By the prefixes that vLLM's source maps (mistral3.py, hf_to_vllm_mapper); vLLM is not run on these families."""
    mapping = {"model.language_model.": "language_model.model.", "model.": "model."}
    with safe_open(_adapter(project) / "adapter_model.safetensors", "pt") as weights:
        names = [name.removeprefix("base_model.model.") for name in weights.keys()]  # noqa: SIM118
    prefix = "language_model.model.layers." if kind.startswith("mistral3") else "model.layers."
    for name in names:
        start = next(start for start in mapping if name.startswith(start))
        assert (mapping[start] + name.removeprefix(start)).startswith(prefix)


@pytest.mark.parametrize("vision", [False, True])
def test_vllm_starts_without_images_for_a_vision_base(vision: bool, tmp_path: Path) -> None:
    settings = VllmSettings(tmp_path, False, tmp_path, "bfloat16", 1, 16, 4, vision=vision)
    options = settings.options()
    assert ("--limit-mm-per-prompt" in options) == vision
    if vision:
        assert json.loads(options[options.index("--limit-mm-per-prompt") + 1]) == {"image": 0}


@pytest.mark.slow
def test_trained_adapter_is_evaluated(project: Path) -> None:
    ran = run("evaluate", "-p", project, "--json")
    assert ran.code in (0, 3, 4), ran.stderr


@pytest.fixture(scope="module")
def merged(project: Path) -> Iterator[Path]:
    """Return the adapter merged into its base."""
    ran = run("export", "merge", "-p", project, "--json")
    assert ran.code == 0, ran.stderr
    folder = Path(ran.document["folder"])
    yield folder
    shutil.rmtree(folder)


def test_merged_model_loads_with_the_original_class(merged: Path, project: Path, kind: Kind) -> None:
    from peft import PeftModel

    base = project.parent / "base"
    tuned = PeftModel.from_pretrained(_whole(base), _adapter(project)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(
            _whole(merged)(input_ids=IDS).logits, tuned(input_ids=IDS).logits, atol=1e-4, rtol=1e-4
        )
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {str(text_name(name)) for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {*ATTENTION, *(() if kind == "mixtral" else MLP)}
    assert (merged / "preprocessor_config.json").exists() == reads_images(ARCHITECTURES[kind])


@pytest.mark.slow
def test_merge_over_nf4_leaves_the_vision_tower_unchanged(tmp_path: Path) -> None:
    """One of the two merge methods quantizes the decoder's layers; the tower has layers of the same names."""
    pytest.importorskip("bitsandbytes")
    base = build_base(tmp_path / "base", "mistral3")
    project = tiny_project(tmp_path / "project", base, count=80)
    config = project / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", "epochs: 1\n  quantization: nf4").replace("0.003", "0.01")
    config.write_text(text.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n"))
    for command in (["data", "add", project / "pairs.jsonl"], ["train"], ["export", "merge", "--json"]):
        ran = run(*command, "-p", project)
        assert ran.code == 0, ran.stderr
    assert {way["way"] for way in ran.document["ways"]} == {"original", "dequantized"}
    before = load_file(base / "model.safetensors")
    after = load_file(Path(ran.document["folder"]) / "model.safetensors")
    for name, weight in before.items():
        changed = not torch.equal(weight, after[name])
        text_of = text_name(name)
        assert changed == (text_of is not None and text_of.split(".")[-2] in (*ATTENTION, *MLP)), name


def test_gguf_is_exported_or_refused_by_name(project: Path, kind: Kind) -> None:
    pytest.importorskip("xllamacpp")
    ran = run("export", "gguf", "--merged", "-p", project, "--json")
    if kind == "mistral3":
        assert ran.code == 0, ran.stderr
        assert ran.document["good"]
        return
    assert ran.code == 2
    assert "is not exported to GGUF" in ran.document["error"]["what"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"auto_map": {"AutoModel": "modeling.Own"}}, "custom code"),
        ({"text_config": None}, "text_config"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),  # of another architecture than gpt-oss
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ],
)
def test_unsupported_base_is_refused_with_a_fix(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = build_base(tmp_path / "base", "mistral3-ministral3") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError, match=named) as caught:
        check_architecture(path)
    assert caught.value.where == str(path)
    assert named != "fp8" or "-BF16" in str(caught.value.fix)


def test_models_page_names_only_existing_files() -> None:
    root = Path(__file__).parents[2]
    named = set(
        re.findall(r"`(tests/[\w/]+\.py)`", (root / "docs" / "how-to" / "models.md").read_text(encoding="utf-8"))
    )
    assert len(named) >= 3
    assert [file for file in named if not (root / file).is_file()] == []
