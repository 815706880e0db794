"""Settings of Python scripts: read and not run, constants only, alone or with the keyed file that they read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.configuration import load_config, read_translation
from lora_core.errors import ConfigError
from lora_core.other_tools.scripts import Unresolved, read_script
from lora_core.other_tools.translation import Translation

# The shape of many a quickstart: settings come from a YAML file keyed by model id, the rest is in the script.
QUICKSTART = """
import os, torch, yaml
from dataclasses import dataclass
raise SystemExit("this script was run")

@dataclass
class Arguments:
    batch: int
    rank: int = 4

def fine_tune(name, length, given):
    adapter = LoraConfig(r=given.lora_rank, lora_alpha=given.lora_alpha, target_modules=["q_proj", "v_proj"])
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    settings = SFTConfig(
        per_device_train_batch_size=given.per_device_train_batch_size,
        warmup_steps=100, learning_rate=2e-4, logging_steps=20, optim="paged_adamw_8bit",
        num_train_epochs=given.num_train_epochs, max_seq_length=length, output_dir=f"runs/{name}",
    )
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=bits, token=os.environ["HF_TOKEN"])
    SFTTrainer(model=model, args=settings, peft_config=adapter)

for name, given in yaml.safe_load(open("training_args.yaml")).items():
    fine_tune(name, 2 * 1024, given)
"""
KEYED = """
some/model:
  per_device_train_batch_size: 1
  num_train_epochs: 1
  lora_rank: 8
  lora_alpha: 16
  unread: 3
other/model:
  lora_rank: 2
  lora_alpha: 4
  per_device_train_batch_size: 2
  num_train_epochs: 2
"""
UNSLOTH = """
length = 4096
model, tokenizer = FastLanguageModel.from_pretrained(model_name="unsloth/some-model", max_seq_length=length)
model = FastLanguageModel.get_peft_model(model, r=32, use_gradient_checkpointing="unsloth", random_state=3407)
rows = load_dataset("json", data_files="chats.jsonl", split="train")
trainer = SFTTrainer(model=model, train_dataset=rows, max_seq_length=length, packing=False, args=TrainingArguments(
    max_steps=60, fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported(), optim="adamw_8bit"))
