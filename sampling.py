"""Responses sampled from a model, by transformers' `generate` with its KV cache, seeded."""

import torch
from transformers import GenerationConfig


def prompt_ids(prompt, tokenizer, max_prompt_length, wrap=False):
    """Token ids of a prompt, a string as it stands or a list of messages through the chat template, cut on the left.

    wrap: a string is put into the chat template as the words of a user.  The same ids as a pair's prompt in training,
    but for a token that spans the seam of prompt and response.
    """
    if wrap and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    is_chat = not isinstance(prompt, str)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if is_chat else prompt
    ids = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while not is_chat and ids and ids[-1] == eos:  # some tokenizers end every text, and a prompt goes on
        ids = ids[:-1]
    ids = ids or [eos if bos is None else bos]  # something must predict the first token
    if len(ids) <= max_prompt_length:
        return ids
    keep = int(ids[0] == bos)
    return ids[:keep] + ids[len(ids) - max_prompt_length + keep :]


def end_tokens(model, tokenizer):
    """Ids that end a response: the tokenizer's end-of-sequence and those the model's own settings name."""
    named = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, top_p=1.0, streamer=None):
    """One response (list of ids) to each prompt (list of ids), in one batch; a finished one ends in its end token.

    temperature 0: the likeliest token each time.  Of the model's own generation settings only the end tokens count, so
    that with temperature 1 and top_p 1 the draws are the model's distribution.  The global generators and the model's
    mode are left as they were; the same seed and batch give the same responses.  streamer: transformers' TextStreamer,
    for one prompt.
    """
    device, was_training = model.device, model.training
    ends = end_tokens(model, tokenizer)
    choice = {"do_sample": temperature > 0}
    choice |= {"temperature": temperature, "top_k": 0, "top_p": top_p} if temperature > 0 else {}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0], **choice)
    width = max(map(len, prompts))
    ids = torch.tensor([[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    # What a config leaves open, `generate` takes from the model's own: a repetition penalty, say, as Qwen2.5's has.
    own, model.generation_config = model.generation_config, GenerationConfig()
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)
    finally:
        model.generation_config = own
        model.train(was_training)
    responses = []
    for response in output[:, width:].tolist():
        end = next((place + 1 for place, token in enumerate(response) if token in ends), len(response))
        responses.append(response[:end])
    return responses


def response_text(prompt, response, tokenizer):
    """The text of a response (ids) to a prompt (ids), without special tokens, so that prompt + text is what was said.

    Decoded behind its prompt: by itself, the first word would lose its blank with a SentencePiece tokenizer (Llama's).
    """

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = decode(prompt), decode(prompt + response)
    return whole[len(before) :] if whole.startswith(before) else decode(response)
