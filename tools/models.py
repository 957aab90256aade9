"""A base, and on it by name the adapters of policies and the reward models that share it: checked before any weights
are read, loaded, and asked for scores.
"""

from typing import NamedTuple

import torch

import lora
import reward_models
from formats.model_files import check_positions, load_config, load_model, load_skeleton, sees
from harness.flags import NonFinite
from packing import pack, passes
from sampling import closed


def picture_reader(args, tokenizer):
    """A PictureReader where --model sees pictures, else None."""
    config = load_config(args.model, args.trust_remote_code)
    if not sees(config):
        return None
    from formats.picture_reader import PictureReader  # nobody else needs it

    return PictureReader(args, config, tokenizer)


def example(prompts, device):
    """{"example": a packed pair with pictures}, or {} where no prompt has any: prepare_model looks at one."""
    seeing = next((prompt for prompt in prompts if prompt.pictures), None)
    return {"example": pack(reward_models.as_pairs([seeing], [[seeing.ids[-2:]]])[0], device)} if seeing else {}


class RewardFolder(NamedTuple):
    """A reward model before it is loaded."""

    folder: str  # of train_rm.py
    record: dict  # its reward_model.json


def find_rewards(folders, tokenizer, args):
    """{task: RewardFolder} of those of folders {task: folder or None} that are given.  Raises RewardModelError."""
    trust = args.trust_remote_code
    return {
        task: RewardFolder(folder, reward_models.read_record(folder, task, tokenizer, trust))
        for task, folder in folders.items()
        if folder
    }


def check(args, tokenizer, adapters, rewards, prompt_tokens):
    """Raise ModelError or AdapterError for what does not fit together; no weights of a model are read.

    adapters {name on the base: folder}; rewards {task: RewardFolder}; prompt_tokens: of the longest prompt.
    """
    tokens = prompt_tokens + args.max_new_tokens
    wanted = f"a prompt of {prompt_tokens} tokens and --max-new-tokens {args.max_new_tokens}"

    skeleton = load_skeleton(args.model, tokenizer, args)
    for name, folder in adapters.items():
        lora.load_adapter(skeleton, folder, name)
    check_positions(skeleton.config, tokens, wanted, args.model)
    for folder, record in rewards.values():
        of_its_own = reward_models.check_loads(folder, record, skeleton, tokenizer, args)
        if of_its_own is not None:
            check_positions(of_its_own.config, tokens, wanted, folder)


def load(args, adapters, dtype, device):
    """--model with adapters {name: folder} on it, of which the last is on.  Raises NonFinite for broken weights."""
    model = load_model(args.model, dtype, device, args.trust_remote_code)
    for name, folder in adapters.items():
        if not all(parameter.isfinite().all() for parameter in lora.load_adapter(model, folder, name)):
            raise NonFinite(f"the adapter in {folder} has weights that are not finite: train it anew")
    return model


def load_rewards(args, rewards, model, base_sha256, dtype, max_length, prompts):
    """{task: RewardModel} of {task: RewardFolder}: adapters on `model` where that is their base, else by themselves.

    base_sha256: score_cache.base_sha256 of `model`; max_length: tokens of a prompt and its response; prompts: what is
    asked.  An adapter on `model` that is loaded here is on afterwards.
    """
    seeing, judges = example(prompts, model.device), {}
    if seeing:
        reader = next(prompt.pictures.reader for prompt in prompts if prompt.pictures)
        seeing["pictures"] = reader.fingerprint()
    for task, (folder, record) in rewards.items():
        home, where = (model, base_sha256), (args, dtype, model.device, max_length)
        judges[task] = reward_models.load(folder, record["task"], record, *home, *where, **seeing)
    return judges


@torch.no_grad()
def scores(reward, prompts, responses, ends, batch_size):
    """Scores of responses under a RewardModel, one list of all in their order.  Raises NonFinite.

    prompts [Prompt]; responses: for each prompt a list of responses (ids), as they were sampled: one that stopped at
    any of `ends` is scored with the end that is trained.  batch_size: pairs of responses at a time.
    """
    as_trained = [
        [closed(response, ends, prompt.end) for response in group]
        for prompt, group in zip(prompts, responses, strict=True)
    ]
    pairs, places = reward_models.as_pairs(prompts, as_trained)
    by_pair = torch.zeros(2, len(pairs), dtype=torch.float64)
    with lora.use_adapter(reward.model, reward.adapter):
        for indices in passes(range(len(pairs)), batch_size):
            batch = pack([pairs[i] for i in indices], reward.model.device)
            by_pair[:, indices] = torch.stack(reward.model.packed_scores(batch, reward.head)).cpu().double()
    if not by_pair.isfinite().all():
        raise NonFinite("a reward model gives scores that are not finite: try --dtype fp32, or look for broken weights")
    return [by_pair[side, pair].item() for group in places for side, pair in group]
