"""Fine-tune: accelerate launch launch/train.py --cfg NAME [--resume [CHECKPOINT]] [key=value ...]"""

import sys
from pathlib import Path

from lora_core.commands.command_line import config_parser, heavy_imports, quiet_libraries, run_command
from lora_core.config.load import load_config


def main() -> None:
    parser = config_parser(__doc__ or "")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="CHECKPOINT",
        help="resume the run in output_dir, from its newest whole checkpoint or from the named one",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.resume and "=" in arguments.resume and not Path(arguments.resume).exists():
        parser.error(f"--resume took {arguments.resume} for a checkpoint; fix: put --resume at the end")
    config = load_config(arguments.cfg, arguments.overrides, arguments.model)
    with heavy_imports():
        quiet_libraries()
        from lora_core.training.setup import train

    train(config, arguments.resume)


if __name__ == "__main__":
    sys.exit(run_command(main))
