"""Responses sampled from a model, by transformers' `generate` with its KV cache, from a seeded stream for each row."""

import random
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from formats.chat_text import turn_end
from packed_model import backbone


def end_tokens(model, tokenizer):
    """Ids at which sampling stops: the tokenizer's end-of-sequence, its template's end of a turn, and those that the
    model's own settings name."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, turn_end(tokenizer), *named} - {None})


def closed(response, ends, end):
    """A sampled response (ids) as it is scored: one that stopped at any of `ends` ends in `end`, as in training."""
    return [*response[:-1], end] if response[-1] in ends else response


class RowDraws(LogitsProcessor):
    """Leaves each row one token: the first at which the sum of the probabilities so far exceeds the row's number.

    numbers: (rows, max_new_tokens) in [0, 1); width: tokens of the prompts.
    """

    def __init__(self, numbers, width):
        self.numbers, self.width = numbers, width
        self.finite = True  # whether all probabilities were: to be looked at in the end, as each look waits for a GPU

    def __call__(self, input_ids, scores):
        sums = scores.softmax(-1).cumsum(-1, dtype=self.numbers.dtype)
        self.finite = self.finite & sums[:, -1].isfinite().all()
        number = self.numbers[:, input_ids.shape[1] - self.width, None]
        tokens = torch.searchsorted(sums, number * sums[:, -1:], right=True)  # the last sum is 1 but for rounding
        tokens = tokens.clamp(max=scores.shape[1] - 1)  # behind the last: of sums that are not finite
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def random_numbers(seed, places, count, device):
    """(rows, count) numbers in [0, 1), each row's from (seed, its place) alone, the same on any device."""
    streams = [random.Random(f"{seed} {place}") for place in places]
    numbers = torch.tensor([[stream.random() for _ in range(count)] for stream in streams], dtype=torch.float64)
    numbers = numbers.clamp(max=1 - 2**-23)  # below 1 in fp32 too: Metal has no fp64
    return numbers.to(device, torch.float32 if device.type == "mps" else torch.float64)


@torch.no_grad()
def sample(
    model,
    tokenizer,
    prompts,
    max_new_tokens,
    seed,
    temperature=1.0,
    top_p=1.0,
    places=None,
    streamer=None,
    top_k=0,
    pictures=(),
):
    """One response (list of ids) to each prompt (list of ids), in one batch; a finished one ends in its end token.

    temperature 0: the likeliest token each time.  top_k: draw from the likeliest k alone; 0: from all.  Of the model's
    own generation settings only the end tokens count, so that with temperature 1 and top_p 1 the draws are the model's
    distribution.  places: number of each row among all
    that are sampled with this seed, 0, 1, ... if not given; what a row draws depends on seed and place, not on which
    rows share its batch (but for rounding).  The global generators and the model's mode are left as they were.
    pictures: of each prompt its Pictures, or None; the tokens that stand for a picture are never drawn.
    streamer: transformers' TextStreamer, for one prompt.  Raises FloatingPointError for probabilities not finite.
    """
    device, was_training = model.device, model.training
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0], do_sample=False)
    beside = {}
    if any(pictures):
        import vision  # text has no use for it

        prompts, beside = vision.beside_prompts(backbone(model), prompts, pictures)
    width = max(map(len, prompts))
    of_pictures = [getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")]
    unsaid = [token for token in of_pictures if token is not None]
    draws = [SuppressTokensLogitsProcessor(unsaid, device)] if unsaid else []
    row_draws = None  # without them `generate` takes the likeliest token
    if temperature > 0:
        if temperature != 1:
            draws.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            draws.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            draws.append(TopPLogitsWarper(top_p))
        places = range(len(prompts)) if places is None else places
        row_draws = RowDraws(random_numbers(seed, places, max_new_tokens, device), width)
        draws.append(row_draws)
    ids = torch.tensor([[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    # What a config leaves open, `generate` takes from the model's own: a repetition penalty, say, as Qwen2.5's has.
    own, model.generation_config = model.generation_config, GenerationConfig()
    model.eval()
    try:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList(draws),
            streamer=streamer,
            # Else a sharded model generates in step with the other ranks, and one that asks for nothing never comes.
            synced_gpus=False,
            **beside,
        )
    finally:
        model.generation_config = own
        model.train(was_training)
    if row_draws and not row_draws.finite:
        raise FloatingPointError("the model gives no finite probabilities: try --dtype fp32, or mend its weights")
    responses = []
    for response in output[:, width:].tolist():
        end = next((place + 1 for place, token in enumerate(response) if token in ends), len(response))
        responses.append(response[:end])
    return responses


@contextmanager
def gathered(model):
    """A block in which a sharded model (harness/sharding.py) is whole on every rank, in the type it computes in: to
    sample, which each rank does as often as it has to.  Weights must not change within.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def response_text(prompt, response, ends, tokenizer):
    """The text of a response (ids) to a prompt (ids), without special tokens, so that prompt + text is what was said.

    Decoded behind its prompt: by itself, the first word would lose its blank with a SentencePiece tokenizer (Llama's).
    ends: of `end_tokens`; the one it stopped at is no text, also where the tokenizer does not call it special.
    """
    response = response[:-1] if response[-1] in ends else response

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = decode(prompt), decode(prompt + response)
    return whole[len(before) :] if whole.startswith(before) else decode(response)
