"""Eval loss of an adapter: accelerate launch launch/evaluate.py --cfg NAME [--adapter DIR] [key=value ...]"""

import json
import sys
from pathlib import Path

from lora_core.commands.command_line import config_parser, heavy_imports, quiet_libraries, run_command
from lora_core.config.load import load_config


def main() -> None:
    parser = config_parser(__doc__ or "")
    parser.add_argument("--adapter", metavar="DIR", help="default: adapter/ in the run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.cfg, arguments.overrides, arguments.model)
    with heavy_imports():
        quiet_libraries()
        from lora_core.training.evaluate import evaluate_adapter

    result = evaluate_adapter(config, arguments.adapter or Path(config.output_dir).expanduser() / "adapter")
    print(json.dumps(result.to_dict()) if arguments.json else result)


if __name__ == "__main__":
    sys.exit(run_command(main))
