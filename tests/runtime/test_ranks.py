"""What ranks tell each other; three processes stand for a machine of two ranks and one of one rank."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import pytest
import torch

from lora_core.errors import ConfigError
from lora_core.runtime import ranks
from tests.forked import on_ranks, python

RANK = """
import json, os, sys, time
import torch
from lora_core.errors import ConfigError
from lora_core.runtime.ranks import *

torch.distributed.init_process_group("gloo")
rank, folder = int(os.environ["RANK"]), sys.argv[1]
seen = {"sum": sum_over_ranks(torch.tensor([rank, 0.5], dtype=torch.float64)).tolist()}
seen["greatest"] = greatest_of_ranks(10 - rank)
seen["all"] = gather_from_ranks(f"rank {rank}")
seen["from_first"] = from_first_rank(lambda: {"rank": rank})

def refuse():
    raise ConfigError(f"rank {rank} has no such file; fix: x")

try:
    from_first_rank(refuse)
except ConfigError as error:
    seen["refused"] = str(error)

made = os.path.join(folder, f"made-on-machine-{rank - int(os.environ['LOCAL_RANK'])}")
with first_on_each_machine():
    if os.environ["LOCAL_RANK"] == "0":
        time.sleep(0.5)
        open(made, "x").close()
    seen["found"] = os.path.exists(made)
seen["machines"] = sorted(name for name in os.listdir(folder) if name.startswith("made"))
try:
    with first_on_each_machine():  # a mistake that one machine has keeps nobody waiting
        if rank == 2:
            raise ConfigError("only here; fix: x")
except ConfigError as error:
    seen["alone"] = str(error)
meet()
with open(os.path.join(folder, f"seen-{rank}.json"), "w") as file:
    json.dump(seen, file)
leave()
assert not torch.distributed.is_initialized()
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    done = on_ranks(3, "-c", RANK, str(folder), local_ranks=(0, 1, 0))
    assert [rank.returncode for rank in done] == [0, 0, 0], [rank.stderr for rank in done]
    return [json.loads((folder / f"seen-{rank}.json").read_text(encoding="utf-8")) for rank in range(3)]


def test_sums_greatest_and_all_values_reach_every_rank(seen: list[dict[str, Any]]) -> None:
    for each in seen:
        assert each["sum"] == [3.0, 1.5]
        assert each["greatest"] == 10
        assert each["all"] == ["rank 0", "rank 1", "rank 2"]


def test_what_rank_0_finds_or_refuses_reaches_every_rank(seen: list[dict[str, Any]]) -> None:
    for each in seen:
        assert each["from_first"] == {"rank": 0}
        assert each["refused"] == "rank 0 has no such file; fix: x"


def test_each_machine_works_once_and_all_leave_together(seen: list[dict[str, Any]]) -> None:
    for each in seen:
        assert each["found"]
        assert each["machines"] == ["made-on-machine-0", "made-on-machine-2"]


def test_a_mistake_that_one_machine_has_is_raised_there_and_the_others_go_on(seen: list[dict[str, Any]]) -> None:
    assert [each.get("alone") for each in seen] == [None, None, "only here; fix: x"]


