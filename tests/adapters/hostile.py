"""Hostile adapters, each built by hand, and the reason for which it has to be refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from adapter_helpers import lora_config, lora_weights, write_adapter
from tunewright.adapters.registry import CONFIG, WEIGHTS

Build = Callable[[Path], Path]
"""Writes a hostile adapter below a folder, and returns the folder or archive to import."""

CORPUS: dict[str, tuple[Build, str]] = {}
"""By name: who builds it, and words of the reason (a regular expression)."""

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def hostile(words: str) -> Callable[[Build], Build]:
    """Put a builder into the corpus."""

    def add(build: Build) -> Build:
        CORPUS[build.__name__] = (build, words)
        return build

    return add


class _Payload:
    """A pickle that would write a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/tunewright-was-here",))


# Files that are none of an adapter's


@hostile("a pickle can run code")
def weights_as_a_pickle(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Payload()))
    return folder


@hostile("a pickle can run code")
def a_pickle_beside_good_weights(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "optimizer.pt").write_bytes(pickle.dumps(_Payload()))
    return folder


@hostile("its header claims .* bytes")
def a_pickle_that_is_called_safetensors(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).write_bytes(pickle.dumps(_Payload()) + bytes(64))
    return folder


@hostile("an adapter holds no code")
def code_beside_it(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "modeling_evil.py").write_text("import os")
    return folder


