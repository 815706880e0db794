"""Models with layers of another kind: towers for images, blocks of a matrix, names that PEFT does not find again."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_core.config.schema import LoraConfig
from lora_core.errors import ConfigError
from lora_core.memory.live_bytes import LiveBytes
from lora_core.model.base import add_adapter
from lora_core.model.starting_adapter import check_reload
from lora_core.model.targets import find_targets
from tests.families.build import tiny_model


def test_the_layers_of_towers_for_images_and_sound_are_not_the_decoders() -> None:
    assert find_targets(tiny_model("git", 64)).modules == ["query", "key", "value", "dense"]
    names = find_targets(tiny_model("phi4_multimodal", 64)).modules
    assert all(name == "qkv_proj" or name.startswith("model.layers.") for name in names)


def test_a_layer_whose_matrix_is_blocks_has_no_adapter() -> None:
    base = tiny_model("deepseek_v4", 64)
    assert hasattr(base.model.layers[0].self_attn, "o_a_proj")
    names = find_targets(base).modules
    assert "o_b_proj" in names
    assert not any("o_a_proj" in name for name in names)


def test_an_adapter_that_peft_would_not_load_whole_is_refused_before_it_is_trained() -> None:
    lora = LoraConfig(rank=2, target_modules="auto")
    with pytest.raises(ConfigError, match="it does not find down_proj, gate_proj, up_proj again") as raised:
        check_reload(add_adapter(tiny_model("laguna", 64), lora, seed=0))
    names = str(raised.value).partition("fix: lora.target_modules=[")[2].rstrip("]").split(",")
    assert sorted(names) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    check_reload(add_adapter(tiny_model("laguna", 64), lora.model_copy(update={"target_modules": names}), seed=0))


def test_parts_whose_sizes_are_values_are_even_where_there_are_none() -> None:
    with FakeTensorMode(), LiveBytes(vocab_size=7):
        rows = torch.empty(10, 3)
        unknown = [int(size) for size in torch.empty(4, dtype=torch.long)]
        assert [len(part) for part in rows.split(unknown)] == [3, 3, 2, 2]
        assert [len(part) for part in rows.split([4, 6])] == [4, 6]
        assert [part.shape[1] for part in rows.split([1, 2], dim=1)] == [1, 2]
