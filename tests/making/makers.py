"""The model makers' own tokenizers and encoders, as references that the chat encoding has to match.

Their vocabularies come inside the makers' packages (llama-models, mistral-common); nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.base import Tokenizer as MistralEncoder
    from tokenizers import Tokenizer

Llama3 = Literal["llama3", "llama3_1", "llama3_2"]
Mistral = Literal["v1", "v2", "v3", "v7", "tekken", "v7-tekken", "v11", "v13", "v15"]
Written = Literal["v11", "v13", "v15"]
Chat = Sequence[Mapping[str, str]]
Text = TypeVar("Text", str, bytes)

LLAMA3_FAMILIES: tuple[Llama3, ...] = ("llama3", "llama3_1", "llama3_2")
MISTRAL_FILES: dict[Mistral, str] = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "tekken": "tekken_240718.json",
    "v7-tekken": "tekken_240911.json",
    # mistral-common encodes by these versions, and has none of their files: see `written_tekken`.
    "v11": "tekken_240911.json",
    "v13": "tekken_240911.json",
    "v15": "tekken_240911.json",
}
WRITTEN: tuple[Written, ...] = get_args(Written)
WRITTEN_TOKENS = 16_000
"""Ordinary tokens of those: a file of 130,000 takes 4 s to convert, which "tekken" and "v7-tekken" do already."""
TEMPLATES = Path(__file__).parents[1] / "chat" / "templates"
# v2 and v3 differ in tool calls only.
# From v11 on the templates are those that mistral-common writes itself.
MISTRAL_TEMPLATES: dict[Mistral, str] = {
    "v1": "mistral_v1.jinja",
    "v2": "mistral_v3.jinja",
    "v3": "mistral_v3.jinja",
    "v7": "mistral_v7.jinja",
    "tekken": "mistral_tekken.jinja",
    "v7-tekken": "mistral_v7_tekken.jinja",
}


@cache
def llama3_encoder() -> Any:
    """Meta's own tokenizer of Llama 3 (its special tokens are those of 3.1 and later)."""
    from llama_models.llama3.tokenizer import Tokenizer

    return Tokenizer.get_instance()


@cache
def llama4_encoder() -> Any:
    """Meta's own tokenizer of Llama 4."""
    return import_module("llama_models.llama4.tokenizer").Tokenizer.get_instance()


@cache
def meta_chat_format(generation: Literal[3, 4] = 3) -> Any:
    """Meta's own chat format of Llama 3 or 4."""
    if generation == 3:
        return import_module("llama_models.llama3.chat_format").ChatFormat(llama3_encoder())
    if find_spec("torchvision") is not None:
        return import_module("llama_models.llama4.chat_format").ChatFormat(llama4_encoder())
    # Llama 4's module imports torchvision for images; empty modules in its place are enough for text.
    images, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    vars(images)["transforms"] = transforms
    vars(transforms)["functional"] = ModuleType("torchvision.transforms.functional")
    sys.modules |= {module.__name__: module for module in (images, transforms)}
    try:
        return import_module("llama_models.llama4.chat_format").ChatFormat(llama4_encoder())
    finally:
        for module in (images, transforms):
            del sys.modules[module.__name__]


