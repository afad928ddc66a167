"""Loading a base, in 16 bits or with 4-bit linear layers, and its tokenizer; adding adapters to it.

Quantized weights (NF4 with double quantization, by bitsandbytes) are never stored. They are computed from the base's
own files at each load, always to the same bits, so the base's digest identifies them.

peft's ``prepare_model_for_kbit_training`` is not called: it converts embeddings, norms and the
output layer to float32 (for Llama 3.1 8B 4.2 GB instead of 2.1). Its other steps (freezing the
base, gradient checkpointing) are done by peft and the trainer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.config import Quantization
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.models import quiet_transformers
from tunewright.models.bases import Base
from tunewright.models.families import drop_towers, is_mxfp4, read_config, read_shape, require_quantizable

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel
    from transformers.utils.quantization_config import Mxfp4Config

TEKKEN = "tekken.json"
"""The tokenizer file of Mistral's own code."""
_TEKKEN_SIZE = 100_000
_TEKKEN_INST = 3


def device() -> str:
    """Return the device of models: this process's CUDA GPU, else the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def missing_kernels(card: int) -> str | None:
    """Return why this torch cannot compute on a GPU; None if it can.

    A binary of one architecture runs on later ones of the same major version; PTX is compiled for any later one.
    """
    import torch

    major, minor = torch.cuda.get_device_capability(card)
    codes = re.findall(r"\b(sm|compute)_(\d+)\b", " ".join(built := torch.cuda.get_arch_list()))
    for kind, number in codes:
        at = divmod(int(number), 10)
        if at <= (major, minor) and (kind == "compute" or at[0] == major):
            return None
    if not codes:  # a build that names none, such as ROCm's
        return None
    return (
        f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(card)}, of compute capability "
        f"{major}.{minor} (it has {' '.join(built)})"
    )


def require_kernels() -> None:
    """Check that this torch can compute on this process's GPU, if there is one."""
    import torch

    why = missing_kernels(torch.device(device()).index) if torch.cuda.is_available() else None
    if why is not None:
        raise UserError(
            why,
            fix="Install a torch that is built for an older CUDA, such as 12.6, or set CUDA_VISIBLE_DEVICES=-1 to use "
            "the CPU.",
        )


def load_model(
    base: Base, dtype: str, quantization: Quantization, place: str | None = None, *, shardable: bool = False
) -> PreTrainedModel:
    """Load the base's weights in ``dtype`` ("bfloat16" or "float32"), in eval mode, on ``place`` (None: `device()`).

    With ``quantization`` "nf4" the linear layers are quantized to 4 bits and compute in ``dtype``.
    Embeddings, norms and the output layer stay in ``dtype``. ``shardable``: FSDP can shard the
    4-bit weights. Parts that read images are dropped after loading.
    """
    import torch
    import transformers

    require_quantizable(quantization, read_shape(base.folder / "config.json"), base.architecture)
    require_kernels()
    with quiet_transformers():
        model: PreTrainedModel = getattr(transformers, base.architecture).from_pretrained(
            base.folder,
            dtype=getattr(torch, dtype),
            quantization_config=nf4_config(dtype, shardable=shardable)
            if quantization == "nf4"
            else dequantization(base.folder),
            device_map=place or device(),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        drop_towers(model)
        if quantization == "nf4":
            disable_repacking(model)
            # On the CPU embeddings and norms are still views of the mapped file, which would keep its 16-bit layers
            # in memory.
            for weight in model.parameters():
                if weight.is_floating_point() and weight.device.type == "cpu":
                    weight.data = weight.data.clone()
    model.own_cache = base.own_cache  # type: ignore[assignment]  # read where a batch is made: new_batch
    model.eval()
    return model


def dequantization(folder: Path) -> Mxfp4Config | None:
    """Return the setting that dequantizes a model's experts from MXFP4 on loading; None if they are not in it.

    Without it transformers computes in MXFP4 where it finds kernels, through which no gradient passes.
    """
    if not is_mxfp4(read_config(folder / "config.json")):
        return None
    from transformers.utils.quantization_config import Mxfp4Config

    return Mxfp4Config(dequantize=True)


def named(base: Base, quantization: Quantization) -> str:
    """Return the base's display name: as the config names it, and its quantization if it has one."""
    return f"{base.spec} in NF4" if quantization == "nf4" else base.spec


def load_tokenizer(base: Base) -> Any:
    """Load the base's tokenizer, with a padding token (the end-of-text token if it has none).

    Mistral's tekken.json takes precedence: tokenizer.json files next to it were published with
    another pre-tokenization rule, which gives other tokens.
    """
    tekken = base.folder / TEKKEN
    with quiet_transformers():
        try:
            tokenizer = _tekken_tokenizer(tekken) if tekken.exists() else _hub_tokenizer(base.folder)
        except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise UserError(f"The tokenizer cannot be read: {error}", where=str(base.folder)) from error
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-text token (eos_token)", where=str(base.folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _hub_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if len(tokenizer) > _TEKKEN_SIZE and tokenizer.convert_tokens_to_ids("[INST]") == _TEKKEN_INST:
        # transformers knows which releases wrote the wrong rule, and changes only these.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, fix_mistral_regex=True
        )
    return tokenizer


