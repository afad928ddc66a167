"""GGUF files of an adapter, alone or merged into its base, each run by llama.cpp."""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import torch

from tunewright.chat.templates import Template
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.io import digest, write_text, writing
from tunewright.core.processes import ENOUGH_MEMORY, KILLED, PIPE, Process, end, start
from tunewright.core.progress import Reporter
from tunewright.data.examples import Message
from tunewright.export.artifact import BuiltArtifact, ExportSource
from tunewright.export.gguf.model import add_tokenizer, write_lora, write_model
from tunewright.export.gguf.tensors import PRECISIONS, FileType
from tunewright.export.merge import ArtifactOutputs, TrainedModel, choose_merge_method, measure_trained
from tunewright.export.templates import TEMPLATE_FILE, equivalent_conversations, exported_template
from tunewright.export.weights import Weights, read_deltas, trained_dtype
from tunewright.gate.answers import TopTokens, cut, ended
from tunewright.gate.results import Figures
from tunewright.open_project import OpenProject

TOP_TOKENS = 1000
"""Likeliest tokens requested from llama.cpp at each place; a whole vocabulary would be 5 MB of JSON each time."""

_ROOM = 64
"""Tokens of context beyond the longest prompt and answer."""
_ANSWER_S = 600.0
_LOG_LINES = 3


class EngineFailedError(Exception):
    """llama.cpp rejected the file, or exited."""


def _without_answer(how: str) -> UserError:
    """Return the error for a llama.cpp that ends or hangs without a message about the file."""
    return UserError(f"llama.cpp {how}", fix=ENOUGH_MEMORY)


def require_llamacpp() -> None:
    """Check that llama.cpp is installed, before anything is written."""
    if find_spec("xllamacpp") is None:
        raise UserError(
            "llama.cpp is not installed; GGUF files are checked by running them",
            where="xllamacpp",
            fix=install_command("gguf"),
        )


@dataclass(frozen=True)
class LlamaCpp:
    """A running llama.cpp."""

    client: httpx.Client
    child: Process
    lora: Mapping[str, Any]
    """The part of a request that applies the LoRA file."""

    def prompt_ids(self, messages: Sequence[Message], template: Template) -> list[int]:
        """Return a conversation's ids by the file's own chat template and tokenizer.

        ``template`` is the training template: it decides which functions are the base's built-in ones.
        """
        text = self._ask("/apply-template", _chat_request(messages, template))["prompt"]
        body = {"content": text, "add_special": True, "parse_special": True}
        ids: list[int] = self._ask("/tokenize", body)["tokens"]
        return ids

    def answer(self, prompt: Sequence[int], limit: int) -> tuple[int, ...]:
        """Return the greedy answer."""
        body = {"prompt": list(prompt), "n_predict": limit, "temperature": 0, "return_tokens": True}
        return tuple(self._ask("/completion", {**body, **self.lora, "cache_prompt": False})["tokens"])

    def next_token(self, ids: Sequence[int]) -> TopTokens:
        """Return the likeliest next tokens after these, by the softmax over all of its logits."""
        body = {"prompt": list(ids), "n_predict": 1, "temperature": 0, "n_probs": TOP_TOKENS, "cache_prompt": True}
        found = self._ask("/completion", {**body, **self.lora})["completion_probabilities"][0]["top_logprobs"]
        # JSON has no number for a logit of minus infinity.
        kept = [(token["id"], token["logprob"]) for token in found if token["logprob"] is not None]
        ids_, log_probs = zip(*kept, strict=True)
        return TopTokens(torch.tensor(ids_), torch.tensor(log_probs, dtype=torch.float64))

    def _ask(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            reply = self.client.post(route, json=body)
        except httpx.TransportError as error:
            if isinstance(error, httpx.TimeoutException):
                raise _without_answer(f"did not answer within {_ANSWER_S:g} s") from error
            if self.child.wait(_ANSWER_S) == KILLED:
                raise _without_answer("was killed") from error
            raise EngineFailedError(f"llama.cpp exited: {error}") from error
        if reply.is_error:
            raise EngineFailedError(f"llama.cpp rejected the request: {reply.text[:500]}")
        document: dict[str, Any] = reply.json()
        return document


@contextmanager
def running(model: Path, context: int, lora: Path | None = None) -> Iterator[LlamaCpp]:
    """Run llama.cpp with this file loaded, in a child process; it may reject the file, be killed or hang."""
    loras, key = [] if lora is None else [str(lora)], secrets.token_hex(16)
    settings: dict[str, Any] = {"model": str(model), "loras": loras, "rows": 1, "tokens": context}
    settings |= {"host": "127.0.0.1", "key": key, "jinja": True, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "tunewright.engines.llamacpp_worker", json.dumps(settings)]
    with tempfile.TemporaryFile() as log:
        # A child, because an invalid file may end the process (GGML_ASSERT).
        child = start(command, stdout=PIPE, stderr=log)
        try:
            assert child.stdout is not None
            limit = threading.Timer(_ANSWER_S, child.kill)  # the child may hang while it loads the file
            limit.start()
            try:
                address = child.stdout.readline().decode().strip().rpartition(" ")[2]
            finally:
                limit.cancel()
            if not address:
                if child.wait() == KILLED:  # an invalid file would end the process in another way
                    raise _without_answer(f"was killed, or did not load the file within {_ANSWER_S:g} s")
                log.seek(0)
                lines = log.read().decode("utf-8", "replace").strip().splitlines()
                errors = [line.split(" E ", 1)[1].strip() for line in lines if " E " in line]
                why = errors[0] if errors else " ".join(lines[-_LOG_LINES:])
                raise EngineFailedError(f"llama.cpp rejected the file: {why}")
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=address, headers=headers, timeout=_ANSWER_S, trust_env=False) as client:
                yield LlamaCpp(client, child, {"lora": [{"id": 0, "scale": 1.0}]} if loras else {})
        finally:
            end(child)


