"""Demonstrations: the training pairs that a prompt shows before the question, and their layout."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunewright.config import RetrieverName
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.io import digest, file_digest, write_bytes
from tunewright.core.remote_files import error_reason, hub_refusals, hub_silence
from tunewright.data.examples import INSTRUCTIONS, Message, call_id
from tunewright.data.versions import Member
from tunewright.evaluation.arms import ArmPlan

if TYPE_CHECKING:
    from tunewright.config.project import ProjectFolder
    from tunewright.evaluation.generations import Generator


_POOL = 64
"""Most similar inputs from which diverse inputs are selected, or four for each demonstration if that is more."""
_KEPT_ROWS = 1024
"""Training inputs whose similarities to all others stay in memory."""
_NGRAMS = (2, 5)
"""Lengths of the character n-grams of TF-IDF, within words and at their edges."""


class Retriever(Protocol):
    """A ranking of training inputs by similarity to a question."""

    def similarities(self, query: str) -> NDArray[np.float64]:
        """Return the similarity of every training input, [inputs]; larger is more similar."""


class Bm25:
    """BM25 over words (Robertson & Zaragoza 2009; Lucene's variant, by bm25s)."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self._count = len(texts)
        self._index = bm25s.BM25()
        self._index.index(self._words(list(texts)), show_progress=False)

    def similarities(self, query: str) -> NDArray[np.float64]:
        """Return BM25 scores; all 0 for a query of unknown words."""
        (words,) = self._words([query])
        known = [w for w in words if w in self._index.vocab_dict]
        return np.asarray(self._index.get_scores(known) if known else np.zeros(self._count), dtype=np.float64)

    @staticmethod
    def _words(texts: list[str]) -> list[list[str]]:
        import bm25s

        # Single letters count (the default pattern drops them): "N.D." and "S.D." are different districts.
        words: list[list[str]] = bm25s.tokenize(
            texts, token_pattern=r"(?u)\b\w+\b", stopwords=None, return_ids=False, show_progress=False
        )
        return words


class TfIdf:
    """Cosine of TF-IDF vectors of character n-grams (by scikit-learn): language-independent, by spelling."""

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=_NGRAMS, sublinear_tf=True)
        self.rows: Any = self.vectorizer.fit_transform(texts)
        """Sparse unit vectors, [texts, n-grams]."""

    def similarities(self, query: str) -> NDArray[np.float64]:
        """Return cosines; all 0 for a query of unknown n-grams."""
        found: NDArray[np.float64] = (self.rows @ self.vectorizer.transform([query]).T).toarray()[:, 0]
        return found


class Dense:
    """Cosine of vectors, centred on the training inputs.

    Hidden states of a language model share a large common direction, which would make all cosines alike (Ethayarajh
    2019, arXiv 1909.00512).
    """

    def __init__(self, texts: Sequence[str], embed: Callable[[Sequence[str]], Vectors]) -> None:
        self._embed = embed
        rows = embed(texts)
        self._mean = rows.mean(axis=0)
        self._rows = self._unit(rows)
        self._queries: dict[str, NDArray[np.float64]] = dict(zip(texts, self._rows, strict=True))

    def prepare(self, queries: Sequence[str]) -> None:
        """Compute the vectors of these queries in one pass."""
        missing = sorted({query for query in queries if query not in self._queries})
        if missing:
            self._queries |= dict(zip(missing, self._unit(self._embed(missing)), strict=True))

    def similarities(self, query: str) -> NDArray[np.float64]:
        """Return cosines."""
        self.prepare([query])
        found: NDArray[np.float64] = self._rows @ self._queries[query]
        return found

    def _unit(self, vectors: Vectors) -> NDArray[np.float64]:
        centred = vectors.astype(np.float64) - self._mean
        unit: NDArray[np.float64] = centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)
        return unit


