"""Vectors of texts for dense retrieval: the base's own hidden states, or a sentence-transformers model."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tunewright.config import RetrieverName
from tunewright.core.errors import UserError
from tunewright.core.hub import error_reason, hub_refusals, hub_silence
from tunewright.core.io import digest, file_digest, write_bytes

if TYPE_CHECKING:
    from tunewright.config.project import ProjectFolder
    from tunewright.evaluation.generations import Generator

Vectors = NDArray[np.float32]

_BATCH = 32
_KEY = "evaluate.embedding_model"
_LIBRARY = "sentence-transformers"
_HOW = "mean over tokens, a third of the layers"
"""Part of every key of the base's vectors: change it when the way to compute them changes."""


class Embeddings:
    """Vectors of texts, each set of texts computed in one pass and kept in the project's working folder.

    With ``kept_only`` no model is loaded: vectors that are not kept are refused.

    Args:
        project: its config names the embedding model.
        generator: holds the base.
        context: the base's context length in tokens.
    """

    def __init__(self, project: ProjectFolder, generator: Generator, context: int) -> None:
        self._project = project
        self._generator = generator
        self._context = context
        self._reporter = generator.reporter
        self.kept_only = False

    def of(self, retriever: RetrieverName, texts: Sequence[str]) -> Vectors:
        """Return the texts' vectors for a dense retriever, [texts, width].

        Raises:
            UserError: the embedding model cannot be loaded, or no vector may be computed and these are not kept.
        """
        compute = self._of_base if retriever == "dense" else self._of_model
        file = self._project.work / "embeddings" / f"{digest([self.identity(retriever), list(texts)])[:16]}.npy"
        if file.exists():
            kept: Vectors = np.load(file)
            return kept
        if self.kept_only:
            raise UserError(
                f"The retriever {retriever} has no vectors of {len(texts):,} inputs yet",
                fix="tunewright evaluate --estimate computes those of training and dev rows.",
            )
        found = compute(texts)
        with io.BytesIO() as buffer:
            np.save(buffer, found)
            write_bytes(file, buffer.getvalue())
        return found

    def identity(self, retriever: RetrieverName) -> dict[str, Any]:
        """Return everything that decides a dense retriever's vectors."""
        if retriever == "dense":
            return {"base": self._generator.base.digest, **self._generator.weights, "how": _HOW}
        return {"model": self._model_files[1], "version": version(_LIBRARY)}

    def _of_base(self, texts: Sequence[str]) -> Vectors:
        """Return the mean hidden state of each text's tokens after a third of the layers.

        Later layers turn to the next token. Of nine depths of the bundled base, this one retrieves the outputs most
        like the reference (docs/concepts/prompting-arms.md).
        """
        import torch

        generator = self._generator
        whole = generator.chat.tokenizer(list(texts))["input_ids"]
        self._warn_of_longer([len(ids) for ids in whole], self._context, "dense")
        rows = [list(ids)[: self._context] for ids in whole]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        found: dict[int, Vectors] = {}
        title = "hidden states of inputs"
        with generator.answering(None) as model, self._reporter.task(title, len(rows), "inputs") as task:
            for start in range(0, len(order), _BATCH):
                places = order[start : start + _BATCH]
                width = max(1, max(len(rows[place]) for place in places))
                ids = torch.full((len(places), width), generator.chat.tokenizer.pad_token_id)
                mask = torch.zeros_like(ids)
                for line, place in enumerate(places):
                    count = len(rows[place])
                    ids[line, :count], mask[line, :count] = torch.tensor(rows[place], dtype=torch.long), 1
                ids, mask = ids.to(model.device), mask.to(model.device)
                with torch.inference_mode():
                    # One position of logits, which nothing reads, is the fewest that the model computes.
                    states = model(
                        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
                    ).hidden_states
                chosen = states[len(states) // 3].float() * mask[..., None]  # [rows, tokens, width]
                means = (chosen.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)).cpu().numpy()
                found |= dict(zip(places, means, strict=True))
                task.advance(len(places))
        return np.stack([found[place] for place in range(len(rows))]).astype(np.float32)

    def _of_model(self, texts: Sequence[str]) -> Vectors:
        lengths = [len(ids) for ids in self._model.tokenizer(list(texts), verbose=False)["input_ids"]]
        self._warn_of_longer(lengths, self._model.max_seq_length, _LIBRARY)
        title = f"vectors by {self._project.config.evaluate.embedding_model}"
        with self._reporter.task(title, len(texts), "inputs") as task:
            parts = []
            for start in range(0, len(texts), _BATCH):
                batch = list(texts[start : start + _BATCH])
                parts.append(self._model.encode(batch, batch_size=_BATCH, show_progress_bar=False))
                task.advance(len(batch))
        vectors: Vectors = np.concatenate(parts).astype(np.float32)
        return vectors

    def _warn_of_longer(self, lengths: Sequence[int], most: int | None, retriever: str) -> None:
        longer = 0 if most is None else sum(length > most for length in lengths)
        if longer:
            self._reporter.warn(
                f"{retriever}: {longer:,} of {len(lengths):,} inputs are longer than {most:,} tokens; only the "
                "beginning of these decides which demonstrations are similar"
            )

    @cached_property
    def _model_files(self) -> tuple[Path, str]:
        """The embedding model's folder, and the digest of its files or its commit."""
        name = str(self._project.config.evaluate.embedding_model)
        try:
            version(_LIBRARY)
        except ImportError:
            fix = f"pip install 'tunewright[{_LIBRARY}]'"
            raise UserError(f"The package {_LIBRARY} is not installed", where="evaluate.retrievers", fix=fix) from None
        folder = self._project.root / name
        if folder.is_dir():
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            return folder, digest({file.relative_to(folder).as_posix(): file_digest(file) for file in files})
        folder = _hub_model(name)
        return folder, folder.name

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer

        folder, _ = self._model_files
        try:
            return SentenceTransformer(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"{folder} cannot be loaded as a sentence-transformers model: {error_reason(error)}",
                where=_KEY,
                fix="Name the folder or the hub id of such a model.",
            ) from None


def _hub_model(name: str) -> Path:
    """Return the folder of a hub's model, downloaded unless the cache has it.

    Raises:
        UserError: it is not in the cache, and the hub refuses it or is unreachable.
    """
    from huggingface_hub import errors, hf_hub_url, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wrong = UserError(f"{name} is neither a folder nor a hub id", where=_KEY, fix="Check the path or the id.")
    try:
        silence = hub_silence(hf_hub_url(name, "modules.json"))
        with hub_refusals("model", name, None, _KEY, _KEY):
            return Path(snapshot_download(name, local_files_only=silence is not None))
    except HFValidationError:
        raise wrong from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name} is neither a folder nor in the local hub cache, and the hub is unreachable: {silence}",
            where=_KEY,
            fix="Check the path or the network, or download the model and name its folder.",
        ) from None
    except (OSError, errors.HTTPError) as error:
        raise UserError(f"{name} cannot be downloaded: {error_reason(error)}", where=_KEY) from None


Embed = Callable[[RetrieverName, Sequence[str]], Vectors]
