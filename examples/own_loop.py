"""The whole training as a flat script, to read or to copy: rows -> plan -> model -> steps -> adapter.

    python examples/own_loop.py
    python examples/own_loop.py --model Qwen/Qwen2.5-0.5B-Instruct --rows chats.jsonl --eval-rows "" --epochs 3

With its defaults it is `configs/demo.yaml`, and its losses and adapter are those of `lora_core.train`, bit for bit
(tests/examples/test_own_loop.py). `train` adds what a run needs around these steps: preflight, checkpoints and resume,
sample replies, metrics, a report. Several devices: `torchrun --nproc_per_node 2 examples/own_loop.py`.
"""

import argparse
from functools import partial

from lora_core import (
    Batching,
    CausalLMLoss,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    add_adapter,
    build_optimizer,
    build_scheduler,
    encode_file,
    evaluate,
    load_base_model,
    load_tokenizer,
    plan_schedule,
    train_step,
)
from lora_core.data.encoded import pad_id
from lora_core.data.packing import step_rows
from lora_core.runtime.devices import build_accelerator, seed_everything, with_precision

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="~/.cache/lora_core/models/SmolLM2-135M-Instruct", help="hub id or folder")
parser.add_argument("--rows", default="examples/train.jsonl", help="chat JSONL to train on")
parser.add_argument("--eval-rows", default="examples/eval.jsonl", help='the eval set; "" for none')
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--learning-rate", type=float, default=5e-4)
parser.add_argument("--rank", type=int, default=16, help="of the adapter; alpha is twice that")
parser.add_argument("--max-seq-length", type=int, default=1024, help="tokens; longer rows are truncated")
parser.add_argument("--seed", type=int, default=42, help="of row order, initial adapter and dropout")
parser.add_argument("--cache-dir", default="~/.cache/lora_core/encoded", help="where encoded rows are kept")
parser.add_argument("--output", default="outputs/own_loop/adapter", help="folder of the adapter")
args = parser.parse_args()

# A step takes 2 x 4 rows on each device. Dropout, weight decay, clipping: the defaults of the sections.
config = RunConfig(
    model=ModelConfig(name_or_path=args.model),
    lora=LoraConfig(rank=args.rank, alpha=2 * args.rank),
    train=TrainConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        optim="adamw_torch",
        bf16="auto",
        seed=args.seed,
    ),
)
config, _ = with_precision(config)  # bfloat16, or float32 on a CPU that would emulate it
train_config = config.train
# Accelerate's, with all cores on a CPU, and with accumulation left to `train_step`.
accelerator = build_accelerator(config)
ranks, rank = accelerator.num_processes, accelerator.process_index

# Rows -> token ids, and a mask of the loss tokens: what the assistant says, and the end of its turn. The result is kept
# in a cache, so that the main process encodes and the others find it.
tokenizer = load_tokenizer(config.model)
# In this process: on macOS, more processes would each start by running this script.
encode = partial(encode_file, max_seq_length=args.max_seq_length, cache_dir=args.cache_dir, num_proc=1)
with accelerator.main_process_first():
    data = encode(args.rows, tokenizer)
    eval_data = encode(args.eval_rows, tokenizer) if args.eval_rows else None
accelerator.print(f"train: {data.counts}")

# All steps are known before the first one: their number, and the learning rate of each.
plan = plan_schedule(
    len(data.lengths),
    per_device_train_batch_size=train_config.per_device_train_batch_size,
    gradient_accumulation_steps=train_config.gradient_accumulation_steps,
    num_train_epochs=train_config.num_train_epochs,
    num_processes=ranks,
    learning_rate=train_config.learning_rate,
    warmup_ratio=train_config.warmup_ratio,
)
accelerator.print(f"plan:  {plan.total_optimizer_steps} optimizer steps, {plan.warmup_steps} of them warmup")

# The frozen model with an adapter on it, and the loss as a sum over loss tokens, so that micro-batches add up.
base = load_base_model(config.model, accelerator.device, packing=True)
adapted = add_adapter(base, config.lora, train_config.seed)
optimizer = build_optimizer(adapted, train_config, accelerator.device)
scheduler = build_scheduler(optimizer, plan)  # not prepared: a prepared one steps once per rank
model, optimizer = accelerator.prepare(CausalLMLoss(adapted), optimizer)
seed_everything(train_config.seed, rank)  # every rank has dropout masks of its own

# Rows lie end to end, without padding, in micro-batches of at most so many tokens.
batching = Batching(2, pad_id(tokenizer), max_tokens=2 * args.max_seq_length)
eval_batching = Batching(8, pad_id(tokenizer), max_tokens=8 * args.max_seq_length)
before = evaluate(accelerator, model, eval_data, eval_batching) if eval_data else None

model.train()
losses = []
for step in range(plan.total_optimizer_steps):
    # A function of seed and step alone: this is what lets a run resume at any step.
    rows = step_rows(plan.num_rows, plan.rows_per_optimizer_step, train_config.seed, step)
    batches = [batching.tensors(data.dataset, cut) for cut in batching.cut(rows, data.lengths, ranks, rank)]
    result = train_step(accelerator, model, optimizer, scheduler, batches, train_config.max_grad_norm)
    losses.append(result.loss)
    accelerator.print(f"step {step + 1}: loss {result.loss:.4f}, learning rate {result.learning_rate:.2e}")

after = evaluate(accelerator, model, eval_data, eval_batching) if eval_data else None
accelerator.print(f"eval before: {before}\neval after:  {after}" if after else f"last loss: {losses[-1]:.4f}")
if accelerator.is_main_process:
    accelerator.unwrap_model(model).model.save_pretrained(args.output, save_embedding_layers=False)
    tokenizer.save_pretrained(args.output)
accelerator.print(f"adapter: {args.output}")
