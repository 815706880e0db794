"""docs/families.md: the sweep over every family, as a table, by `make families`.

For some, without the page: python -m tests.families.table NAME ...
With their rows of the page replaced: python -m tests.families.table --replace NAME ...
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import peft
import torch
import transformers

from lora_core.model.targets import Targets
from tests.families.build import families
from tests.families.sweep import outcomes
from tests.tiny import ROOT

HEADER = """# Families

Every causal language model that transformers `{transformers}` holds, and every model of text with images or sound,
built with small layers (two, or one of each kind that it has by default) and random weights from the family's own
config class, then planned, trained and saved as a run would, in float32 on a CPU (PEFT `{peft}`,
torch `{torch}`). A family trains if loss and adapter gradients, packed and padded, are those of plain transformers and
PEFT on one row at a time, with the saved adapter loaded by PEFT, to one part in 100,000. No weights of any published
model were used. Written by `make families`, or in part by `python -m tests.families.table --replace NAME`.

- **packed**: examples are packed, and padded when asked for.
- **padded**: its examples cannot be packed; `data.packing: auto` pads them, and preflight says why.
- **not**: it does not train; the sentence is what a run says.
- **not built**: it could not be made small from its config class alone, so nothing is said about it.

`lora.target_modules: auto` is all linear layers in the decoder's layers and its fused experts, without routers. A run
prints how many of each name have an adapter. In families whose experts transformers stacks (DeepSeek's, GLM's and their
kin), PEFT takes `gate_proj`, `up_proj` and `down_proj` for the experts': dense layers and shared experts of these names
are reached as parameters (`shared_experts.up_proj.weight`), but not in 4 or 8 bits. DBRX's experts are not reached
either: preflight names what is not (`without_adapter`). PEFT has neither dropout nor DoRA for parameters, as fused
experts are: the other layers keep `lora.dropout`, and DoRA on them is refused. What is trained is the loss of tokens
alone, without a router's own loss: preflight says so where the model's config asks for it.

Checkpoints that also see or hear (`...ForConditionalGeneration`) are built whole, with their towers, and loaded without
them: text passes none. The adapter has the names of the whole checkpoint, its `exclude_modules` keep adapters out of
the towers, and PEFT loads it on the whole checkpoint (`AutoPeftModelForCausalLM` too), where it gives the same logits
on text. `verify`, `chat` and `evaluate` work as with any run, and `merge` writes the whole checkpoint
([how](export.md#merge)). A chat row with an image is refused.

Whole runs of a family (trained, resumed from a checkpoint to the same bits, asked for replies with and without a
cache, measured again): `python -m tests.families.runs NAME`.

In other precisions (`python -m tests.families.precision NAME`), loss and gradients of one row at a time are held
against plain transformers and PEFT on the same weights. Of 237 families with two layers, NF4 agrees to one part in
100,000 in 233 and int8 in 233; the others take a layer's weight as a matrix or change it in place, and are refused in a
sentence: under NF4 `gemma3n_text`, `longcat_flash`, `mamba` and `rwkv`, under int8 `dots3_note_text`, `gemma3n_text`,
`hy_v4` and `mamba`. In bfloat16, 234 are within twice what plain eager attention and plain SDPA differ from each other,
or plain bfloat16 from float32; `ctrl`, `deepseek_v2` and `qwen2_moe` are beyond it (0.025 for 0.022, 0.059 for 0.026,
0.018 for 0.017), two of them with routers that choose by rounded numbers ([figures](claims.md#precision)).
"""


def line_of(row: dict[str, Any]) -> str:
    targets = Targets(*(row.get("targets") or ([], [])))
    left = {name.rsplit(".", 1)[-1] for name in row.get("without", ())}
    last_parts = dict.fromkeys(name.rsplit(".", 1)[-1] for name in targets.modules)
    parts = [*(part for part in last_parts if part not in left), *targets.in_short()]
    why = str(row["why"]).translate({ord(mark): " " for mark in "|<>`\n"})
    why = f"`{why}`" if row["trains"].startswith("not") and why else why
    names = ", ".join(f"`{part}`" for part in parts)
    family = f"`{row['family']}`" if "." in row["family"] else row["family"]  # a version is no figure
    return f"| {family} | {row.get('class', '')} | {row['trains']} | {names} | {why} |"


def page(header: str, lines: Iterable[str]) -> str:
    """The whole page: families in order of their names."""
    lines = sorted(lines, key=lambda line: line.split(" | ")[0])
    counts = Counter(line.split(" | ")[2] for line in lines)
    return "\n".join(
        [
            header.rstrip(),
            "",
            "In all: " + ", ".join(f"{counts[kind]} {kind}" for kind in ("packed", "padded", "not", "not built")) + ".",
            "",
            "| family | class | trains | adapter on | why |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main(arguments: list[str]) -> None:
    replaces = arguments[:1] == ["--replace"]
    names = arguments[replaces:]
    lines = {}
    for row in outcomes(names or families()):
        print(json.dumps(row), flush=True)
        lines[str(row["family"])] = line_of(row)
    file = ROOT / "docs" / "families.md"
    if not names:
        versions = {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}
        file.write_text(page(HEADER.format(**versions), lines.values()), encoding="utf-8")
    elif replaces:
        header, _, table = file.read_text(encoding="utf-8").partition("In all: ")
        before = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()[4:]}
        file.write_text(page(header, (before | lines).values()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