class Demonstrations:
    """The demonstrations of every arm, from one training split."""

    def __init__(self, train: Sequence[Member], seed: int, embed: Embed | None = None) -> None:
        self._train = train
        self._seed = seed
        self._embed = embed
        self._clusters = np.array([m.cluster for m in train])
        self._asked = [m.example.prompt_key for m in train]
        self._draws: dict[int, list[Member]] = {}
        self._retrievers: dict[RetrieverName, Retriever] = {}
        self._orders: dict[tuple[RetrieverName, str], tuple[list[int], NDArray[np.float64]]] = {}
        self._diverse: dict[tuple[RetrieverName, float, str, int], list[int]] = {}
        self._alike: dict[tuple[RetrieverName, int], NDArray[np.float64]] = {}

    def shown(self, plan: ArmPlan, query: Member) -> list[Member]:
        """Return the demonstrations for ``query`` in prompt order; none is from the query's own cluster.

        Rows with functions are shown only to queries that declare functions.
        """
        if not plan.shots:
            return []
        if plan.retriever is not None:
            if plan.mmr is None:
                found = self.nearest(plan.retriever, query, plan.shots)
            else:
                found = self.diverse(plan.retriever, query, plan.shots, plan.mmr)
            return found if plan.order == "similar_first" else found[::-1]
        assert plan.seed is not None
        others = (m for m in self.drawn(plan.seed) if m.cluster != query.cluster and _can_show(m, query))
        return list(islice(others, plan.shots))

    def nearest(self, retriever: RetrieverName, query: Member, k: int) -> list[Member]:
        """Return the ``k`` most similar training pairs of distinct inputs, the most similar first.

        The query's own cluster is excluded. Of an input with several outputs, the best-ranked pair is taken.
        """
        return [self._train[i] for i in self._ranked(retriever, query)[0][:k]]

    def diverse(self, retriever: RetrieverName, query: Member, k: int, weight: float) -> list[Member]:
        """Return ``k`` training pairs by maximal marginal relevance, the most similar one first.

        Each next one has the largest ``weight`` x (similarity to the question) - (1 - ``weight``) x (largest similarity
        to the pairs already selected), by Carbonell and Goldstein (1998). BM25 has no upper limit, so its scores are
        taken as shares: of the nearest input's for the question, and of an input's score for itself between inputs.
        """
        places, similar = self._ranked(retriever, query)
        pool = places[: max(_POOL, 4 * k)]
        key = (retriever, weight, query.key, len(pool))
        selected = self._diverse.setdefault(key, [])
        relevance = similar[pool] / (max(float(similar[pool[0]]), 1e-12) if pool and retriever == "bm25" else 1)
        redundancy = np.full(len(pool), -np.inf)
        for place in selected:
            redundancy = np.maximum(redundancy, self._similar_to(retriever, place)[pool])
        while len(selected) < min(k, len(pool)):
            marginal = weight * relevance - (1 - weight) * (redundancy if selected else 0)
            marginal[[n for n, place in enumerate(pool) if place in selected]] = -np.inf
            selected.append(pool[int(np.argmax(marginal))])
            redundancy = np.maximum(redundancy, self._similar_to(retriever, selected[-1])[pool])
        return [self._train[i] for i in selected[:k]]

    def _similar_to(self, retriever: RetrieverName, place: int) -> NDArray[np.float64]:
        """Return the similarity of every training input to one of them, as a share of its similarity to itself."""
        if (key := (retriever, place)) not in self._alike:
            if len(self._alike) >= _KEPT_ROWS:
                self._alike.clear()
            similar = self._retriever(retriever).similarities(self._texts[place])
            self._alike[key] = similar / max(float(similar[place]), 1e-12)
        return self._alike[key]

    def prepare(self, plan: ArmPlan, queries: Sequence[Member]) -> None:
        """Compute in one pass the vectors that a dense retriever needs for these questions."""
        if plan.retriever is not None and isinstance(dense := self._retriever(plan.retriever), Dense):
            dense.prepare([query.example.input_text for query in queries])

    def _ranked(self, retriever: RetrieverName, query: Member) -> tuple[list[int], NDArray[np.float64]]:
        """Return the places of training pairs of distinct inputs, the most similar first, and all similarities."""
        key = (retriever, query.key)
        if key not in self._orders:
            similar = self._retriever(retriever).similarities(query.example.input_text)
            # Stable: equally similar ones keep the members' order, by key.
            order = np.argsort(-similar, kind="stable")
            # Several references of one input would all be equally near: four shots of them show one input.
            first_of: dict[tuple[str, ...], int] = {}
            for place in order[self._clusters[order] != query.cluster].tolist():
                if _can_show(self._train[place], query):
                    first_of.setdefault(self._asked[place], place)
            self._orders[key] = list(first_of.values()), similar
        return self._orders[key]

    def drawn(self, seed: int) -> list[Member]:
        """Return the training pairs in the order of this seed's static arms, one per cluster.

        Fewer shots are a prefix of more shots. Where outputs repeat (classes), each distinct output appears once before
        any repeats.
        """
        if seed not in self._draws:
            first_of: dict[str, Member] = {}
            for member in sorted(self._train, key=lambda m: _seeded_order(f"{self._seed}:{seed}:{m.key}")):
                first_of.setdefault(member.cluster, member)
            times = Counter[str]()
            turn: dict[str, int] = {}
            for member in first_of.values():
                turn[member.key] = times[member.example.output]
                times[member.example.output] += 1
            self._draws[seed] = sorted(first_of.values(), key=lambda m: turn[m.key])
        return self._draws[seed]

    def _retriever(self, name: RetrieverName) -> Retriever:
        if name not in self._retrievers:
            self._retrievers[name] = self._open(name)
        return self._retrievers[name]

    def _open(self, name: RetrieverName) -> Retriever:
        if name == "bm25":
            return Bm25(self._texts)
        if name == "tfidf":
            return TfIdf(self._texts)
        assert self._embed is not None
        return Dense(self._texts, partial(self._embed, name))

    @cached_property
    def _texts(self) -> list[str]:
        return [m.example.input_text for m in self._train]


