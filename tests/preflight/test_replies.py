"""An adapter against the loss tokens that it should hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from lora_core.configuration import load_config
from lora_core.preflight.findings import Facts
from lora_core.preflight.replies import check_capacity


@pytest.mark.parametrize(("loss_tokens", "rank"), [(2_000, None), (2_001, 32), (8_001, 128)])
def test_more_than_two_loss_tokens_for_a_parameter_name_the_rank_that_has_room(
    loss_tokens: int, rank: int | None
) -> None:
    seen = SimpleNamespace(
        config=load_config("base"),  # rank 16
        memory=SimpleNamespace(adapter_file_bytes=4 * 1_000),
        train_data=SimpleNamespace(num_supervised=loss_tokens),
    )
    found = list(check_capacity(cast(Facts, seen)))
    assert [finding.severity for finding in found] == ([] if rank is None else ["note"])
    assert all(f"rank {rank} has room for all" in finding.message for finding in found)
