"""Fine-tune: accelerate launch launch/train.py --cfg NAME [key=value ...]"""

import sys

from lora_core.cli import parse_config, quiet_libraries, run_command


def main() -> None:
    config = parse_config(__doc__ or "")
    quiet_libraries()
    from lora_core.train import train

    train(config)


if __name__ == "__main__":
    sys.exit(run_command(main))
