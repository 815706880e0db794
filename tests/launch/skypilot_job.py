"""SkyPilot takes its job file: `make clusters`, in an environment without lora_core, as both want another click."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import sky
import yaml
from sky.utils import schemas

JOBS = Path(__file__).resolve().parents[2] / "launch/jobs"


def test_skypilot_takes_the_job() -> None:
    job = yaml.safe_load((JOBS / "skypilot.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(job, schemas.get_task_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**job, "nmu_nodes": 2}, schemas.get_task_schema())
    # Names of GPUs and the bucket are asked of a catalogue and of a cloud, on the network.
    named = {"resources": {"use_spot": job["resources"]["use_spot"]}, "file_mounts": None}
    task = sky.Task.from_yaml_config({**job, **named})
    assert task.num_nodes == 2
    assert task.envs == job["envs"]
    assert [resources.use_spot for resources in task.resources] == [True]
    jsonschema.validate(job["resources"], schemas.get_resources_schema())
    jsonschema.validate(job["file_mounts"]["/runs"], schemas.get_storage_schema())