@pytest.mark.parametrize(
    ("environment", "has_gpu", "expected"),
    [
        ({"LOCAL_RANK": "0"}, True, "cuda:nccl,cpu:gloo"),
        ({"LOCAL_RANK": "0"}, False, None),
        ({}, True, None),
        ({"LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}, True, None),
    ],
)
def test_ranks_on_gpus_have_a_backend_for_cpu_tensors_too(
    environment: dict[str, str], has_gpu: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    assert ranks.backend() == expected


def test_what_ranks_tell_each_other_goes_over_that_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for config, device in (("cuda:nccl,cpu:gloo", "cpu"), ("cpu:gloo,cuda:gloo", "cpu"), ("cuda:nccl", "cuda")):
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda config=config: config)
        assert ranks._exchange_device().type == device


def test_a_run_of_one_rank_asks_nobody() -> None:
    value = torch.ones(2)
    assert ranks.sum_over_ranks(value).tolist() == [1, 1]
    assert ranks.greatest_of_ranks(3) == 3
    assert ranks.gather_from_ranks("x") == ["x"]
    assert ranks.from_first_rank(lambda: 4) == 4

    def refuse() -> None:
        raise ConfigError("no; fix: x")

    with pytest.raises(ConfigError, match="no; fix: x"):
        ranks.from_first_rank(refuse)
    with ranks.first_on_each_machine():
        ranks.meet()


LOST = textwrap.dedent("""
    import multiprocessing, os, signal, sys, traceback
    from contextlib import suppress
    from datetime import timedelta
    from accelerate.state import PartialState
    from lora_core.errors import RankFault
    from lora_core.runtime import faults
    from lora_core.runtime.faults import naming_lost_ranks
    from lora_core.runtime.ranks import first_on_each_machine, meet
    from tests.equivalence.forked_ranks import free_port

    SECONDS, faults._SECONDS_TO_ANSWER = 6, 2.0

    def rank_main(rank, port, doomed, fault, pipe):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        PartialState(cpu=True, backend="gloo", timeout=timedelta(seconds=SECONDS))
        meet()  # a rank that stops while another one is still in torch's own start leaves it there
        try:
            with naming_lost_ranks(SECONDS, "--resume"), first_on_each_machine():
                if rank == doomed:
                    os.kill(os.getpid(), fault)
        except RankFault as error:
            pipe.send(str(error))

    forks = multiprocessing.get_context("fork")
    cases = [(0, signal.SIGSTOP), (0, signal.SIGKILL), (1, signal.SIGSTOP)]
    waiting = []
    for doomed, fault in cases:
        read, written = forks.Pipe(duplex=False)
        port = free_port()
        arguments = [(rank, port, doomed, fault, written) for rank in range(2)]
        ranks = [forks.Process(target=rank_main, args=each, daemon=True) for each in arguments]
        for rank in ranks:
            rank.start()
        waiting.append((read, ranks[1 - doomed], ranks[doomed]))
    try:
        for read, left, _ in waiting:
            print(read.recv() if read.poll(60) else "waits for ever", flush=True)
            left.join(20)
            print("ended" if left.exitcode == 0 else f"did not end: {left.exitcode}", flush=True)
    finally:  # a stopped one would be waited for at the end
        for _, *ranks in waiting:
            for rank in ranks:
                rank.kill()
""")


def test_a_rank_that_is_lost_while_the_others_wait_for_its_turn_is_named() -> None:
    """Killed or stopped, rank 0 too, with which the store ends or hangs that they ask."""
    done = python("-c", LOST)
    lines = done.stdout.splitlines()
    assert lines[1::2] == ["ended"] * 3, done.stdout + done.stderr
    for lost, line in zip((0, 0, 1), lines[::2], strict=True):
        assert line.startswith(f"rank {lost} of 2 died or did not answer within 6 s (train.rank_timeout_s), so rank")
        assert line.endswith("; fix: read the lost rank's output above, then --resume")


ALONE = textwrap.dedent("""
    import json, multiprocessing, os, sys
    import torch.distributed as dist
    from lora_core.runtime import ranks
    from tests.equivalence.forked_ranks import free_port

    ranks._SECONDS_TO_SPEAK = 2.0

    def rank_main(rank, port, pipe):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo")
        before = rank == 2 and ranks.is_alone_with("only here")  # rank 0 has found nothing yet
        ranks.meet()
        same = ranks.is_alone_with("the same")
        ranks.meet()
        pipe.send((rank, before, same, rank == 1 and ranks.is_alone_with("another one")))
        ranks.meet()

    forks = multiprocessing.get_context("fork")
    read, written = forks.Pipe(duplex=False)
    port = free_port()
    processes = [forks.Process(target=rank_main, args=(rank, port, written), daemon=True) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    print(json.dumps(sorted(read.recv() for _ in range(3) if read.poll(5))))
""")


def test_a_mistake_that_the_first_rank_does_not_find_is_known_to_be_of_one_rank() -> None:
    done = python("-c", ALONE)
    seen = [[0, False, False, False], [1, False, False, True], [2, True, False, False]]
    assert json.loads(done.stdout) == seen, done.stderr
