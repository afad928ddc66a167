"""The configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapter_helpers import lora_config, write_adapter
from hostile.corpus import hostile
from tunewright.adapters.registry import CONFIG


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