"""


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    (tmp_path / "demo.py").write_text(QUICKSTART)
    (tmp_path / "training_args.yaml").write_text(KEYED)
    return tmp_path


def translated(path: Path, model: str | None = None) -> Translation:
    translation = read_translation(path, model)
    assert translation is not None
    return translation


@pytest.mark.parametrize("name", ["demo.py", "training_args.yaml"])
def test_a_script_and_the_keyed_file_beside_it_are_one_run(quickstart: Path, name: str) -> None:
    config = load_config(quickstart / name, [], "some/model")
    assert (config.model.name_or_path, config.output_dir) == ("some/model", "outputs/model")
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (8, 16, ["q_proj", "v_proj"])
    assert (config.train.warmup_steps, config.train.learning_rate, config.train.logging_steps) == (100, 2e-4, 20)
    assert (config.model.quantization, config.data.max_seq_length) == ("nf4", 2048)
    said = str(translated(quickstart / name, "some/model"))
    assert "unread = 3: demo.py does not read it" in said
    assert "output_dir = \"f'runs/{name}'\": no constant of the script" in said


def test_the_model_is_asked_for_where_the_keyed_file_has_several(quickstart: Path) -> None:
    with pytest.raises(ConfigError, match=r"no --model was given.*\n.*--model some/model"):
        load_config(quickstart / "demo.py")
    with pytest.raises(ConfigError, match="--model third/model is not among them"):
        load_config(quickstart / "demo.py", [], "third/model")


def test_a_keyed_file_alone_says_what_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "training_args.yaml"
    path.write_text("some/model:\n  lora_rank: 8\n")
    said = str(translated(path))
    assert "alone, keyed by model id (1 model)" in said
    assert "by default of lora_core, as neither says: model.quantization=none, lora.alpha=32" in said
    assert "train.learning_rate=5e-05" in said


def test_of_two_scripts_beside_a_keyed_file_none_is_guessed(quickstart: Path) -> None:
    (quickstart / "second.py").write_text(QUICKSTART)
    said = str(translated(quickstart / "training_args.yaml", "some/model"))
    assert "2 scripts beside it could be meant (demo.py, second.py): --cfg SCRIPT takes one" in said


def test_unsloth_script_with_unsloths_defaults(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(UNSLOTH)
    config = load_config(path)
    assert (config.model.name_or_path, config.model.quantization) == ("unsloth/some-model", "nf4")
    assert (config.lora.rank, config.lora.alpha, len(config.lora.target_modules)) == (32, 16, 7)
    assert (config.data.train_file, config.data.max_seq_length) == ("chats.jsonl", 4096)
    assert (config.train.max_steps, config.train.bf16, config.train.seed) == (60, "auto", 3407)
    # transformers' defaults, as TrainingArguments and not SFTConfig is called
    assert (config.train.learning_rate, config.train.per_device_train_batch_size) == (5e-5, 8)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 3e-4\nSFTConfig(learning_rate=x)", 3e-4),
        ("def f(x=3e-4):\n  SFTConfig(learning_rate=x)", 3e-4),
        ("def f(x=1):\n  SFTConfig(learning_rate=x)\nf(3e-4)", 3e-4),
        ("def f(*, x):\n  SFTConfig(learning_rate=x)\nf(x=3e-4)", 3e-4),
        ("class A:\n  lr: float = field(default=3e-4)\nSFTConfig(learning_rate=a.lr)", 3e-4),
        ("p.add_argument('--lr', type=float, default=3e-4)\nSFTConfig(learning_rate=args.lr)", 3e-4),
        ("class C: pass\nc = C(lr=3e-4)\nSFTConfig(learning_rate=c.lr)", 3e-4),
        ("SFTConfig(learning_rate=3 * 1e-4)", 3 * 1e-4),
        ("SFTConfig(learning_rate=-1)", -1),
        # Not one constant: shown, and not guessed.
        ("x = 1\nx = 2\nSFTConfig(learning_rate=x)", Unresolved("x")),
        ("x = 1\nfor x in (2, 3):\n  SFTConfig(learning_rate=x)", Unresolved("x")),
        ("x = f()\nSFTConfig(learning_rate=x)", Unresolved("x")),
        ("SFTConfig(learning_rate=float(os.environ['LR']))", Unresolved("float(os.environ['LR'])")),
        ("x = x\nSFTConfig(learning_rate=x)", Unresolved("x")),
        ("x = y\ny = x\nSFTConfig(learning_rate=x)", Unresolved("x")),
    ],
)
def test_names_that_stand_for_one_constant(tmp_path: Path, code: str, expected: object) -> None:
    path = tmp_path / "train.py"
    path.write_text(code)
    assert read_script(path).settings["learning_rate"].value == expected


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print(1)", "no call of SFTConfig or TrainingArguments"),
        ("def (", "cannot be read as Python"),
        ("SFTConfig()\nSFTTrainer(model='a/b')", "no LoraConfig is in it"),
    ],
)
def test_scripts_that_cannot_be_taken(tmp_path: Path, code: str, reason: str) -> None:
    path = tmp_path / "train.py"
    path.write_text(code)
    with pytest.raises(ConfigError, match=reason):
        load_config(path)


def test_a_model_without_a_keyed_file_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(UNSLOTH)
    with pytest.raises(ConfigError, match="no file of settings keyed by model id beside it"):
        load_config(path, [], "a/b")


@given(
    st.lists(
        st.sampled_from(["x", "=", "(", ")", "\n", "SFTConfig", "learning_rate", ",", "1", ".", "def f", ":", " "])
    )
)
def test_no_text_is_more_than_a_mistake(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.py"
    path.write_text("".join(parts))
    with suppress(ConfigError):
        read_script(path)
