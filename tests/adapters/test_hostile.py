"""Every hostile adapter of the corpus is refused for its own reason, and leaves the disk unchanged."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from making.command_line import tiny_project, tunewright
from making.small_adapters import lora_config, lora_weights, own_keys, tree, write_adapter
from tunewright.adapters.registry import CONFIG, WEIGHTS

Build = Callable[[Path], Path]
"""Writes a hostile adapter below a folder, and returns the path to import."""

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


class Payload:
    """A pickle that would write a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/tunewright-was-here",))


PICKLE = pickle.dumps(Payload())


def _changed(change: Callable[[Path], Any]) -> Build:
    """An adapter whose folder is changed."""

    def build(at: Path) -> Path:
        folder = write_adapter(at / "evil")
        change(folder)
        return folder

    return build


def _with_file(name: str, content: bytes = b"{}") -> Build:
    """An adapter with another file, or another content of one."""
    return _changed(lambda folder: (folder / name).write_bytes(content))


def _config(**changes: Any) -> Build:
    return lambda at: write_adapter(at / "evil", lora_config(**changes))


def _weights(change: Callable[[dict[str, Any]], Any]) -> Build:
    def build(at: Path) -> Path:
        weights = lora_weights()
        change(weights)
        return write_adapter(at / "evil", weights=weights)

    return build


def _header(header: bytes, data: int, length: int | None = None) -> Build:
    """An adapter whose weights have this header, followed by ``data`` bytes."""
    claimed = len(header) if length is None else length
    return _with_file(WEIGHTS, struct.pack("<Q", claimed) + header + bytes(data))


def _described(**changes: Any) -> bytes:
    return json.dumps({A: {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]} | changes}).encode()


def _pickle_for_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(PICKLE)


def _very_many_files(folder: Path) -> None:
    for number in range(100):
        (folder / f"adapter_config.json.{number}").touch()


def _linked_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


def _linked_checkpoints(folder: Path) -> None:
    write_adapter(folder.parent / "elsewhere" / "step-1")
    (folder / "checkpoints").symlink_to(folder.parent / "elsewhere")


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _socket(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    place = Path.cwd()
    os.chdir(folder)  # a socket's path may have 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(WEIGHTS)
    finally:
        os.chdir(place)


def _archive(kind: str) -> Build:
    return lambda at: Path(shutil.make_archive(str(at / "evil"), kind, write_adapter(at / "good")))


def _archive_that_is_a_pipe(at: Path) -> Path:
    os.mkfifo(at / "evil.tar")
    return at / "evil.tar"


def _shift_layer(weights: dict[str, Any]) -> None:
    for name in (A, B):
        weights[name.replace("layers.0", "layers.7")] = weights[name]


def _huge_weight(weights: dict[str, Any]) -> None:
    weights[A][:] = 0
    weights[A][0, 0] = 1e30


OVERLAPPING = {
    A: {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]},
    B: {"dtype": "F32", "shape": [4, 64], "data_offsets": [512, 1536]},
}
NOT_PART, NOT_PLAIN = "This file is not part of an adapter", "Not a plain file"
LAYERS, THREE_KEYS = "target_modules: Expected a list of linear layers", "A tensor needs exactly dtype, shape"

