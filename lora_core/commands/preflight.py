"""`lora-core preflight`: would a run learn, and would it run? Loads no weights."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace

from lora_core.commands.command_line import (
    Command,
    add_config_arguments,
    add_machine_arguments,
    check_machine,
    heavy_imports,
    load_config_of,
    new_file,
    quiet_libraries,
)
from lora_core.configuration import read_translation
from lora_core.errors import ConfigError, LoraCoreError, counted


def _add_arguments(parser: ArgumentParser) -> None:
    add_config_arguments(parser, None, "--from")
    add_machine_arguments(parser)
    # Started by a launcher, it is about that launch.
    launched = os.environ.get("WORLD_SIZE", "")
    parser.set_defaults(num_processes=int(launched) if launched.isdigit() else 1)
    parser.add_argument("--num-machines", type=int, default=1, metavar="M", help="machines that these devices are in")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--write", metavar="FILE.yaml", help="write the configuration with the fixes; a file that exists is refused"
    )


def _run(arguments: Namespace) -> None:
    if os.environ.get("RANK", "0") != "0":  # of a launcher: the first one says it
        return
    check_machine(arguments)
    processes, machines = arguments.num_processes, arguments.num_machines
    if machines < 1:
        raise ConfigError(f"--num-machines {machines}: must be at least 1; fix: --num-machines 1")
    if processes % machines != 0:
        raise ConfigError(
            f"--num-machines {machines}: {counted(processes, 'process', 'processes')} cannot be spread evenly over so "
            f"many; fix: --num-processes {machines * max(1, round(processes / machines))} (of all machines together), "
            "or --num-machines 1"
        )
    target = new_file("--write", arguments.write)
    run = (arguments.num_processes, arguments.gpu_memory_gib, arguments.num_machines)
    with heavy_imports():
        quiet_libraries()
        from lora_core.preflight.preflight import (
            apply_fixes,
            describe,
            finding_of,
            look_at_run,
            refuse_errors,
            refused_errors,
            report,
            run_checks,
        )
        from lora_core.preflight.ranks import plan_ranks
        from lora_core.runtime.run_folder import write_text
        from lora_core.untrusted.text import showable, values_without_secrets

    try:
        config = load_config_of(arguments, quiet=arguments.json)
        facts = look_at_run(config, *run)
        findings = run_checks(facts)
        of_model = ["--model", arguments.model] if arguments.model else []
        words = ["--cfg", arguments.cfg, *of_model, *arguments.overrides]
        ranks = plan_ranks(facts, words) if arguments.num_processes > 1 else None
    except LoraCoreError as error:
        if arguments.json:
            nothing = dict.fromkeys(("plan", "data", "memory", "ranks"))
            print(json.dumps({**nothing, "findings": [finding_of(error).to_dict()]}))
        raise
    if arguments.json:
        translation = read_translation(arguments.cfg, arguments.model)
        translated = {} if translation is None else {"translation": translation.to_dict()}
        ranks_as_json = {"ranks": None if ranks is None else ranks.to_dict()}
        print(json.dumps(values_without_secrets({**translated, **report(facts, findings), **ranks_as_json})))
    else:
        # Refused errors are printed below, as the reason not to start.
        refused = refused_errors(findings, config.preflight.allow)
        lines = [str(finding) for finding in findings if finding not in refused] if findings else ["nothing found"]
        of_ranks = [] if ranks is None else [str(ranks)]
        print(showable("\n".join([describe(facts), *of_ranks, *lines])))
    if target is not None:
        fixed, applied = apply_fixes(arguments.cfg, arguments.overrides, arguments.model, *run)
        write_text(target, fixed.to_yaml())
        written = f"wrote {target}: {' '.join(applied) or 'no fix to apply'}"
        print(showable(written), file=sys.stderr if arguments.json else sys.stdout)
    refuse_errors(findings, config.preflight.allow)


COMMAND = Command("would it learn? checks a run without its weights", _add_arguments, _run)
