"""What pictures add to --estimate-memory: their tokens, what a tower works with, beside real tensors on a CPU."""

import pytest
import torch
import transformers
from tiny_models import flags, skeleton_of, tiny_model
from tiny_vision import IMAGE, TEXT, Processed, like, vision_model

import lora
import packed_model
import vision
from harness.memory_estimate import Estimate
from harness.memory_report import report
from harness.pass_memory import most_alive, picture_of
from lora_targets import train_text
from packing import pack
from preference_data import Pair

CLIP = dict(hidden_size=1024, num_attention_heads=16, intermediate_size=4096, image_size=336, patch_size=14)
SIGLIP = dict(hidden_size=1152, num_attention_heads=16, intermediate_size=4304, image_size=896, patch_size=14)
LLAMA = like(transformers.LlamaConfig, **TEXT)
TOKENS = {  # of a picture of 1024 x 1024 pixels, of the models that are there
    "Llava": (576, dict(vision_config=like(transformers.CLIPVisionConfig, **CLIP), text_config=LLAMA)),
    "LlavaNext": (5 * 576, dict(vision_config=like(transformers.CLIPVisionConfig, **CLIP), text_config=LLAMA)),
    "Gemma3": (256, dict(vision_config=like(transformers.SiglipVisionConfig, **SIGLIP), text_config=TEXT)),
    "Qwen2VL": (37 * 37, dict(vision_config=dict(depth=2), text_config=TEXT)),  # of 28 pixels a side
    "Qwen3VL": (32 * 32, dict(vision_config=dict(depth=2), text_config=TEXT)),
    "InternVL": (10 * 256, dict(text_config=like(transformers.Qwen2Config, **TEXT))),
}


@pytest.mark.parametrize("family", TOKENS)
def test_the_tokens_of_a_picture_are_those_of_the_family(family):
    tokens, parts = TOKENS[family]
    with torch.device("meta"):
        kind = getattr(transformers, f"{family}ForConditionalGeneration")
        model = kind(getattr(transformers, f"{family}Config")(**parts))
    assert picture_of(model).tokens == tokens


def llava():
    """(model in fp32 with an adapter, its skeleton): a picture of 128 x 128 pixels has 256 tokens."""
    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=128)
    config = transformers.LlavaConfig(
        vision_config=like(transformers.CLIPVisionConfig, **tower, patch_size=8),
        text_config=LLAMA | dict(intermediate_size=128),  # four times the width, as in real ones
        image_token_id=IMAGE,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    skeleton = skeleton_of(model)
    for each in (model, skeleton):
        lora.add_adapter(each, "policy", 4, 8)
    return model, skeleton


def pairs_with_a_picture(number, response=40):
    prompt = [5, *[IMAGE] * 256]
    given = [{"pixel_values": torch.randn(1, 3, 128, 128)} for _ in range(number)]
    return [Pair(prompt, [7] * response, [9] * response, pictures=Processed(prompt, one, (str(one),))) for one in given]


def test_the_tower_takes_what_is_predicted_whatever_the_number_of_pairs():
    model, skeleton = llava()
    predicted = 4 * picture_of(skeleton).numbers
    for number in (1, 4):
        backbone = packed_model.backbone(model)
        backbone.kept_features = vision.Kept()

        def work(number=number, backbone=backbone):
            batch = pack(pairs_with_a_picture(number))
            vision.encode(backbone, batch.pictures, batch.digests)

        others = (number - 1) * 4 * (3 * 128 * 128 + 256 * TEXT["hidden_size"])  # their pixels, and their features
        assert most_alive(work) - others == pytest.approx(predicted, rel=0.02)


def test_of_what_a_tower_gives_the_features_alone_are_kept():
    model, _ = llava()
    batch = pack(pairs_with_a_picture(2))
    output = vision.encode(packed_model.backbone(model), batch.pictures, batch.digests)["image"]
    assert {name for name in output if output[name] is not None} == {"pooler_output"}
    assert [feature.shape for feature in output.pooler_output] == [(256, TEXT["hidden_size"])] * 2


def test_activations_with_pictures_are_those_of_a_real_pass():
    model, skeleton = llava()
    packed_model.prepare_model(model)
    batch = pack(pairs_with_a_picture(2, response=128))
    own, saved = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = packed_model._packed_hidden(model, batch)
    assert states.shape[0] == 2 * (257 + 256)
    kept = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    output = batch.features[packed_model.backbone(model)][1]["image"]
    features = sum(feature.nbytes for feature in output.pooler_output)
    rows = Estimate(skeleton).rows(flags(dtype="fp32"), tokens=states.shape[0])
    assert rows["activations"][1] == pytest.approx(kept, rel=0.1)
    in_all_tokens = 4 * states.shape[0] * TEXT["hidden_size"]  # of a pass nobody counts the pictures
    assert features < in_all_tokens == rows["pictures"][2] and rows["pictures"][3] == 0


def test_a_pass_has_a_picture_for_each_pair_and_the_report_says_so():
    _, skeleton = llava()
    estimate, args = Estimate(skeleton), flags(batch_size=4)
    assert estimate.tokens(args) == 4 * (2 * 512 + 255)
    assert estimate.tokens(flags(tokens_per_microbatch=1100)) == 2 * 512 + 255, "a pass has a pair at least"
    said = report(estimate, args)
    assert "\nWith one picture of 1024 x 1024 pixels in each pair: 256 tokens\n" in said and "\npictures " in said
    of_text = Estimate(skeleton_of(tiny_model("llama")))
    assert of_text.tokens(args) == 4 * 2 * 512
    assert "picture" not in report(of_text, flags())


def test_where_a_tower_takes_more_than_what_a_pass_has_later_scoring_takes_that():
    _, skeleton = llava()
    rows = Estimate(skeleton).rows(flags(dtype="bf16"), tokens=300)
    features = 300 * TEXT["hidden_size"] * 2
    assert rows["pictures"][0] + rows["passing in a block"][0] == features + 2 * picture_of(skeleton).numbers
    assert rows["pictures"][2] == features
    many = Estimate(skeleton).rows(flags(dtype="bf16"), tokens=30_000)
    assert many["pictures"] == [30_000 * TEXT["hidden_size"] * 2] * 3 + [0]


@pytest.mark.parametrize("family", ["llava", "gemma3", "idefics3"])
def test_where_all_weights_are_trained_the_tower_takes_its_weights_and_nothing_more(family):
    skeleton = skeleton_of(vision_model(family, torch.float32)[0])
    numbers, trained = sum(p.numel() for p in skeleton.parameters()), sum(p.numel() for p in train_text(skeleton))
    blocks = sum(p.numel() for block in skeleton.get_decoder().layers for p in block.parameters())
    one, two = (Estimate(skeleton, ranks).rows(flags(lora_r=0)) for ranks in (1, 2))
    assert trained < numbers
    assert one["policy weights"] == [4 * numbers] * 4 and two["policy weights"] == [2 * numbers] * 4
    assert one["gradients"][3] == 4 * trained and one["optimiser"][3] == 8 * trained
    assert two["whole gradients"][3] == (2 + 4) * (trained - blocks)


@pytest.mark.parametrize("family", ["llava", "gemma3", "idefics3", "qwen2_5_vl"])
def test_a_small_model_that_need_not_be_measured_is_small_with_its_tower(family):
    skeleton = skeleton_of(vision_model(family, torch.float32)[0])
    lora.add_adapter(skeleton, "policy", 4, 8)
    estimate, args = Estimate(skeleton), flags(gradient_checkpointing="auto")
    for tokens in (500, 20_000):
        assert estimate.checkpointing(args, estimate.total(args, tokens) / 0.9 - 1, tokens)