CORPUS: dict[str, tuple[str, Build]] = {
    # Its files
    "weights_as_a_pickle": ("A pickle can run code", _changed(_pickle_for_weights)),
    "a_pickle_beside_good_weights": ("A pickle can run code", _with_file("optimizer.pt", PICKLE)),
    "a_pickle_that_is_called_safetensors": ("The header claims .* bytes", _with_file(WEIGHTS, PICKLE + bytes(64))),
    "code_beside_it": (NOT_PART, _with_file("modeling_evil.py", b"import os")),
    "a_tokenizer_beside_it": (NOT_PART, _with_file("tokenizer_config.json")),
    "weights_in_shards": ("All weights must be in", _with_file("adapter_model-00002-of-00002.safetensors")),
    "a_folder_within": (
        "This folder is not part of an adapter",
        _changed(lambda folder: write_adapter(folder / "default")),
    ),
    "a_name_with_a_cyrillic_letter": (NOT_PART, _with_file("аdapter_config.json")),
    "a_name_written_from_right_to_left": (NOT_PART, _with_file("README‮dm.nib")),
    "a_name_that_moves_the_cursor": (NOT_PART, _with_file("\x1b[2Jadapter_config.json")),
    "a_folder_of_very_many_files": ("More than 64 files and folders", _changed(_very_many_files)),
    "no_weights": (f"Not an adapter: {WEIGHTS} missing", _changed(lambda folder: (folder / WEIGHTS).unlink())),
    "a_configuration_of_two_megabytes": ("larger than 1 MB", _config(base_model_name_or_path="x" * (2 << 20))),
    "a_checkpoint_of_an_unknown_training": (
        "The adapter has earlier checkpoints but no lineage.json",
        _changed(lambda folder: write_adapter(folder / "checkpoints" / "step-1")),
    ),
    # Links, devices, pipes, archives
    "weights_that_are_a_link": (NOT_PLAIN, _changed(_linked_weights)),
    "a_readme_that_leads_to_a_secret": (
        NOT_PLAIN,
        _changed(lambda folder: (folder / "README.md").symlink_to("/etc/passwd")),
    ),
    "checkpoints_that_lead_elsewhere": (NOT_PLAIN, _changed(_linked_checkpoints)),
    "weights_that_are_a_hard_link": (
        "a hard link",
        _changed(lambda folder: os.link(folder / WEIGHTS, folder.parent / "the-other-name")),
    ),
    "weights_that_are_a_pipe": (NOT_PLAIN, _changed(_pipe)),
    "weights_that_are_a_socket": (NOT_PLAIN, _changed(_socket)),
    "an_adapter_in_a_zip": ("archives are not imported", _archive("zip")),
    "an_adapter_in_a_compressed_tar": ("archives are not imported", _archive("gztar")),
    "an_archive_that_is_a_pipe": ("Not a folder", _archive_that_is_a_pipe),
    "an_archive_that_is_an_endless_device": ("Not a folder", lambda _: Path("/dev/zero")),
    # Its configuration
    "a_class_to_import": (
        "auto_mapping: This key names a class to import",
        _config(auto_mapping={"base_model_class": "Evil", "parent_library": "os"}),
    ),
    "a_module_to_import": ("megatron_core: This key names a module to import", _config(megatron_core="antigravity")),
    "layers_of_megatron": (
        "megatron_config: This key is for layers of Megatron",
        _config(megatron_config={"tensor_model_parallel_size": 1}),
    ),
    "replicated_layers": (
        "layer_replication: This key replicates layers",
        _config(layer_replication=[[0, 100_000]]),
    ),
    "dora": ("use_dora: This key is DoRA", _config(use_dora=True)),
    "biases": ("bias: This key adds trained biases", _config(bias="all")),
    "whole_layers": ("modules_to_save: This key adds complete layers", _config(modules_to_save=["lm_head"])),
    "tokens_of_its_own": (
        "trainable_token_indices: This key adds token embeddings",
        _config(trainable_token_indices=[1, 2]),
    ),
    "a_regular_expression_that_never_ends": (LAYERS, _config(target_modules="(a+)+$")),
    "a_target_that_no_llama_has": (
        "The base has no linear layer embed_tokens",
        _config(target_modules=["q_proj", "embed_tokens"]),
    ),
    "a_pattern_of_ranks_that_never_ends": (
        "rank_pattern: Expected a map from linear layers' names",
        _config(rank_pattern={"(.*)*q_proj": 4}),
    ),
    "a_key_that_asks_for_trust": ("The key 'trust_remote_code' is not allowed", _config(trust_remote_code=True)),
    "another_kind_of_adapter": ("peft_type: Expected LORA", _config(peft_type="PREFIX_TUNING")),
    "a_start_that_changes_the_base": (
        "init_lora_weights: Expected true, false or gaussian",
        _config(init_lora_weights="pissa"),
    ),
    "a_layer_that_the_base_does_not_have": (
        "layers_to_transform: Layer 99",
        _config(layers_to_transform=[0, 99]),
    ),
    "true_where_a_number_is_wanted": ("lora_alpha: ", _config(lora_alpha=True)),
    "a_rank_over_the_cap": ("a rank from 1 to 512", _config(r=513)),
    "a_key_given_twice": (
        'duplicate key "r"',
        _with_file(CONFIG, json.dumps(lora_config())[:-1].encode() + b', "r": 512}'),
    ),
    "a_number_that_json_does_not_have": (
        "NaN is not JSON",
        _with_file(CONFIG, json.dumps(lora_config(lora_alpha=float("nan"))).encode()),
    ),
    "a_configuration_nested_too_deep": (
        "Nested more than 32 levels",
        _with_file(CONFIG, b'{"r":' * 100_000 + b"1" + b"}" * 100_000),
    ),
    "a_configuration_that_is_a_list": ("Expected a JSON object", _with_file(CONFIG, b"[]")),
    "a_number_of_a_million_digits": ("Not strict JSON", _with_file(CONFIG, b'{"r": ' + b"9" * 1_000_000 + b"}")),
    # The header of its weights
    "a_header_of_all_memory": (
        "The header claims 18,446,744,073,709,551,615 bytes",
        _header(b"{}", 0, length=2**64 - 1),
    ),
    "a_header_of_nine_megabytes": (
        r"The header claims 9,000,000 bytes \(limit 8,388,608\)",
        _header(b"{" + b" " * 8_999_998 + b"}", 0),
    ),
    "a_header_longer_than_the_file": ("invalid header length", _header(b"{}", 100, length=5000)),
    "weights_of_three_bytes": ("header too small", _with_file(WEIGHTS, b"abc")),
    "weights_that_are_cut_off": (
        "file not fully covered",
        _changed(lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)),
    ),
    "weights_with_something_after_them": (
        "file not fully covered",
        _changed(lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + PICKLE)),
    ),
    "tensors_that_overlap": ("invalid offset for tensor", _header(json.dumps(OVERLAPPING).encode(), 1536)),
    "a_gap_to_hide_something_in": ("invalid offset for tensor", _header(_described(data_offsets=[512, 1536]), 1536)),
    "offsets_below_zero": ("invalid value: integer `-1024`", _header(_described(data_offsets=[-1024, 0]), 1024)),
    "offsets_that_run_backwards": ("invalid offset for tensor", _header(_described(data_offsets=[1024, 0]), 1024)),
    "a_shape_that_overflows": ("overflow computing buffer size", _header(_described(shape=[2**32, 2**32]), 1024)),
    "weights_that_are_whole_numbers": ("got I64", _header(_described(dtype="I64", shape=[2, 64]), 1024)),
    "one_tensor_described_twice": (
        "duplicate key",
        _header(b"{" + _described()[1:-1] + b"," + _described()[1:-1] + b"}", 1024),
    ),
    "a_header_nested_a_million_deep": (
        "recursion limit exceeded",
        _header(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", 0),
    ),
    "a_header_that_is_no_text": ("invalid UTF-8 in header", _header(b'{"\xff\xfe": 1}', 0)),
    "a_tensor_with_a_name_of_unicode": (
        r"q_pr\\u03bfj.*Not a LoRA weight",
        _header(_described().replace(b"q_proj", "q_prοj".encode()), 1024),
    ),
    "metadata_that_is_no_text": (
        "invalid type: map, expected a string",
        _header(b'{"__metadata__": {"format": {"torch": 1}}, ' + _described()[1:], 1024),
    ),
    "a_tensor_with_another_key": (THREE_KEYS, _header(_described(strides=[1, 4]), 1024)),
    "a_tensor_described_by_a_list": (
        THREE_KEYS,
        _header(json.dumps({A: ["F32", [4, 64], [0, 1024]]}).encode(), 1024),
    ),
    # The weights themselves
    "a_weight_that_is_not_a_number": (
        "1 of 256 weights are not finite",
        _weights(lambda w: w[A].__setitem__((0, 0), np.nan)),
    ),
    "a_weight_that_is_infinite": (
        "1 of 256 weights are not finite",
        _weights(lambda w: w[B].__setitem__((3, 1), -np.inf)),
    ),
    "a_weight_that_overflows_in_sixteen_bits": ("above float16's", _weights(_huge_weight)),
    "a_change_that_drowns_the_base": (
        r"times their norm \(limit 2\)",
        _weights(lambda w: w.__setitem__(B, 100 * w[B] + 1)),
    ),
    "a_scale_that_drowns_the_base": (r"times their norm \(limit 2\)", _config(lora_alpha=500_000)),
    "weights_for_another_width": (
        "The shape is 4 x 63; with this base and rank 4 it must be 4 x 64",
        _weights(lambda w: w.__setitem__(A, w[A][:, :63].copy())),
    ),
    "weights_of_another_rank_than_it_says": (
        "The shape is 4 x 64; with this base and rank 8 it must be 8 x 64",
        _config(r=8),
    ),
    "a_whole_output_layer_among_the_weights": (
        "Not a LoRA weight of this configuration and base",
        _weights(lambda w: w.__setitem__("base_model.model.lm_head.weight", np.zeros((259, 64), np.float32))),
    ),
    "weights_for_a_layer_that_is_not_there": (
        "Not a LoRA weight of this configuration and base",
        _weights(_shift_layer),
    ),
    "half_of_a_pair": ("The weight is missing, but the configuration requires it", _weights(lambda w: w.pop(B))),
}
"""By name: words of the reason (a regular expression), and the builder."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    return tiny_project(tmp_path_factory.mktemp("hostile") / "project", tiny_base_folder)


@pytest.fixture(autouse=True)
def _no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_keys(tmp_path, monkeypatch)


def test_adapter_that_the_corpus_changes_is_imported(project: Path, tmp_path: Path) -> None:
    ran = tunewright("adapters", "import", write_adapter(tmp_path / "good"), "--base-matches", "-p", project, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["new"]


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_adapter_is_refused_for_its_reason_and_leaves_nothing(name: str, project: Path, tmp_path: Path) -> None:
    words, build = CORPUS[name]
    source = build(tmp_path)
    before = tree(project)
    ran = tunewright("adapters", "import", source, "--base-matches", "-p", project, "--json")
    assert ran.code == 2
    error = ran.document["error"]
    assert re.search(words, f"{error['where']}: {error['what']}"), error
    assert tree(project) == before
    assert not Path("/tmp/tunewright-was-here").exists()
