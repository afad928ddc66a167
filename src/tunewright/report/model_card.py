"""The model card of a published adapter: what it was trained on, what was measured, and what was decided.

The card has counts and digests of rows, never their text. Its metadata are the Hugging Face hub's own:
https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tunewright.evidence.benchmarks import benchmarks_section
from tunewright.evidence.blocks import arms_section, contrasts_section, metric_order
from tunewright.evidence.schema import Arm, Evidence
from tunewright.evidence.verdict import verdict
from tunewright.gate.results import Figures
from tunewright.metrics import metric_label
from tunewright.render.markdown import bullets, markdown, plain, table

_RECIPE = (
    "target_modules",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "epochs",
    "batch_size",
    "max_length",
    "dtype",
    "quantization",
)
_HUB_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
_SHOWN_DIGEST = 12


@dataclass(frozen=True)
class CardSubject:
    """The published model."""

    name: str
    lineage: Mapping[str, Any]
    repository: str | None
    """The hub id that the card is for; None means unknown."""
    base_model: str | None
    """The base's hub id; None for a base that is only known as a folder."""
    license: str | None
    has_system_prompt: bool
    """True if the chat template adds the trained system prompt."""
    figures: Figures | None = None
    """For a merged model, its comparison with the trained model; None for an adapter."""

    @property
    def merged(self) -> bool:
        """True for a merged model, false for an adapter in PEFT's form."""
        return self.figures is not None


def model_card(subject: CardSubject, evidence: Evidence | None) -> str:
    """Return the card: the hub's metadata in YAML, then Markdown."""
    blocks = [
        f"# {plain(subject.name)}",
        _summary(subject),
        *_verdict(subject, evidence),
        *(_results(evidence) if evidence else ()),
        *_data(subject.lineage),
        *_recipe(subject.lineage),
        *_limits(subject, evidence),
        *_loading(subject),
        *_digests(subject, evidence),
    ]
    return f"---\n{_metadata(subject, evidence).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, blocks)) + "\n"


def _metadata(subject: CardSubject, evidence: Evidence | None) -> ModelCardData:
    base = subject.base_model
    relation = "finetune" if subject.merged else "adapter"
    sources = subject.lineage.get("config", {}).get("data", {}).get("sources", [])
    paths = (source["path"] if isinstance(source, dict) else str(source) for source in sources)
    datasets = sorted({found[1] for path in paths if (found := _HUB_DATASET.match(path))})
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name="transformers" if subject.merged else "peft",
        pipeline_tag="text-generation",
        license=subject.license,
        datasets=datasets or None,
        tags=["tunewright", "lora", *([f"base_model:{relation}:{base}"] if base else [])],
        model_name=subject.name if evidence else None,
        eval_results=_eval_results(evidence) if evidence else None,
    )


def _eval_results(evidence: Evidence) -> list[EvalResult]:
    """Return the tuned arm's scores, in percent, in the hub's form; the interval is in ``args``."""
    results = []
    for metric in metric_order(evidence):
        score = _tuned(evidence).score(metric)
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=re.sub(r"[^\w.-]+", "-", evidence.project),
                dataset_name=f"{evidence.project} (held out)",
                dataset_split=evidence.split,
                dataset_revision=str(evidence.lineage["dataset"]),
                metric_type=metric,
                metric_name=metric_label(metric),
                metric_value=round(100 * score.value, 2),
                metric_args={
                    "unit": "percent",
                    "interval_95": [round(100 * limit, 2) for limit in (score.interval.low, score.interval.high)],
                    "interval_method": score.method,
                    "items": score.scored,
                    "evidence": evidence.id,
                },
            )
        )
    return results


def _tuned(evidence: Evidence) -> Arm:
    return evidence.arm(evidence.contrasts[0].treatment)


def _summary(subject: CardSubject) -> str:
    base = f"[{subject.base_model}](https://huggingface.co/{subject.base_model})" if subject.base_model else "its base"
    version = subject.lineage.get("packages", {}).get("tunewright")
    made = f" It was trained with tunewright {plain(str(version))}." if version else ""
    return (f"A LoRA adapter merged into {base}." if subject.merged else f"A LoRA adapter for {base}.") + made


def _verdict(subject: CardSubject, evidence: Evidence | None) -> tuple[str, ...]:
    if evidence is None:
        return (
            "## Verdict: no evidence",
            f"This adapter has not been evaluated on held-out rows. `tunewright evaluate {subject.name}` measures it "
            "against prompting of the same base.",
        )
    found = verdict(evidence)
    measured, *reasons = found.reasons
    return (f"## Verdict: {found.headline}", plain(measured), bullets([plain(reason) for reason in reasons]))


def _results(evidence: Evidence) -> tuple[str, ...]:
    # Incumbents stay out: a card is public, and other vendors' prices are the project's own business.
    found = [arms_section(evidence), contrasts_section(evidence)]
    if evidence.regressions is not None:
        found.append(benchmarks_section(evidence.regressions))
    return (
        "## Results",
        f"The base was prompted in several ways; `{plain(_tuned(evidence).name)}` is the adapter.",
        *markdown(*found),
    )


def _data(lineage: Mapping[str, Any]) -> tuple[str, ...]:
    dataset = lineage.get("dataset") or {}
    if not dataset.get("splits"):
        return ("## Data", "The training data are unknown: the adapter was imported without a record of them.")
    rows = [
        [plain(name), f"{split['examples']:,}", f"`{split['digest'][:_SHOWN_DIGEST]}`"]
        for name, split in dataset["splits"].items()
    ]
    mixed = "Rows of other data were mixed in against forgetting." if dataset.get("mix") else ""
    return (
        "## Data",
        f"Dataset version `{dataset['digest'][:_SHOWN_DIGEST]}`; no rows are published. Near-duplicates are in one "
        f"split only. {mixed}".strip(),
        table(("Split", "Rows", "Digest"), rows),
    )


def _recipe(lineage: Mapping[str, Any]) -> tuple[str, ...]:
    config = lineage.get("config") or {}
    train = config.get("train", {})
    tuning = [key for key in ("from", "method", "beta") if train.get(key) not in (None, "sft")]
    values = {key: train[key] for key in (*tuning, *_RECIPE) if key in train}
    texts = {key: ", ".join(map(str, each)) if isinstance(each, list) else str(each) for key, each in values.items()}
    rows = [[f"`{key}`", plain(text)] for key, text in texts.items()]
    if "seed" in lineage:
        rows.append(["`seed`", plain(str(lineage["seed"]))])
    packages = ", ".join(f"{name} {version}" for name, version in sorted(lineage.get("packages", {}).items()))
    return ("## Recipe", table(("Setting", "Value"), rows), plain(f"Packages: {packages}.") if packages else "")


def _limits(subject: CardSubject, evidence: Evidence | None) -> tuple[str, ...]:
    lines = [
        "Measured on rows like those of training only: other tasks, languages and prompts were not measured."
        if evidence
        else "Nothing was measured.",
        "Limits and licence of the base apply.",
    ]
    if evidence and not evidence.regressions:
        lines.append("Forgetting of general abilities was not measured.")
    if evidence and _tuned(evidence).truncated:
        lines.append(f"{_tuned(evidence).truncated:,} answers were cut at the token limit.")
    if subject.license is None:
        lines.append("No licence has been stated for this model.")
    if subject.base_model is None:
        lines.append("The base has no stated hub id; only the base with the digest below gives these results.")
    if subject.figures:
        kl, same = subject.figures.kl, subject.figures.greedy
        lines.append(
            f"Merging rounds weights: mean KL from the trained model {kl:.2g} nats, {100 * same:.1f}% of the greedy "
            "answers are the same."
        )
    return ("## Limits", bullets([plain(line) for line in lines]))


def _loading(subject: CardSubject) -> tuple[str, ...]:
    here, base = subject.repository or "FOLDER", subject.base_model or "BASE"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    model = f'model = AutoModelForCausalLM.from_pretrained("{here}")'
    if not subject.merged:
        imports = f"from peft import PeftModel\n{imports}"
        model = f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        model += f'model = PeftModel.from_pretrained(base, "{here}")'
    code = f"""{imports}

{model}
tokenizer = AutoTokenizer.from_pretrained("{here}")  # with the chat template of training
messages = [{{"role": "user", "content": "…"}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**prompt, max_new_tokens=256, do_sample=False)"""
    system = "The chat template adds the trained system prompt to conversations without a system message."
    return ("## Use", f"```python\n{code}\n```", system if subject.has_system_prompt else "")


def _digests(subject: CardSubject, evidence: Evidence | None) -> tuple[str, ...]:
    base = subject.lineage.get("base") or {}
    rows = [["Adapter", f"`{subject.lineage['digest']}`"], ["Created", plain(str(subject.lineage["created"]))]]
    if "digest" in base:
        rows.append(["Base", f"`{base['digest']}`"])
    if base.get("commit"):
        rows.append(["Base commit", f"`{base['commit']}`"])
    if evidence:
        rows.append(["Evidence", f"`{evidence.id}`"])
    return ("## Digests", table(("", ""), rows))
