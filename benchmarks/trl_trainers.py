"""TRL's trainers on the pairs of a plan: the same token ids in the same updates as ours."""

import dataclasses

import torch

from preference_data import fingerprint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def token_ids(updates):
    """sha256 of what passes through TRL's model: of each update, all chosen sides and all rejected, in any order."""
    return fingerprint([[sorted(pair[0] + pair[side] for pair in update) for side in (1, 2)] for update in updates])


def train(kind, model, row, config, args, plan, name, **others):
    """Train with TRL's trainer of this kind, DPO or Reward; row: (prompt, chosen, rejected) ids -> what it takes.

    config: settings beside those that every kind is given here; others: further arguments of the trainer.
    """
    import trl
    from datasets import Dataset

    passes = []

    class SamePairs(getattr(trl, f"{kind}Trainer")):
        """On token ids, in the order given: of itself it tokenises strings, and shuffles in its own way."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model, inputs, *others):
            passes.append((inputs["input_ids"], inputs["attention_mask"]))
            return super().training_step(model, inputs, *others)

    accumulation, config = args.gradient_accumulation_steps, config | dict(max_length=args.max_length)
    config |= dict(per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=accumulation)
    config |= dict(num_train_epochs=1, save_strategy="no", report_to="none", disable_tqdm=True)
    config |= dict(use_cpu=not torch.cuda.is_available())  # without it and without a GPU, TRL's bf16=True is an error
    dtype, pairs = {"trl-defaults": "bf16", "trl-best": plan["dtype"], "trl-fp32": "fp32"}[name], plan["updates"]
    if name != "trl-defaults":  # with bf16 weights autocast stays: LoRA's are fp32, and so would be its products
        config |= dict(bf16=dtype == "bf16", fp16=dtype == "fp16", gradient_checkpointing=False, logging_strategy="no")
    if name == "trl-best":  # a path, as in TRL's documentation; of itself TRL loads weights as fp32
        loading = config.get("model_init_kwargs", {}) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
        config |= dict(model_init_kwargs=loading)
        # Less padding: by length within an update, as group_by_length does beyond it.
        pairs = [sorted(update, key=lambda pair: -len(pair[0]) - max(map(len, pair[1:3]))) for update in pairs]
    if name == "trl-fp32":
        config |= dict(logging_strategy="steps", logging_steps=1)
    settings = getattr(trl, f"{kind}Config")(output_dir=plan["output"], **config)
    rows = Dataset.from_list([row(*pair[:3]) for update in pairs for pair in update])
    trainer = SamePairs(model, args=settings, train_dataset=rows, **others)
    trainer.train()
    history, weights = trainer.state.log_history, trainer.model.get_base_model()
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    result = {"kind": kind, "dtype": dtype, "losses": [entry["loss"] for entry in history if "loss" in entry]}
    result["tokens"] = max(entry.get("num_tokens", 0) for entry in history)
    passes = [[ids[mask.bool()].tolist() for ids, mask in zip(*both)] for both in passes]  # without the padding
    pairs = [list(zip(sides[: len(sides) // 2], sides[len(sides) // 2 :])) for sides in passes]  # chosen come first
    updates = [sum(pairs[first : first + accumulation], []) for first in range(0, len(pairs), accumulation)]
    result["data"] = token_ids([[([], *sides) for sides in update] for update in updates])
    result["trainable"] = sum(parameter.numel() for parameter in weights.parameters() if parameter.requires_grad)
    result["config"] = {key: value for key, value in config.items() if value != defaults[key]}
    names = "bf16 fp16 gradient_checkpointing precompute_ref_log_probs padding_free optim".split()
    result["resolved"] = {key: str(getattr(settings, key)) for key in names if key in defaults}
    result["resolved"] |= {"weights": str(weights.dtype), "attention": weights.config._attn_implementation}
    return result