@cache
def mistral_encoder(version: Mistral) -> MistralEncoder:
    """Mistral's own text tokenizer."""
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    file = written_tekken(version) if version in WRITTEN else _mistral_file(version)
    return Tekkenizer.from_file(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


def trl_template(name: str) -> str:
    """A public chat template that trl ships."""
    return (_package_folder("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def llama3_tokenizer(family: Llama3 = "llama3") -> Any:
    """Llama 3's tokenizer as transformers loads it, with this family's chat template."""
    return _transformers_tokenizer(
        _convert_llama3(),
        trl_template(family),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
    )


@cache
def llama4_tokenizer() -> Any:
    """Llama 4's tokenizer as transformers loads it, with a template after Meta's."""
    return _transformers_tokenizer(
        _convert_meta(llama4_encoder(), llama4_encoder().O200K_PATTERN),
        (TEMPLATES / "llama4.jinja").read_text(encoding="utf-8"),
        bos="<|begin_of_text|>",
        eos="<|eot|>",
        pad="<|finetune_right_pad|>",
    )


@cache
def mistral_tokenizer(version: Mistral) -> Any:
    """Mistral's tokenizer as transformers loads it, with a template that renders what mistral-common encodes."""
    if version in WRITTEN:
        return _tekken_as_shipped(version)
    template = (TEMPLATES / MISTRAL_TEMPLATES[version]).read_text(encoding="utf-8")
    return _transformers_tokenizer(_convert_mistral(version), template)


@cache
def llama2_tokenizer() -> Any:
    """Llama 2's chat format on Mistral v1's tokenizer, which is of the same kind."""
    return _transformers_tokenizer(_convert_mistral("v1"), (TEMPLATES / "llama2.jinja").read_text(encoding="utf-8"))


def llama3_reference(messages: Chat, generation_prompt: bool) -> list[int]:
    """Ids of the conversation by Meta's own chat format, with the next answer's header or without."""
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat

    chat_format = ChatFormat(llama3_encoder())
    if generation_prompt:
        return list(chat_format.encode_dialog_prompt([RawMessage(**m) for m in messages]).tokens)
    header = len(chat_format.encode_dialog_prompt([]).tokens) - 1
    return llama3_reference(messages, generation_prompt=True)[:-header]


def mistral_reference(
    version: Mistral, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Ids of the conversation by mistral-common; they end where the answer begins if the user or a tool spoke last."""
    from mistral_common.protocol.instruct.normalize import get_normalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers import instruct
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    # By hand, as mistral-common's validators refuse some conversations that its encoders take, and as the package
    # has v7's tekken vocabulary only in a file that says v3.
    by_version: dict[Mistral, tuple[TokenizerVersion, type[instruct.InstructTokenizerV1[Any, Any, Any]]]] = {
        "v1": (TokenizerVersion.v1, instruct.InstructTokenizerV1),
        "v2": (TokenizerVersion.v2, instruct.InstructTokenizerV2),
        "v3": (TokenizerVersion.v3, instruct.InstructTokenizerV3),
        "v7": (TokenizerVersion.v7, instruct.InstructTokenizerV7),
        "tekken": (TokenizerVersion.v3, instruct.InstructTokenizerV3),
        "v7-tekken": (TokenizerVersion.v7, instruct.InstructTokenizerV7),
        "v11": (TokenizerVersion.v11, instruct.InstructTokenizerV11),
        "v13": (TokenizerVersion.v13, instruct.InstructTokenizerV13),
        "v15": (TokenizerVersion.v15, instruct.InstructTokenizerV15),
    }
    number, instruct_tokenizer = by_version[version]
    encoder = mistral_encoder(version)
    settings = encoder.model_settings_builder if version == "v15" else None
    request: ChatCompletionRequest[Any] = ChatCompletionRequest.model_validate(
        {"messages": [dict(m) for m in messages], **({"tools": [dict(t) for t in tools]} if tools else {})}
    )
    normalized = get_normalizer(number, settings).from_chat_completion_request(request)
    return list(instruct_tokenizer(encoder).encode_instruct(normalized).tokens)


@cache
def written_tekken(version: Written) -> Path:
    """A folder's tekken.json as Mistral publishes it with models of this version: its vocabulary, and more tokens.

    The vocabulary of all of these is that of 240911, which mistral-common has, and here the most frequent part of it.
    The special tokens are listed in the file from v11 on, the new ones where Mistral's files have them.
    """
    import json
    import tempfile

    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    data = json.loads(_mistral_file("v7-tekken").read_text(encoding="utf-8"))
    names = [
        str(getattr(token["token_str"], "value", token["token_str"])) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS
    ]
    names += [f"<SPECIAL_{place}>" for place in range(len(names), 32)]
    names += ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"]
    kept = names[: {"v11": 34, "v13": 36, "v15": 38}[version]]
    data["special_tokens"] = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(kept)]
    data["vocab"] = data["vocab"][:WRITTEN_TOKENS]
    data["config"]["default_vocab_size"] = WRITTEN_TOKENS + data["config"]["default_num_special_tokens"]
    data["config"]["version"] = version
    if version == "v15":
        effort = {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"}
        data["model_settings_builder"] = {"reasoning_effort": effort}
    file = Path(tempfile.mkdtemp()) / "tekken.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    return file


def _tekken_as_shipped(version: Written) -> Any:
    """The tokenizer and template of a folder that holds tekken.json and Mistral's template."""
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template

    from tunewright.models.bases import Base
    from tunewright.models.loading import load_tokenizer

    file = written_tekken(version)
    template = convert_tokenizer_to_chat_template(file)
    (file.parent / "chat_template.jinja").write_text(template, encoding="utf-8")
    return load_tokenizer(Base(version, file.parent, None, "Mistral3ForConditionalGeneration", {}))


def llama2_reference(messages: Chat) -> list[int]:
    """Ids of the conversation as the generation.py of Llama 2 makes them, on Mistral v1's tokenizer."""
    encoder = mistral_encoder("v1")
    texts = [m["content"] for m in messages]
    if messages[0]["role"] == "system":
        texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
    ids = []
    for user, assistant in zip(texts[::2], texts[1::2], strict=False):
        ids += encoder.encode(f"[INST] {user.strip()} [/INST] {assistant.strip()} ", bos=True, eos=True)
    if len(texts) % 2:
        ids += encoder.encode(f"[INST] {texts[-1].strip()} [/INST]", bos=True, eos=False)
    return ids


def build_llama3_base(folder: Path, family: Llama3 = "llama3", seed: int = 0) -> Path:
    """Write a tiny random Llama with Llama 3's tokenizer into ``folder``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = llama3_tokenizer(family)
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    return _save_base(folder, tokenizer, LlamaConfig, LlamaForCausalLM, stops, seed)


def build_mistral_base(folder: Path, version: Mistral = "v3", seed: int = 0) -> Path:
    """Write a tiny random Mistral with this version's tokenizer into ``folder``."""
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = mistral_tokenizer(version)
    return _save_base(folder, tokenizer, MistralConfig, MistralForCausalLM, tokenizer.eos_token_id, seed)


def _save_base(folder: Path, tokenizer: Any, config: Any, model: Any, stops: int | list[int], seed: int) -> Path:
    import torch
    from transformers import GenerationConfig

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    base = model(
        config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            **ids,
        )
    )
    base.generation_config = GenerationConfig(**ids)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _package_folder(name: str) -> Path:
    spec = find_spec(name)
    assert spec and spec.origin, f"{name} is not installed"
    return Path(spec.origin).parent


def _mistral_file(version: Mistral) -> Path:
    return _package_folder("mistral_common") / "data" / MISTRAL_FILES[version]


def _transformers_tokenizer(
    converted: Tokenizer, template: str, bos: str = "<s>", eos: str = "</s>", pad: str | None = None
) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converted, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


@cache
def _convert_llama3() -> Tokenizer:
    return _convert_meta(llama3_encoder(), llama3_encoder().pat_str)


def _convert_meta(encoder: Any, pattern: str) -> Tokenizer:
    special = sorted(encoder.special_tokens, key=lambda token: int(encoder.special_tokens[token]))
    # All ids below the special tokens' are ordinary tokens.
    ranks = {encoder.model.decode_single_token_bytes(i): i for i in range(encoder.special_tokens[special[0]])}
    return _byte_level_bpe(ranks, {}, special, pattern, bos=special[0])


@cache
def _convert_mistral(version: Mistral) -> Tokenizer:
    file = _mistral_file(version)
    return _convert_tekken(file) if file.suffix == ".json" else _convert_sentencepiece(file)


def _convert_tekken(file: Path) -> Tokenizer:
    import base64
    import json

    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    encoder = Tekkenizer.from_file(file)
    data = json.loads(file.read_text(encoding="utf-8"))
    special = {encoder.id_to_piece(i): i for i in range(encoder.num_special_tokens)}
    # The file has more tokens than the model.
    ordinary = data["vocab"][: encoder.n_words - len(special)]
    ranks = {base64.b64decode(token["token_bytes"]): len(special) + token["rank"] for token in ordinary}
    return _byte_level_bpe(ranks, special, list(special), data["config"]["pattern"], bos="<s>")


def _byte_level_bpe(
    ranks: dict[bytes, int], more: dict[str, int], special: list[str], pattern: str, bos: str
) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(spell(left), spell(right)) for left, right in _merges(ranks)]
    vocabulary = {spell(token): i for token, i in ranks.items()} | more
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return _with_bos(tokenizer, bos)


def _convert_sentencepiece(file: Path) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # A module that protobuf fills as it is imported: type checkers see nothing in it.
    protocol: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    model = protocol.ModelProto.FromString(file.read_bytes())
    piece_type = protocol.ModelProto.SentencePiece
    normal = [piece for piece in model.pieces if piece.type == piece_type.NORMAL]
    normal.sort(key=lambda piece: -piece.score)
    tokenizer = Tokenizer(
        models.BPE(
            {piece.piece: i for i, piece in enumerate(model.pieces)},
            _merges({piece.piece: rank for rank, piece in enumerate(normal)}),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    special = (piece_type.UNKNOWN, piece_type.CONTROL)
    for piece in model.pieces:
        if piece.type in special:
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        # sentencepiece finds these in any text.
        elif piece.type == piece_type.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])
    return _with_bos(tokenizer, "<s>")


def _merges(ranks: dict[Text, int]) -> list[tuple[Text, Text]]:
    """Each way to make a token of two others, the lowest rank first."""
    ways = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                ways.append((rank, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(ways)]


def _with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer
