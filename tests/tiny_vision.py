"""Tiny vision-language models with random weights of each family, and pairs with pictures in them as a processor would
make them: one picture, two of other sizes, none, one.
"""

import copy
import random
from typing import NamedTuple

import torch
import transformers
from tiny_models import WideNorm, randomize
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

import lora
from preference_data import Pair

IMAGE = 150  # the token that stands for a piece of a picture
TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
)
TOWER = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32)
TOWER |= dict(patch_size=8)
SIZES = [[32, 64], [64, 32], [64, 64]]  # of LLaVA-Next's grids
ROPE = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)


class Draw:
    """Random ids and pixels, the same ones each time."""

    def __init__(self):
        self.numbers, self.pixels_of = random.Random(5), torch.Generator().manual_seed(5)

    def ids(self, count):
        return [self.numbers.randrange(2, 128) for _ in range(count)]

    def pixels(self, *shape):
        return torch.randn(*shape, generator=self.pixels_of, dtype=torch.float64)

    def prompt(self, blocks):
        """Text, a block of a picture, text, a block, ..., text."""
        ids = self.ids(4)
        for place, block in enumerate(blocks):
            ids += block + self.ids(6 if place == len(blocks) - 1 else 3)
        return ids if blocks else self.ids(9)

    def pairs(self, pictures, of):
        """of(what the pictures of one pair are): (blocks, what the model takes beside the ids)."""
        made = []
        for given, chosen, rejected in zip(pictures, (5, 6, 4, 3), (7, 3, 4, 5), strict=True):
            blocks, inputs = of(given) if given else ([], None)
            made.append((self.prompt(blocks), self.ids(chosen), self.ids(rejected), inputs))
        return made


def like(config_class, **arguments):
    """A config as the part of another: a dict with its type."""
    return config_class(**arguments).to_dict() | {"model_type": config_class.model_type}


