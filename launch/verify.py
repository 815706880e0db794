"""Checks lora_core on your own model and rows: python launch/verify.py --cfg NAME [--json] [key=value ...]"""

import json
import sys

from lora_core.commands.command_line import config_parser, heavy_imports, quiet_libraries, run_command
from lora_core.config.load import load_config
from lora_core.errors import LoraCoreError


def main() -> None:
    parser = config_parser(__doc__ or "")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_intermixed_args()
    with heavy_imports():
        quiet_libraries()
        from lora_core.verification.contracts import verify

    try:
        config = load_config(arguments.cfg, arguments.overrides, arguments.model)
        result = verify(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    except LoraCoreError as error:
        if arguments.json:
            print(json.dumps({"settings": [], "checks": [], "passed": None, "error": str(error)}))
        raise
    print(json.dumps({**result.to_dict(), "error": None}) if arguments.json else result)
    result.refuse_failed()


if __name__ == "__main__":
    sys.exit(run_command(main))
