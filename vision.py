"""A vision-language model on packed pairs with pictures: what its tower makes of them, positions, what a prompt needs.

The tower that sees is frozen.  It runs apart from the packed row, once for each pair, on what the processor made of
that pair (formats/picture_reader.py); its features join the row in the place of the placeholder tokens
(`mm_encoder_outputs` of transformers).
"""

import copy
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves

from formats.model_files import prompt_sees_itself
from formats.picture_reader import OF_POSITIONS, PER_TOKEN, with_pixels

KEPT_BYTES = 4e9  # of features, in the CPU's memory: 50,000 tiles of SmolVLM, 850 pictures of LLaVA-7B
FEATURES = {"pooler_output", "deepstack_features"}  # of what a tower gives; the second is Qwen3-VL's


def on_model(given, model):
    """What a processor made, {name: tensor}, on the device of a model and its floats in its type."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in given.items()
    }


@torch.no_grad()
def encode(backbone, pictures, digests):
    """What `mm_encoder_outputs` takes for a row of pairs, each picture encoded once: {"image": features}.

    pictures: of each pair what its processor made, or None; digests: sha256 of the files of each.  One call for each
    pair, with exactly that: pixels of several sizes need no common shape, and a family's rule for several pictures in
    one prompt holds.  A frozen tower's features are constants: they stay in the CPU's memory, up to KEPT_BYTES.
    """
    kept = vars(backbone).setdefault("kept_features", Kept())
    outputs = []
    for given, key in zip(pictures, digests, strict=True):
        if given is None:
            continue
        output = kept.outputs.get(key)
        if output is None:
            made = on_model(with_pixels(given), backbone)
            pixels = {name: tensor for name, tensor in made.items() if name not in PER_TOKEN}
            output = _features_of(backbone.get_image_features(**pixels, return_dict=True))
            kept.keep(key, output)
        outputs.append(output)
    joined = copy.copy(outputs[0])
    joined.pooler_output = _joined([output.pooler_output for output in outputs], backbone.device)
    if getattr(joined, "deepstack_features", None) is not None:  # Qwen3-VL: features for its first layers too
        levels = zip(*(output.deepstack_features for output in outputs))
        joined.deepstack_features = [_joined(level, backbone.device) for level in levels]
    return {"image": joined}


@dataclass
class Kept:
    """Of a model without its head: what its tower gave."""

    outputs: dict = field(default_factory=dict)  # digests of the pictures of a pair -> output, on the CPU
    num_bytes: int = 0  # of all of them

    def keep(self, key, output):
        small = copy.copy(output)
        for name in FEATURES & output.keys():
            small[name] = _on_cpu(output[name])
        size = sum(tensor.nbytes for tensor in tree_leaves(dict(small)) if isinstance(tensor, torch.Tensor))
        if self.num_bytes + size <= KEPT_BYTES:
            self.outputs[key] = small
            self.num_bytes += size


def _features_of(output):
    """What a tower gave, without what nobody asks for and what is larger: the hidden states of its blocks."""
    small = copy.copy(output)
    for name in output.keys() - FEATURES:
        small[name] = None
    return small


def _on_cpu(features):
    return features.cpu() if isinstance(features, torch.Tensor) else [_on_cpu(feature) for feature in features]


def _joined(features, device):
    if isinstance(features[0], torch.Tensor):
        return torch.cat([feature.to(device) for feature in features])
    return [of_picture.to(device) for of_pair in features for of_picture in of_pair]


def beside_prompts(backbone, prompts, pictures):
    """(prompts as ids, what `generate` takes beside them), from prompts (ids) and their Pictures or None.

    The ids of one with pictures are placeholders until now.  Rows are padded on the left, as the ids will be.
    """
    opened = {id(one): one.open() for one in pictures if one}  # one prompt stands there once for each response
    made = [opened[id(one)] if one else (None, None) for one in pictures]
    prompts = [ids or prompt for prompt, (ids, _) in zip(prompts, made, strict=True)]
    given, of_files = [given for _, given in made], [one.digests if one else () for one in pictures]
    beside = {"mm_encoder_outputs": encode(backbone, given, of_files)}
    given, width = [one or {} for one in given], max(map(len, prompts))
    names = {name for one in given for name in one}
    for name in names & {*PER_TOKEN}:
        rows = [one.get(name, torch.zeros(1, 0, dtype=torch.long)) for one in given]
        rows = [torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows]
        beside[name] = torch.cat(rows).to(backbone.device)
    for name in names & {*OF_POSITIONS} - {*PER_TOKEN}:
        beside[name] = torch.cat([one[name] for one in given if name in one]).to(backbone.device)
    return prompts, beside


def positions(backbone, batch):
    """Positions of a PackedPairs batch with pictures: as they are, (1, T), or M-RoPE's, (3, 1, T).

    M-RoPE (arXiv:2409.12191) gives the tokens of a picture its rows and columns; what comes behind goes on behind the
    largest of them, and so do both responses.
    """
    rope_index = getattr(backbone, "get_rope_index", None)
    if rope_index is None:
        return batch.position_ids
    ids, of_pairs = batch.input_ids.cpu(), []
    for segment, given in zip(batch.segments, batch.pictures, strict=True):
        num_prompt = segment.chosen_start - segment.prompt_start
        of_prompt = torch.arange(num_prompt).expand(3, -1)
        if given is not None:
            known = {name: given[name] for name in OF_POSITIONS if name in given}
            of_prompt = rope_index(input_ids=ids[:, segment.prompt_start : segment.chosen_start], **known)[0][:, 0]
        start = int(of_prompt.max()) + 1
        of_pairs.append(of_prompt)
        for length in (segment.rejected_start - segment.chosen_start, segment.end - segment.rejected_start):
            of_pairs.append(torch.arange(start, start + length).expand(3, -1))
    return torch.cat(of_pairs, dim=1)[:, None].to(batch.position_ids.device)


def beside(given, num_prompt, num_response, model):
    """What a model takes beside the ids of a prompt, with pictures or (given: None) without, and a response."""
    given, with_response, kind = {} if given is None else with_pixels(given), {}, 0  # kind: of a response's tokens
    if prompt_sees_itself(model.config):
        given, kind = {**given, "token_type_ids": torch.zeros(1, num_prompt, dtype=torch.long)}, 1
    for name, tensor in on_model(given, model).items():
        if name in PER_TOKEN:
            tensor = torch.cat((tensor, tensor.new_full((1, num_response), kind)), dim=1)
        with_response[name] = tensor
    return with_response