def llava():
    config = transformers.LlavaConfig(
        vision_config=like(transformers.CLIPVisionConfig, **TOWER),
        text_config=like(transformers.LlamaConfig, **TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    draw = Draw()
    of = lambda number: ([[IMAGE] * 16] * number, {"pixel_values": draw.pixels(number, 3, 32, 32)})
    return transformers.LlavaForConditionalGeneration(config), draw.pairs((1, 2, 0, 1), of)


def llava_next():
    config = transformers.LlavaNextConfig(
        vision_config=like(transformers.CLIPVisionConfig, **TOWER),
        text_config=like(transformers.LlamaConfig, **TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=SIZES,
    )
    return _of_any_size(transformers.LlavaNextForConditionalGeneration(config))


def llava_onevision():
    config = transformers.LlavaOnevisionConfig(
        vision_config=like(transformers.SiglipVisionConfig, **TOWER),
        text_config=like(transformers.Qwen2Config, **TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=SIZES,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return _of_any_size(transformers.LlavaOnevisionForConditionalGeneration(config), one_is_cut=True)


def _of_any_size(model, one_is_cut=False):
    """one_is_cut: into tiles, but not several pictures of one prompt."""
    draw, model = Draw(), model.double().eval()

    def of(sizes):
        tiles = [image_size_to_num_patches(torch.tensor(size), SIZES, 32) for size in sizes]
        tiles = [1] * len(sizes) if one_is_cut and len(sizes) > 1 else tiles
        inputs = {"pixel_values": draw.pixels(len(sizes), max(tiles), 3, 32, 32), "image_sizes": torch.tensor(sizes)}
        if one_is_cut:
            inputs["batch_num_images"] = torch.tensor([len(sizes)])
        with torch.no_grad():
            features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
        return [[IMAGE] * len(feature) for feature in features], inputs

    return model, draw.pairs(([(30, 60)], [(60, 20), (64, 64)], None, [(64, 50)]), of)


def idefics3(kind="Idefics3"):
    config = getattr(transformers, f"{kind}Config")(
        vision_config=like(getattr(transformers, f"{kind}VisionConfig"), **TOWER),
        text_config=like(transformers.LlamaConfig, **TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    draw = Draw()

    def of(tiles):  # a picture is cut into tiles, each with a token in front that says which
        blocks = [[token for tile in range(number) for token in [145 + tile % 3, *[IMAGE] * 4]] for number in tiles]
        mask = torch.ones(1, sum(tiles), 32, 32, dtype=torch.long)
        mask[0, -1, :, 24:] = 0  # a padded tile
        pixels = draw.pixels(1, sum(tiles), 3, 32, 32) * mask[:, :, None]
        return blocks, {"pixel_values": pixels, "pixel_attention_mask": mask}

    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    return model, draw.pairs(([3], [1, 5], None, [2]), of)


def smolvlm():
    return idefics3("SmolVLM")


def qwen_vl(kind, text=None, rope=None, **tower):
    tower = dict(hidden_size=32, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2) | tower
    tokens = dict(image_token_id=IMAGE, video_token_id=151, vision_start_token_id=148, vision_end_token_id=149)
    text = TEXT | {"rope_parameters": ROPE | (rope or {})} | (text or {})
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=tower, **tokens)
    draw = Draw()

    def of(grids):
        blocks = [[148, *[IMAGE] * (frames * height * width // 4), 149] for frames, height, width in grids]
        pixels = draw.pixels(sum(frames * height * width for frames, height, width in grids), 3 * 2 * 4 * 4)
        return blocks, {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}

    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    pairs = draw.pairs(([(1, 4, 6)], [(1, 8, 4), (1, 2, 2)], None, [(1, 6, 6)]), of)
    return model, [(*pair[:3], pair[3] and pair[3] | kinds_of(pair[0], "mm_token_type_ids")) for pair in pairs]


def kinds_of(prompt, name):
    """1 where a token is of a picture."""
    return {name: torch.tensor([[int(token == IMAGE) for token in prompt]])}


def qwen2_vl():
    return qwen_vl("Qwen2VL", depth=2, embed_dim=32, mlp_ratio=2)


def qwen2_5_vl():
    tower = dict(out_hidden_size=32, intermediate_size=48, window_size=16, fullatt_block_indexes=[1])
    return qwen_vl("Qwen2_5_VL", depth=2, **tower)


def qwen3_vl():
    tower = dict(out_hidden_size=32, intermediate_size=48, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    return qwen_vl("Qwen3VL", {"head_dim": 8}, {"mrope_interleaved": True}, depth=3, **tower)


def internvl():
    tower = TOWER | dict(image_size=[32, 32], patch_size=[8, 8])
    config = transformers.InternVLConfig(
        vision_config=like(transformers.InternVLVisionConfig, **tower),
        text_config=like(transformers.Qwen2Config, **TEXT),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    draw = Draw()

    def of(tiles):
        return [[148, *[IMAGE] * 4 * number, 149] for number in tiles], {
            "pixel_values": draw.pixels(sum(tiles), 3, 32, 32)
        }

    return transformers.InternVLForConditionalGeneration(config), draw.pairs(([3], [1, 5], None, [2]), of)


PIXTRAL = TOWER | dict(image_size=64, head_dim=12)


def pixtral():
    config = transformers.LlavaConfig(
        vision_config=like(transformers.PixtralVisionConfig, **PIXTRAL),
        text_config=like(transformers.MistralConfig, **TEXT, sliding_window=None),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config), _pixtral_pairs(1)


def mistral3():
    config = transformers.Mistral3Config(
        vision_config=like(transformers.PixtralVisionConfig, **PIXTRAL),
        text_config=like(transformers.MistralConfig, **TEXT, sliding_window=None),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return transformers.Mistral3ForConditionalGeneration(config), _pixtral_pairs(2)


def _pixtral_pairs(merge):
    draw = Draw()

    def of(sizes):
        height, width = (max(size[side] for size in sizes) for side in (0, 1))
        blocks = [[IMAGE] * ((size[0] // 8 // merge) * (size[1] // 8 // merge)) for size in sizes]
        return blocks, {"pixel_values": draw.pixels(len(sizes), 3, height, width), "image_sizes": torch.tensor(sizes)}

    return draw.pairs(([(32, 48)], [(16, 64), (48, 32)], None, [(32, 32)]), of)


def gemma3():
    layers = dict(sliding_window=12, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    config = transformers.Gemma3Config(
        vision_config=like(transformers.SiglipVisionConfig, **TOWER),
        text_config=like(transformers.Gemma3TextConfig, **TEXT, head_dim=8, **layers),
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
    )
    draw = Draw()
    of = lambda number: ([[148, *[IMAGE] * 4, 149]] * number, {"pixel_values": draw.pixels(number, 3, 32, 32)})
    pairs = draw.pairs((1, 2, 0, 3), of)
    pairs = [(*pair[:3], pair[3] and pair[3] | kinds_of(pair[0], "token_type_ids")) for pair in pairs]
    return transformers.Gemma3ForConditionalGeneration(config), pairs


def paligemma():
    config = transformers.PaliGemmaConfig(
        vision_config=like(transformers.SiglipVisionConfig, **TOWER, projection_dim=32),
        text_config=like(transformers.GemmaConfig, **TEXT, head_dim=8),
        image_token_id=IMAGE,
        projection_dim=32,
    )
    draw, pairs = Draw(), []
    for number, chosen, rejected in ((1, 5, 7), (2, 6, 3), (1, 3, 5)):
        prompt = [IMAGE] * 16 * number + draw.ids(7)
        inputs = {"pixel_values": draw.pixels(number, 3, 32, 32)}
        inputs["token_type_ids"] = torch.zeros(1, len(prompt), dtype=torch.long)
        pairs.append((prompt, draw.ids(chosen), draw.ids(rejected), inputs))
    return transformers.PaliGemmaForConditionalGeneration(config), pairs


PACKED = (
    llava,
    llava_next,
    llava_onevision,
    idefics3,
    smolvlm,
    internvl,
    pixtral,
    mistral3,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
)
PLAIN = gemma3, paligemma  # with pictures
FAMILIES = {build.__name__: build for build in (*PACKED, *PLAIN)}


def vision_model(family, dtype=torch.float64):
    """(model in eval mode, its pairs with pictures).  Weights, biases and norms are wide: small ones hide mistakes."""
    torch.manual_seed(0)
    model, pairs = FAMILIES[family]()
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if parameter.mean() > 0.5 else 0.0, 0.1)
            elif parameter.ndim == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    if dtype == torch.float64:
        widen_norms(model)
    return model, pairs


def widen_norms(model):
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, WideNorm(module))


class Processed(NamedTuple):
    """What a processor of the family would make of the pictures of a prompt."""

    ids: list
    given: dict
    digests: tuple

    def open(self):
        return self.ids, self.given


def family(name):
    """(model with an adapter, both in fp64, the same again for the oracle, pairs, the same as tuples)."""
    model, raw = vision_model(name)
    randomize(lora.add_adapter(model, "policy", 4, 8))
    model.double()
    pairs = []
    for number, (prompt, chosen, rejected, given) in enumerate(raw):
        pictures = Processed(prompt, given, (f"sha {number}",)) if given else None
        pairs.append(Pair(prompt, chosen, rejected, pictures=pictures))
    return model, copy.deepcopy(model), pairs, raw


def with_response(model, given, num_prompt, num_response):
    """What a model takes beside the ids of a prompt and a response: their kinds go on, of no picture; PaliGemma is told
    which tokens are a response, text too."""
    given, kind = dict(given or {}), 0
    if model.config.model_type == "paligemma":
        given["token_type_ids"], kind = torch.zeros(1, num_prompt, dtype=torch.long), 1
    for name in {"mm_token_type_ids", "token_type_ids"} & given.keys():
        given[name] = torch.cat((given[name], given[name].new_full((1, num_response), kind)), 1)
    return given
