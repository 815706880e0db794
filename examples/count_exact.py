"""Exact replies before and after training: python examples/count_exact.py --cfg demo [--adapter DIR] [key=value ...]

The base model and the run's adapter answer the first question of each row of the eval set, greedily.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from lora_core.commands.command_line import Parser, add_config_arguments, heavy_imports, quiet_libraries, run_command
from lora_core.config.schema import RunConfig
from lora_core.configuration import load_config
from lora_core.errors import ConfigError


def count_exact(config: RunConfig, adapter_dir: str | Path) -> str:
    """Prints each row's reply as expected, before and after. Returns the counts, as a sentence.

    Raises:
        ConfigError: the configuration names no eval file, or the model cannot be loaded.
    """
    from lora_core.checkpoints.adapter_folder import load_adapter
    from lora_core.evaluation.replies import sample_reply
    from lora_core.model.base import load_tokenizer
    from lora_core.rows.messages import parse_json_row
    from lora_core.runtime.devices import build_accelerator, with_precision

    if config.data.eval_file is None:
        raise ConfigError("no eval set; fix: data.eval_file=PATH")
    config, _ = with_precision(config)
    accelerator = build_accelerator(config)
    tokenizer = load_tokenizer(config.model, config.data)
    model = load_adapter(config, adapter_dir, accelerator.device)
    with Path(config.data.eval_file).open(encoding="utf-8") as file:
        rows = [parse_json_row(line) for line in file if line.strip()]
    before = after = 0
    for row in rows:
        first = next(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
        asked = (tokenizer, row.messages[:first], row.tools, config.train.sample_max_new_tokens)
        expected = row.messages[first]["content"].strip()
        with accelerator.autocast():
            trained = sample_reply(model, *asked)
            with model.disable_adapter():
                untrained = sample_reply(model, *asked)
        before += untrained == expected
        after += trained == expected
        print(f"expected: {expected}\n  before: {untrained!r}\n   after: {trained!r}", flush=True)
    return f"exact replies: {before} of {len(rows)} before, {after} of {len(rows)} after"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--adapter", metavar="DIR", help="default: adapter/ in the run folder")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.cfg, arguments.overrides, arguments.model)
    with heavy_imports():
        quiet_libraries()
    print(count_exact(config, arguments.adapter or Path(config.output_dir).expanduser() / "adapter"))


if __name__ == "__main__":
    sys.exit(run_command(main))