@hostile("an adapter has no such file")
def a_tokenizer_beside_it(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.py"}}')
    return folder


@hostile("weights are in one file")
def weights_in_shards(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "adapter_model-00002-of-00002.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    return folder


@hostile("an adapter has no such folder")
def a_folder_within(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    write_adapter(folder / "default")
    return folder


@hostile("not ASCII can pass for another")
def a_name_with_a_homoglyph(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "аdapter_config.json").write_text("{}")  # its first letter is Cyrillic
    return folder


@hostile("not ASCII can pass for another")
def a_name_written_from_right_to_left(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "README‮dm.nib").write_text("")
    return folder


@hostile("a name with control characters")
def a_name_that_moves_the_cursor(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "\x1b[2Jadapter_config.json").write_text("{}")
    return folder


@hostile("over 64 files and folders")
def a_folder_of_very_many_files(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    for number in range(100):
        (folder / f"adapter_config.json.{number}").touch()
    return folder


@hostile(f"no {WEIGHTS}: it is no adapter")
def no_weights(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).unlink()
    return folder


@hostile("came to over 1 MB")
def a_configuration_of_two_megabytes(at: Path) -> Path:
    return write_adapter(at / "evil", lora_config(base_model_name_or_path="x" * (2 << 20)))


# Links, devices, pipes


@hostile("a symbolic link, not a plain file")
def weights_that_are_a_link(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).rename(at / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(at / "elsewhere.safetensors")
    return folder


@hostile("a symbolic link, not a plain file")
def a_readme_that_leads_to_a_secret(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "README.md").symlink_to("/etc/passwd")
    return folder


@hostile("a symbolic link, not a plain file")
def checkpoints_that_lead_elsewhere(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    write_adapter(at / "elsewhere" / "step-1")
    (folder / "checkpoints").symlink_to(at / "elsewhere")
    return folder


@hostile("a hard link")
def weights_that_are_a_hard_link(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    os.link(folder / WEIGHTS, at / "the-other-name")
    return folder


@hostile("a pipe, not a plain file")
def weights_that_are_a_pipe(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    return folder


@hostile("neither a folder nor a plain file")
def an_archive_that_is_a_pipe(at: Path) -> Path:
    os.mkfifo(at / "evil.tar")
    return at / "evil.tar"


@hostile("neither a folder nor a plain file")
def an_archive_that_is_an_endless_device(at: Path) -> Path:
    return Path("/dev/zero")


@hostile("a socket, not a plain file")
def weights_that_are_a_socket(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).unlink()
    place = Path.cwd()
    os.chdir(folder)  # a socket's path may have 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(WEIGHTS)
    finally:
        os.chdir(place)
    return folder


# Archives


def _tar(at: Path, *members: tuple[tarfile.TarInfo, bytes], mode: Any = "w:gz") -> Path:
    folder = write_adapter(at / "good")
    path = at / "evil.tar.gz"
    with tarfile.open(path, mode) as tar:
        for name in (CONFIG, WEIGHTS):
            tar.add(folder / name, f"evil/{name}")
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@hostile(r"leads out of the folder \(\.\.\)")
def a_tar_that_climbs_out(at: Path) -> Path:
    return _tar(at, (_member("evil/../../../tmp/tunewright-was-here"), b"x"))


@hostile("an absolute path")
def a_tar_with_an_absolute_path(at: Path) -> Path:
    return _tar(at, (_member("/tmp/tunewright-was-here"), b"x"))


@hostile("a path of Windows")
def a_tar_with_a_path_of_windows(at: Path) -> Path:
    return _tar(at, (_member("evil\\..\\..\\tunewright-was-here"), b"x"))


@hostile("a path of Windows")
def a_tar_with_a_drive(at: Path) -> Path:
    return _tar(at, (_member("C:evil.txt"), b"x"))


@hostile("a symbolic link, not a plain file")
def a_tar_with_a_link_to_write_through(at: Path) -> Path:
    return _tar(at, (_member("evil/checkpoints", tarfile.SYMTYPE, "/tmp"), b""))


@hostile("a hard link, not a plain file")
def a_tar_with_a_hard_link(at: Path) -> Path:
    return _tar(at, (_member("evil/README.md", tarfile.LNKTYPE, "/etc/passwd"), b""))


@hostile("a device, not a plain file")
def a_tar_with_a_device(at: Path) -> Path:
    info = _member("evil/README.md", tarfile.CHRTYPE)
    info.devmajor, info.devminor = 1, 5
    return _tar(at, (info, b""))


@hostile("a pipe, not a plain file")
def a_tar_with_a_pipe(at: Path) -> Path:
    return _tar(at, (_member("evil/README.md", tarfile.FIFOTYPE), b""))


@hostile("a file with holes")
def a_tar_with_a_sparse_file(at: Path) -> Path:
    info = _member("evil/README.md")
    info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40), "GNU.sparse.numblocks": "1"}
    return _tar(at, (info, b"x"))


@hostile("it is there twice")
def a_tar_with_the_configuration_twice(at: Path) -> Path:
    return _tar(at, (_member(f"evil/{CONFIG}"), json.dumps(lora_config(use_dora=True)).encode()))


@hostile("over 64 files and folders")
def a_tar_of_very_many_members(at: Path) -> Path:
    return _tar(at, *((_member(f"evil/README.md/{number}", tarfile.DIRTYPE), b"") for number in range(10_000)))


@hostile("came to over 1 MB")
def a_tar_that_unpacks_to_a_thousand_times_its_size(at: Path) -> Path:
    return _tar(at, (_member("evil/README.md"), bytes(64 << 20)))


@hostile("a header claims to be larger than a megabyte")
def a_tar_whose_header_asks_for_all_memory(at: Path) -> Path:
    path = at / "evil.tar"
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 6 << 30
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20))
    return path


@hostile("archive that can be read")
def a_tar_that_is_cut_off(at: Path) -> Path:
    path = _tar(at)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


@hostile("archive that can be read")
def no_archive_at_all(at: Path) -> Path:
    (at / "evil.zip").write_bytes(b"not an archive" * 100)
    return at / "evil.zip"


@hostile("it is not in the folder 'evil/'")
def a_tar_with_files_beside_its_folder(at: Path) -> Path:
    return _tar(at, (_member("README.md"), b"x"))


def _zip(at: Path, *members: tuple[zipfile.ZipInfo, bytes]) -> Path:
    folder = write_adapter(at / "good")
    path = at / "evil.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name in (CONFIG, WEIGHTS):
            opened.write(folder / name, name)
        for info, content in members:
            opened.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


@hostile(r"leads out of the folder \(\.\.\)")
def a_zip_that_climbs_out(at: Path) -> Path:
    return _zip(at, (zipfile.ZipInfo("../../../../tmp/tunewright-was-here"), b"x"))


@hostile("an absolute path")
def a_zip_with_an_absolute_path(at: Path) -> Path:
    return _zip(at, (zipfile.ZipInfo("/tmp/tunewright-was-here"), b"x"))


@hostile("a symbolic link, not a plain file")
def a_zip_with_a_link(at: Path) -> Path:
    info = zipfile.ZipInfo("README.md")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return _zip(at, (info, b"/etc/passwd"))


@hostile("it is there twice")
def a_zip_with_the_weights_twice(at: Path) -> Path:
    return _zip(at, (zipfile.ZipInfo(WEIGHTS), b"other weights"))


@hostile("it is encrypted")
def a_zip_with_an_encrypted_member(at: Path) -> Path:
    path = _zip(at, (zipfile.ZipInfo("README.md"), b"x"))
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(magic) + offset] |= 1
    path.write_bytes(data)
    return path


@hostile("came to over 1 MB")
def a_zip_bomb(at: Path) -> Path:
    return _zip(at, (zipfile.ZipInfo("README.md"), bytes(64 << 20)))


@hostile("came to over 1 MB|archive that can be read")
def a_zip_bomb_that_lies_of_its_size(at: Path) -> Path:
    path = _zip(at, (zipfile.ZipInfo("README.md"), bytes(64 << 20)))
    data = bytearray(path.read_bytes())
    at_directory = data.rindex(b"PK\x01\x02")
    struct.pack_into("<L", data, at_directory + 24, 10)  # ten bytes, says the list of members
    path.write_bytes(data)
    return path


@hostile("over 64 files and folders")
def a_zip_of_very_many_members(at: Path) -> Path:
    return _zip(at, *((zipfile.ZipInfo(f"README.md/{number}/"), b"") for number in range(10_000)))


@hostile("cut off, or something follows")
def a_zip_with_another_zip_after_it(at: Path) -> Path:
    path = _zip(at)
    path.write_bytes(path.read_bytes() + b"\0" * 30)
    return path


@hostile("archive that can be read")
def a_zip_whose_bytes_are_not_what_it_says(at: Path) -> Path:
    path = _zip(at)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    return path


@hostile("no such file")
def a_zip_within_a_zip(at: Path) -> Path:
    inner = _zip(at).read_bytes()
    (at / "evil.zip").unlink()
    return _zip(at, (zipfile.ZipInfo("inner.zip"), inner))


# The header of the weights


def _header(at: Path, header: bytes, data: int, length: int | None = None) -> Path:
    """An adapter whose weights have this header, and so many bytes after it."""
    folder = write_adapter(at / "evil")
    claimed = len(header) if length is None else length
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", claimed) + header + bytes(data))
    return folder


def _described(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]} | changes
    return json.dumps({f"{Q0}.lora_A.weight": entry}).encode()


@hostile("its header claims 18,446,744,073,709,551,615 bytes")
def a_header_of_all_memory(at: Path) -> Path:
    return _header(at, b"{}", 0, length=2**64 - 1)


@hostile("its header claims 9,000,000 bytes, and 8,388,608 are the most")
def a_header_of_nine_megabytes(at: Path) -> Path:
    return _header(at, b"{" + b" " * 8_999_998 + b"}", 0)


@hostile("its header claims 5,000 bytes, and the file has")
def a_header_longer_than_the_file(at: Path) -> Path:
    return _header(at, b"{}", 100, length=5000)


@hostile("too short for safetensors")
def weights_of_three_bytes(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).write_bytes(b"abc")
    return folder


@hostile("its tensors have 7,168 bytes, and 7,068 follow the header")
def weights_that_are_cut_off(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    return folder


@hostile("its tensors have 7,168 bytes, and 7,2.. follow the header")
def weights_with_something_after_them(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + pickle.dumps(_Payload()))
    return folder


@hostile("overlaps the tensor before it")
def tensors_that_overlap(at: Path) -> Path:
    entry = {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]}
    other = {"dtype": "F32", "shape": [4, 64], "data_offsets": [512, 1536]}
    return _header(at, json.dumps({f"{Q0}.lora_A.weight": entry, f"{Q0}.lora_B.weight": other}).encode(), 1536)


@hostile("leaves a gap before it")
def a_gap_to_hide_something_in(at: Path) -> Path:
    return _header(at, _described(data_offsets=[512, 1536]), 1536)


@hostile("its data_offsets are not a beginning and an end")
def offsets_below_zero(at: Path) -> Path:
    return _header(at, _described(data_offsets=[-1024, 0]), 1024)


@hostile("its shape needs 1,024 bytes, and its data_offsets give")
def offsets_that_run_backwards(at: Path) -> Path:
    return _header(at, _described(data_offsets=[1024, 0]), 1024)


@hostile("its shape needs 73,786,976,294,838,206,464 bytes")
def a_shape_that_overflows(at: Path) -> Path:
    return _header(at, _described(shape=[2**32, 2**32]), 1024)


@hostile("dtype 'I64'")
def weights_that_are_whole_numbers(at: Path) -> Path:
    return _header(at, _described(dtype="I64", shape=[2, 64]), 1024)


@hostile("the key .* is there twice")
def one_tensor_described_twice(at: Path) -> Path:
    entry = _described()[1:-1]
    return _header(at, b"{" + entry + b"," + entry + b"}", 1024)


@hostile("nested over 32 deep")
def a_header_nested_a_million_deep(at: Path) -> Path:
    return _header(at, b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", 0)


@hostile("not UTF-8")
def a_header_that_is_no_text(at: Path) -> Path:
    return _header(at, b'{"\xff\xfe": 1}', 0)


@hostile("no name of a weight")
def a_tensor_with_a_name_of_unicode(at: Path) -> Path:
    return _header(at, _described().replace(b"q_proj", "q_prοj".encode()), 1024)


@hostile("__metadata__ is not a map of texts")
def metadata_that_is_no_text(at: Path) -> Path:
    return _header(at, b'{"__metadata__": {"format": {"torch": 1}}, ' + _described()[1:], 1024)


@hostile("it is not described by dtype, shape and data_offsets")
def a_tensor_with_another_key(at: Path) -> Path:
    return _header(at, _described(strides=[1, 4]), 1024)


# The weights themselves


def _weights(at: Path, change: Callable[[dict[str, Any]], None], **config: Any) -> Path:
    weights = lora_weights()
    change(weights)
    return write_adapter(at / "evil", lora_config(**config), weights)


@hostile("1 of its 256 weights are no finite numbers")
def a_weight_that_is_not_a_number(at: Path) -> Path:
    return _weights(at, lambda w: w[f"{Q0}.lora_A.weight"].__setitem__((0, 0), np.nan))


@hostile("1 of its 256 weights are no finite numbers")
def a_weight_that_is_infinite(at: Path) -> Path:
    return _weights(at, lambda w: w[f"{Q0}.lora_B.weight"].__setitem__((3, 1), -np.inf))


@hostile("more than float16 can hold")
def a_weight_that_overflows_in_sixteen_bits(at: Path) -> Path:
    def change(weights: dict[str, Any]) -> None:
        weights[f"{Q0}.lora_A.weight"][:] = 0
        weights[f"{Q0}.lora_A.weight"][0, 0] = 1e30

    return _weights(at, change)


@hostile("times their norm; the most is 2")
def a_change_that_drowns_the_base(at: Path) -> Path:
    return _weights(at, lambda w: w.__setitem__(f"{Q0}.lora_B.weight", 100 * w[f"{Q0}.lora_B.weight"] + 1))


@hostile("times their norm; the most is 2")
def a_scale_that_drowns_the_base(at: Path) -> Path:
    return write_adapter(at / "evil", lora_config(lora_alpha=500_000))


@hostile("its shape is 4 x 63; with this base and rank 4 it is 4 x 64")
def weights_for_another_width(at: Path) -> Path:
    return _weights(at, lambda w: w.__setitem__(f"{Q0}.lora_A.weight", w[f"{Q0}.lora_A.weight"][:, :63].copy()))


@hostile("its shape is 4 x 64; with this base and rank 8 it is 8 x 64")
def weights_of_another_rank_than_it_says(at: Path) -> Path:
    return write_adapter(at / "evil", lora_config(r=8))


@hostile("a rank from 1 to 512")
def a_rank_over_the_cap(at: Path) -> Path:
    return write_adapter(at / "evil", lora_config(r=513))


@hostile("no LoRA weight that its configuration and the base call for")
def a_whole_output_layer_among_the_weights(at: Path) -> Path:
    return _weights(at, lambda w: w.__setitem__("base_model.model.lm_head.weight", np.zeros((259, 64), np.float32)))


@hostile("no LoRA weight that its configuration and the base call for")
def weights_for_a_layer_that_is_not_there(at: Path) -> Path:
    def change(weights: dict[str, Any]) -> None:
        for half in "AB":
            name = f"{Q0}.lora_{half}.weight"
            weights[name.replace("layers.0", "layers.7")] = weights[name]

    return _weights(at, change)


@hostile("it is missing, and its configuration calls for it")
def half_of_a_pair(at: Path) -> Path:
    return _weights(at, lambda w: w.pop(f"{Q0}.lora_B.weight"))


@hostile("it has earlier checkpoints, and no lineage.json")
def a_checkpoint_of_a_training_that_nobody_knows(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    write_adapter(folder / "checkpoints" / "step-1")
    return folder


# The configuration


def _config(at: Path, **changes: Any) -> Path:
    return write_adapter(at / "evil", lora_config(**changes))


def _raw_config(at: Path, text: bytes) -> Path:
    folder = write_adapter(at / "evil")
    (folder / CONFIG).write_bytes(text)
    return folder


@hostile("auto_mapping: it names a class to import")
def a_configuration_that_imports_a_class(at: Path) -> Path:
    return _config(at, auto_mapping={"base_model_class": "Evil", "parent_library": "os"})


@hostile("megatron_core: it names a module to import")
def a_configuration_that_imports_a_module(at: Path) -> Path:
    return _config(at, megatron_core="antigravity")


@hostile("megatron_config: it is for layers of Megatron")
def a_configuration_for_megatron(at: Path) -> Path:
    return _config(at, megatron_config={"tensor_model_parallel_size": 1})


@hostile("layer_replication: it replicates layers")
def a_configuration_that_replicates_layers(at: Path) -> Path:
    return _config(at, layer_replication=[[0, 100_000]])


@hostile("use_dora: it is DoRA")
def a_configuration_of_dora(at: Path) -> Path:
    return _config(at, use_dora=True)


@hostile("bias: it brings trained biases")
def a_configuration_with_biases(at: Path) -> Path:
    return _config(at, bias="all")


@hostile("modules_to_save: it brings whole layers")
def a_configuration_with_whole_layers(at: Path) -> Path:
    return _config(at, modules_to_save=["lm_head"])


@hostile("trainable_token_indices: it brings embeddings")
def a_configuration_with_tokens_of_its_own(at: Path) -> Path:
    return _config(at, trainable_token_indices=[1, 2])


@hostile("target_modules: it has to be a list of linear layers")
def a_regular_expression_that_never_ends(at: Path) -> Path:
    return _config(at, target_modules="(a+)+$")


@hostile("target_modules: it has to be a list of linear layers")
def a_target_that_no_llama_has(at: Path) -> Path:
    return _config(at, target_modules=["q_proj", "embed_tokens"])


@hostile("rank_pattern: it has to be names of linear layers")
def a_pattern_of_ranks_that_never_ends(at: Path) -> Path:
    return _config(at, rank_pattern={"(.*)*q_proj": 4})


@hostile("'trust_remote_code' is no key that is let in")
def a_key_that_asks_for_trust(at: Path) -> Path:
    return _config(at, trust_remote_code=True)


@hostile("peft_type: it has to be LORA")
def another_kind_of_adapter(at: Path) -> Path:
    return _config(at, peft_type="PREFIX_TUNING")


@hostile("init_lora_weights: it has to be true, false or gaussian")
def a_start_that_changes_the_base(at: Path) -> Path:
    return _config(at, init_lora_weights="pissa")


@hostile("layers_to_transform: layer 99")
def a_layer_that_the_base_does_not_have(at: Path) -> Path:
    return _config(at, layers_to_transform=[0, 99])


@hostile("the key 'r' is there twice")
def a_key_given_twice(at: Path) -> Path:
    return _raw_config(at, json.dumps(lora_config())[:-1].encode() + b', "r": 512}')


@hostile("NaN is no number of JSON")
def a_number_that_json_does_not_have(at: Path) -> Path:
    return _raw_config(at, json.dumps(lora_config(lora_alpha=float("nan"))).encode())


@hostile("nested over 32 deep")
def a_configuration_nested_too_deep(at: Path) -> Path:
    return _raw_config(at, b'{"r":' * 100_000 + b"1" + b"}" * 100_000)


@hostile("a JSON object is expected")
def a_configuration_that_is_a_list(at: Path) -> Path:
    return _raw_config(at, b"[]")


@hostile("not JSON that can be trusted")
def a_number_of_a_million_digits(at: Path) -> Path:
    return _raw_config(at, b'{"r": ' + b"9" * 1_000_000 + b"}")


@hostile("lora_alpha: ")
def true_where_a_number_is_wanted(at: Path) -> Path:
    return _config(at, lora_alpha=True)
