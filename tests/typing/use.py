"""What a user's own program looks like: type checkers must find nothing wrong in it (`make check`)."""

from lora_core import Callback, LoraConfig, RunConfig, TrainConfig, load_config, plan_schedule, train, with_overrides


class PrintLoss(Callback):
    pass


config = RunConfig(train=TrainConfig(learning_rate=2e-4), lora=LoraConfig(rank=8))
longer = with_overrides(load_config("qwen0.5b"), ["train.num_train_epochs=8"])
steps: int = plan_schedule(78, per_device_train_batch_size=2, gradient_accumulation_steps=4).total_optimizer_steps


def run() -> str:
    """Never called: only its types are looked at."""
    summary = train(config, rows=[{"prompt": "Hi", "completion": "Hello!"}], callbacks=[PrintLoss()])
    return summary.adapter_dir
