"""Would it learn? Checks a run without its weights: python launch/preflight.py --cfg NAME [key=value ...]"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from lora_core.cli import config_parser, quiet_libraries, run_command
from lora_core.config import load_config


def main() -> None:
    parser = config_parser(__doc__ or "")
    parser.add_argument("--num-processes", type=int, default=1, metavar="N", help="devices of the run to plan for")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--write", metavar="FILE.yaml", help="write the configuration with the fixes applied")
    arguments = parser.parse_intermixed_args()
    if arguments.num_processes < 1:
        parser.error(f"--num-processes {arguments.num_processes}: must be at least 1")
    config = load_config(arguments.cfg, arguments.overrides, arguments.model)
    quiet_libraries()
    from lora_core.preflight import apply_fixes, describe_processes, gather_facts, refuse_errors, run_checks
    from lora_core.run_folder import write_text

    facts = gather_facts(config, arguments.num_processes)
    findings = run_checks(facts)
    if arguments.json:
        data = {"train": facts.train_data.counts.to_dict()}
        data["eval"] = facts.eval_data.counts.to_dict() if facts.eval_data else {}
        print(json.dumps({"plan": asdict(facts.plan), "data": data, "findings": [f.to_dict() for f in findings]}))
    else:
        print(f"train: {config.data.train_file}: {facts.train_data.counts}\n{describe_processes(facts)}")
        print("\n".join(map(str, findings)) or "nothing found")
    if arguments.write:
        fixed = apply_fixes(arguments.cfg, arguments.overrides, arguments.model, arguments.num_processes)
        write_text(Path(arguments.write), fixed.to_yaml())
    refuse_errors(findings, config.preflight.allow)


if __name__ == "__main__":
    sys.exit(run_command(main))