def _seeded_order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def with_demonstrations(query: Member, demonstrations: Sequence[Member]) -> tuple[Message, ...]:
    """Return the query's prompt after worked examples, as conversation turns in their order.

    Demonstrations keep their calls and results. Only the query's functions are declared, as a client sends them.
    """
    prompt = query.example.prompt
    turns = [d.example.messages for d in demonstrations]
    conversations = [[m for m in messages if m.role not in INSTRUCTIONS] for messages in [*turns, prompt]]
    return (*(m for m in prompt if m.role in INSTRUCTIONS), *_numbered(conversations))


def _numbered(conversations: Iterable[Sequence[Message]]) -> Iterator[Message]:
    """Yield the turns of several conversations as one, with the ids of calls by their place in it."""
    count = 0
    for messages in conversations:
        ids: dict[str, str] = {}
        for message in messages:
            for call in message.calls:
                ids[call.id] = call_id(count)
                count += 1
            calls = tuple(replace(call, id=ids[call.id]) for call in message.calls)
            answered = None if message.call_id is None else ids[message.call_id]
            yield replace(message, calls=calls, call_id=answered)


def _declares(member: Member) -> bool:
    return member.example.messages[0].role == "tools"


def _can_show(member: Member, query: Member) -> bool:
    """Return whether a query's prompt may show a row: calls need declared functions."""
    return _declares(query) or not _declares(member)


# Vectors of texts for dense retrieval: the base's own hidden states, or a sentence-transformers model


Vectors = NDArray[np.float32]

_BATCH = 32
_KEY = "evaluate.embedding_model"
_LIBRARY = "sentence-transformers"
_HOW = "mean over tokens, a third of the layers"
"""Part of every key of the base's vectors: change it when the way to compute them changes."""


class Embeddings:
    """Vectors of texts, each set of texts computed in one pass and kept in the project's working folder.

    With ``kept_only`` no model is loaded: vectors that are not kept are refused.
    """

    def __init__(self, project: ProjectFolder, generator: Generator, context: int) -> None:
        self._project = project
        self._generator = generator
        self._context = context
        self._reporter = generator.reporter
        self.kept_only = False

    def of(self, retriever: RetrieverName, texts: Sequence[str]) -> Vectors:
        """Return the texts' vectors for a dense retriever, [texts, width]."""
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
                    # The model computes at least one position of logits, although nothing reads it.
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
            fix = install_command(_LIBRARY)
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
    """Return the folder of a hub's model, downloaded unless the cache has it."""
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