def observe_gguf(model: Path, trained: TrainedModel, reporter: Reporter, lora: Path | None = None) -> ArtifactOutputs:
    """Return the outputs of a GGUF file, optionally with a LoRA file on it."""
    probe, chat = trained.probe, trained.chat
    # With a LoRA file, the model file is the base's own and lacks the adapter's system prompt.
    default = trained.system_prompt if lora is None else None
    with running(model, probe.context + _ROOM, lora) as engine:
        answers = []

        def renders(messages: Sequence[Message], ids: Sequence[int]) -> bool:
            conversations = equivalent_conversations(messages, default)
            return all(engine.prompt_ids(asked, chat.template) == list(ids) for asked in conversations)

        rendered = sum(map(renders, (member.example.prompt for member in probe.members), probe.prompts))
        functions_rendered = sum(renders(asked, chat.prompt(asked)) for asked in probe.functions)
        with reporter.task(f"{(lora or model).name} in llama.cpp", len(probe.prompts), "prompts") as task:
            for prompt in probe.prompts:
                answers.append(cut(ended(engine.answer(prompt, probe.limit), chat.stop_ids), probe.stop, chat))
                task.advance()
        listed = []
        with reporter.task("distributions in llama.cpp", len(trained.log_probs), "places") as task:
            for ids, before in trained.contexts:
                for place in before:
                    listed.append(engine.next_token(ids[:place]))
                    task.advance()
    return ArtifactOutputs(
        completions=answers,
        distributions=listed,
        rendered=rendered,
        functions_rendered=functions_rendered,
        arithmetic="llama.cpp",
    )


def _chat_request(messages: Sequence[Message], template: Template) -> dict[str, Any]:
    """Return a conversation as a request in OpenAI's form; results also name their function, as some templates need."""
    given = template.variables(messages)
    turns = [m.as_dict() for m in messages if m.role != "tools"]
    for turn, variables in zip(turns, given["messages"], strict=True):
        if turn["role"] == "tool":
            turn["name"] = variables["name"]
        for call in turn.get("tool_calls", ()):
            # llama.cpp inserts arguments into Mistral v2's template as they were sent; training has these spaces.
            call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), ensure_ascii=False)
    body: dict[str, Any] = {"messages": turns}
    if given["tools"]:
        body["tools"] = given["tools"]
    if "builtin_tools" in given:
        body["chat_template_kwargs"] = {"builtin_tools": given["builtin_tools"]}
    return body


def build_model(folder: Path, source: ExportSource, file_type: FileType) -> BuiltArtifact:
    """Write base and adapter as one file."""
    project, name = source.project, source.adapter.name
    trained = measure_trained(source)
    weights, way, ways = choose_merge_method(trained, project.reporter)
    path = folder / f"{name}-{file_type}.gguf"
    tokens = partial(add_tokenizer, project.chat, trained.system_prompt)
    notes = write_model(path, name, weights, project.base, tokens, file_type, project.reporter)
    figures, failure = _figures(trained, project.reporter, path)
    return BuiltArtifact(figures, PRECISIONS[file_type], way, ways, (*notes, *source.notes()), failure)


def build_lora(folder: Path, source: ExportSource, file_type: FileType) -> BuiltArtifact:
    """Write the adapter's matrices as a file to load on a GGUF file of its base, which is in ``file_type``."""
    project, adapter = source.project, source.adapter
    trained = measure_trained(source)
    # An adapter's matrices are small and rounding them costs more: only its base is in a K-quant.
    lora_type: FileType = file_type if file_type in ("f16", "q8_0") else "f16"
    path = folder / f"{adapter.name}-lora-{lora_type}.gguf"
    changed = Weights(project.base, trained_dtype(adapter), read_deltas(adapter.folder))
    notes = write_lora(path, adapter.name, changed, project.base, lora_type, project.reporter)
    if lora_type != file_type:
        notes.append(f"the adapter's file is in {lora_type}; its base was in {file_type}")
    if project.chat.template.tools == "hermes":
        # Another GGUF file of the base has the base's own template, without a form of functions.
        write_text(folder / TEMPLATE_FILE, exported_template(project.chat))
        notes.append(f"for functions, give llama.cpp the template too: --chat-template-file {TEMPLATE_FILE}")
    figures, failure = _figures(trained, project.reporter, base_file(project, file_type), path)
    notes += source.notes(template=False)
    return BuiltArtifact(figures, PRECISIONS[file_type], "original", (), tuple(notes), failure)


def _figures(
    trained: TrainedModel, reporter: Reporter, model: Path, lora: Path | None = None
) -> tuple[Figures | None, str | None]:
    """Return the figures of the files in llama.cpp; if it rejects them, None and the reason."""
    try:
        return trained.figures(observe_gguf(model, trained, reporter, lora)), None
    except EngineFailedError as error:
        return None, str(error)


def base_file(project: OpenProject, file_type: FileType) -> Path:
    """Return the base as a GGUF file, cached in the working folder."""
    identity = digest({"base": project.base.digest, "template": project.chat.digest})[:12]
    path = project.folder.work / "export" / f"base-{identity}-{file_type}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}")
        base, tokens = Weights(project.base, "float32", {}), partial(add_tokenizer, project.chat, None)
        with writing(path):
            write_model(aside, project.base.spec, base, project.base, tokens, file_type, project.reporter)
            aside.replace(path)
    return path