def _tekken_tokenizer(tekken: Path) -> Any:
    """Return Mistral's tokenizer, with the chat template of the same folder if there is one."""
    from tokenizers import processors
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    # Any text but None: with None transformers adds its own template if mistral-common is installed.
    tokenizer = convert_tekken_tokenizer(str(tekken), chat_template="")
    tokenizer.chat_template = _folder_template(tekken.parent)
    tokenizer.name_or_path = str(tekken.parent)
    # As Mistral's own encoder does, and its tokenizer.json files; the conversion leaves it out.
    begin = str(tokenizer.bos_token)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    return tokenizer


def _folder_template(folder: Path) -> Any:
    """Return the chat template in a folder's files, in transformers' order; None if there is none."""
    written = folder / "chat_template.jinja"
    if written.exists():
        return written.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if template:
                return template
    return None


def with_adapters(model: PreTrainedModel | PeftModel, folders: Mapping[str, Path]) -> PeftModel:
    """Add adapters (name to folder; at least one) to a base, alongside any that it has."""
    from peft import PeftModel

    with quiet_transformers():
        for name, folder in folders.items():
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    assert isinstance(model, PeftModel), "at least one adapter"
    return model.eval()


def text_settings(base: Base) -> Any:
    """Return the configuration of the base's text model, as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base.folder, local_files_only=True).get_text_config()


def context_length(base: Base) -> int:
    """Return the longest conversation, prompt and answer together, in tokens."""
    return int(text_settings(base).max_position_embeddings)


def end_token_ids(base: Base) -> frozenset[int]:
    """Return the tokens that end an answer by the base's generation settings, read without its weights."""
    from transformers import GenerationConfig

    path = base.folder / "generation_config.json"
    try:
        if path.exists():
            ends = GenerationConfig.from_pretrained(base.folder, local_files_only=True).eos_token_id
        else:
            ends = GenerationConfig.from_model_config(text_settings(base)).eos_token_id
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"The generation settings cannot be read: {error}", where=str(path)) from error
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(token, int) and token >= 0 for token in listed):
        raise UserError(f"eos_token_id must be a token id or a list of them (got {ends!r})", where=str(path))
    return frozenset(listed)


_OLDEST = (0, 50)
"""The first bitsandbytes that trains over NF4 on the CPU as on CUDA; as in pyproject.toml."""


def require_bitsandbytes(quantization: Quantization, key: str = "quantization") -> None:
    """Check that a base can be quantized in this way, before anything is loaded; ``key`` is the config's key for it."""
    if quantization == "none":
        return
    try:
        found = package_version("bitsandbytes")
    except PackageNotFoundError:
        found = None
    if found is None or tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        installed = "it is not" if found is None else f"{found} is"
        raise UserError(
            f"nf4 needs bitsandbytes {needed} or newer, and {installed} installed",
            where=key,
            fix=f"{install_command('4bit')}, or set {key} to none.",
        )


def nf4_config(dtype: str, *, shardable: bool = False) -> BitsAndBytesConfig:
    """Return NF4 with double quantization, blocks of 64 (Dettmers et al. 2023, section 3), computing in ``dtype``.

    With ``shardable`` the same bytes are stored as numbers of ``dtype``, because FSDP cannot shard integer weights.
    """
    require_bitsandbytes("nf4")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if shardable else "uint8",
    )


def disable_repacking(model: Any) -> None:
    """Make a freshly quantized model compute the same in training and in eval mode.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weights at its first pass in eval
    mode: their scales are rounded to bfloat16. No gradient passes through the layer until its state
    is next taken, which unpacks the weights to slightly different values. After evaluating dev, a
    run would continue with wrong or no gradients over another base.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [part for part in model.modules() if isinstance(part, Linear4bit)]
    assert layers, "nothing was quantized"
    for layer in layers:
        # Not a constructor argument; tests/models/test_quantized.py fails if the name changes.
        layer.support_avx512bf16_for_cpu = False


def release_openmp_threads() -> None:
    """Release the OpenMP workers of the calling thread; its next computation starts them again.

    OpenMP gives each computing thread its own workers, one for each further core, and keeps them. Once there are more
    workers than cores, all of them sleep between any two steps, some hundred times a pass. A model that another thread
    runs then takes twice as long (benchmarks/adapter_passes.py). So call this before handing a model to another thread.
    Without this OpenMP function nothing happens. Source: OpenMP 5.0, 3.2.44; libgomp, config/linux/wait.h.
    """
    from threadpoolctl import ThreadpoolController

    for library in ThreadpoolController().select(user_api="openmp").lib_controllers:
        pause = getattr(library.dynlib, "omp_pause_resource_all", None)
        if pause is not None:
            pause(1)  # omp_pause_soft, of omp.h
