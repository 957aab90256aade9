"""Answers to prompts with pictures, and scores of reward models on them, on each family: against the model's own
forward on one whole sequence at a time, without a cache, from pixels.
"""

import pytest
import torch
from tiny_vision import FAMILIES, IMAGE, PACKED, PLAIN, Processed, family, vision_model, with_response
from worlds import char_tokenizer

from formats.model_files import load_model
from harness.score_cache import base_sha256
from lora_targets import train_text
from packed_model import prepare_scores
from packing import pack
from sampling import RowDraws, random_numbers, sample

TOKENIZER = char_tokenizer()
ALL = [build.__name__ for build in (*PACKED, *PLAIN)]
NEW, END = 6, 1  # tokens; the one that ends an answer


@torch.no_grad()
def answered_alone(model, prompt, given, choose):
    """NEW tokens by whole forwards; choose(step, logits (V,)) -> token."""
    ids = list(prompt)
    for step in range(NEW):
        beside = with_response(model, given, len(prompt), len(ids) - len(prompt))
        logits = model(input_ids=torch.tensor([ids]), use_cache=False, **beside).logits[0, -1]
        logits[IMAGE] = -torch.inf
        if getattr(model.config, "video_token_id", None) == 151:  # of Qwen-VL; elsewhere it is beyond the vocabulary
            logits[151] = -torch.inf
        ids.append(choose(step, logits))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_prompts_is_answered_as_each_by_itself(name, temperature):
    """With one picture, two of other sizes, none: of different lengths, so that rows are padded."""
    model, _, pairs, raw = family(name)
    prompts, pictures = [pair.prompt_ids for pair in pairs], [pair.pictures for pair in pairs]
    found = sample(model, TOKENIZER, prompts, NEW, seed=3, temperature=temperature, pictures=pictures)
    for place, (prompt, _, _, given) in enumerate(raw):
        draws = RowDraws(random_numbers(3, [place], NEW, torch.device("cpu")), len(prompt))

        def drawn(step, logits, draws=draws, prompt=prompt):
            return draws(torch.zeros(1, len(prompt) + step), logits[None]).argmax().item()

        choose = drawn if temperature else lambda step, logits: logits.argmax().item()
        assert found[place] == answered_alone(model, prompt, given, choose)


def test_pictures_of_others_would_be_seen():
    model, _, pairs, _ = family("llava")
    first, fourth = pairs[0], pairs[3]
    prompts = [first.prompt_ids, fourth.prompt_ids]
    exchanged = [Processed(first.prompt_ids, fourth.pictures.given, ("sha 3",))]
    exchanged.append(Processed(fourth.prompt_ids, first.pictures.given, ("sha 0",)))
    right = sample(model, TOKENIZER, prompts, NEW, seed=3, temperature=0, pictures=[first.pictures, fourth.pictures])
    assert sample(model, TOKENIZER, prompts, NEW, seed=3, temperature=0, pictures=exchanged) != right


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("with_pictures", [True, False])
def test_the_token_that_stands_for_a_picture_is_never_said(with_pictures, temperature):
    model, _, pairs, _ = family("llava")

    def prefer_images(module, args, output):
        output.logits[..., IMAGE] += 100
        return output

    model.register_forward_hook(prefer_images)
    seeing = pairs if with_pictures else pairs[2:3]
    prompts, pictures = [pair.prompt_ids for pair in seeing], [pair.pictures for pair in seeing]
    for response in sample(model, TOKENIZER, prompts, NEW, seed=3, temperature=temperature, pictures=pictures):
        assert response and IMAGE not in response


# -- reward models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_base_gets_a_head_of_zeros_and_is_the_base_of_the_policy(name, tmp_path):
    model, _ = vision_model(name, torch.float32)
    model.save_pretrained(tmp_path)
    scoring = load_model(tmp_path, torch.float32, "cpu", scores=True)
    assert scoring.score.weight.shape == (1, 32) and not scoring.score.weight.any()
    assert base_sha256(scoring) == base_sha256(model)
    assert not hasattr(scoring, "lm_head")
    trained = set(train_text(scoring))
    names = {name for name, parameter in scoring.named_parameters() if parameter in trained}
    assert "score.weight" in names and not [name for name in names if "vision" in name or "visual" in name]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_scores_equal_those_of_the_last_hidden_state_one_by_one(name, tmp_path):
    base, raw = vision_model(name, torch.float32)
    base.save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32, "cpu", scores=True)
    model.score.weight.normal_()
    pairs = family(name)[2]
    prepare_scores(model, pack(pairs[:1]))
    got = torch.stack(model.packed_scores(pack(pairs)))
    for side in (1, 2):
        for place, (prompt, *responses, given) in enumerate(raw):
            ids = torch.tensor([prompt + responses[side - 1]])
            beside = with_response(base, given, len(prompt), len(responses[side - 1]))
            beside = {key: value.float() if value.is_floating_point() else value for key, value in beside.items()}
            end = base.base_model(input_ids=ids, use_cache=False, **beside).last_hidden_state[0, -1]
            assert got[side - 1, place].item() == pytest.approx(
                (end @ model.score.weight[0]).item(), rel=1e-4, abs=1e-4
            )


def test_a_reward_model_of_all_weights_comes_back_whole(tmp_path):
    base, raw = vision_model("llava", torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", torch.float32, "cpu", scores=True)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(tmp_path / "whole")
    again = load_model(tmp_path / "whole", torch.float32, "cpu", scores=True)
    assert torch.equal(again.score.weight, model.score.weight)
    assert base_sha256(again) == base_sha256(base)
