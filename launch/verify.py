"""Do the contracts hold on my model and data? python launch/verify.py --cfg NAME [--json] [key=value ...]"""

import json
import sys

from lora_core.cli import config_parser, quiet_libraries, run_command
from lora_core.config import load_config


def main() -> None:
    parser = config_parser(__doc__ or "")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.cfg, arguments.overrides, arguments.model)
    quiet_libraries()
    from lora_core.verify import verify

    result = verify(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(result.to_dict()) if arguments.json else result)
    result.refuse_broken()


if __name__ == "__main__":
    sys.exit(run_command(main))
