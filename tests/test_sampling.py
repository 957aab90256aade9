"""sampling.py: prompts as in training, draws of the model's own distribution, a batch like single prompts, text."""

import random

import pytest
import torch
import transformers
from tiny_models import argmax_one_by_one, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from worlds import CHATML, char_tokenizer, ids, write_rows

from formats.chat_text import as_messages, prompt_ids
from preference_data import load_pairs
from sampling import RowDraws, closed, end_tokens, response_text, sample

TOKENIZER = char_tokenizer()  # its end of sequence is token 1, as the tiny models'
PROMPTS = [[5, 6, 7], [30], [9, 8, 7, 6, 5, 4, 3, 2, 40, 41], [50, 51], [5, 6, 7, 8, 9, 10]]


# -- draws ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "gpt2", "bloom"])
def test_temperature_0_is_the_likeliest_token_each_time_whatever_stands_beside_it_in_the_batch(name):
    model = tiny_model(name, torch.float32 if name == "bloom" else torch.float64)
    expected = [argmax_one_by_one(model, prompt, 12) for prompt in PROMPTS]
    assert sample(model, TOKENIZER, PROMPTS, 12, seed=0, temperature=0) == expected


def test_temperature_0_is_transformers_greedy_generate_one_prompt_at_a_time():
    model = tiny_model("llama", torch.float64)
    alone = []
    for prompt in PROMPTS:
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        alone.append(output[0, len(prompt) :].tolist())
    assert sample(model, TOKENIZER, PROMPTS, 12, seed=0, temperature=0) == alone
    assert len({tuple(response) for response in alone}) == len(PROMPTS)


def expected_shares(model, prompt, temperature=1.0, top_p=1.0):
    """The distribution of the first token, (V,): softmax, and of top_p the likeliest tokens that make up that share."""
    shares = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    ordered, order = shares.sort(descending=True)
    shares[order[ordered.cumsum(0) - ordered >= top_p]] = 0
    return shares / shares.sum()


def chi_square(drawn, shares):
    """(chi-square, degrees of freedom) of counts against shares; tokens of fewer than 5 expected draws count as one."""
    counts, expected = torch.bincount(torch.tensor(drawn), minlength=len(shares)).double(), shares * len(drawn)
    rare = expected < 5
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    possible = expected > 1e-9
    assert counts[~possible].sum() == 0  # nothing is drawn that cannot be
    return ((counts - expected)[possible] ** 2 / expected[possible]).sum().item(), int(possible.sum()) - 1


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"temperature": 0.5, "top_p": 0.8}], ids=str)
def test_the_first_token_is_drawn_from_the_models_softmax(settings):
    model, draws = tiny_model("qwen3"), 4000
    prompts = [prompt for prompt in PROMPTS[:3] for _ in range(draws)]  # of three lengths: two are padded
    drawn = [response[0] for response in sample(model, TOKENIZER, prompts, 1, seed=3, **settings)]
    for place, prompt in enumerate(PROMPTS[:3]):
        own = drawn[place * draws : (place + 1) * draws]
        value, freedom = chi_square(own, expected_shares(model, prompt, **settings))
        assert freedom >= 3
        assert value < freedom + 4 * (2 * freedom) ** 0.5  # mean and spread of chi-square: 4 sigma
        other, freedom = chi_square_or_more(own, expected_shares(model, PROMPTS[place - 1], **settings))
        assert other > 3 * freedom  # the test sees a wrong distribution


def chi_square_or_more(drawn, shares):
    try:
        return chi_square(drawn, shares)
    except AssertionError:
        return float("inf"), 1


def test_the_models_own_generation_settings_do_not_count_but_for_its_end_tokens():
    # Qwen2.5's instruct models bring repetition_penalty 1.1, Qwen3 top_k 20, top_p 0.95 and temperature 0.6.
    plain, changed = tiny_model("qwen3"), tiny_model("qwen3")
    own = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "min_p": 0.9, "min_new_tokens": 5, "top_k": 2}
    own |= {"suppress_tokens": [40], "bad_words_ids": [[9]], "temperature": 0.01, "top_p": 0.1, "do_sample": False}
    changed.generation_config = before = GenerationConfig(eos_token_id=1, pad_token_id=0, **own)
    for temperature in (0, 1):
        responses = [sample(model, TOKENIZER, PROMPTS * 8, 8, 0, temperature) for model in (plain, changed)]
        assert responses[0] == responses[1]
    assert changed.generation_config is before
    assert before.repetition_penalty == 3.0


def test_the_models_settings_and_mode_come_back_when_generation_fails(monkeypatch):
    model = tiny_model("qwen3").train()
    before = model.generation_config
    monkeypatch.setattr(type(model), "generate", lambda self, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, TOKENIZER, PROMPTS, 4, 0)
    assert model.generation_config is before
    assert model.training


@pytest.mark.parametrize("ends", [1, [1, 40, 41], None])
def test_a_response_ends_in_its_first_end_token_or_at_the_limit(ends):
    model = tiny_model("qwen3")
    model.generation_config.eos_token_id = ends
    known = {1, 40, 41} if isinstance(ends, list) else {1}
    assert end_tokens(model, TOKENIZER) == sorted(known)
    responses = sample(model, TOKENIZER, PROMPTS * 40, 30, seed=1)
    finished = [response for response in responses if response[-1] in known]
    assert 20 < len(finished) < 200
    assert all(known.isdisjoint(response[:-1]) for response in responses)
    assert all(len(response) == 30 for response in responses if response[-1] not in known)


def test_chance_is_the_seeds_alone_and_nothing_else_is_touched():
    model = tiny_model("qwen3").train()
    torch.manual_seed(5)
    random.seed(5)
    expected_next = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    first = sample(model, TOKENIZER, PROMPTS, 8, seed=1)
    assert torch.equal(torch.rand(3), expected_next[0]) and random.random() == expected_next[1]
    assert model.training
    assert sample(model, TOKENIZER, PROMPTS, 8, seed=1) == first
    assert sample(model, TOKENIZER, PROMPTS, 8, seed=2) != first


SETTINGS = [{}, {"temperature": 1.5, "top_p": 0.7}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gpt2"])
def test_a_row_draws_the_same_whatever_stands_beside_it_in_the_batch(name, settings):
    model, rows = tiny_model(name), [*PROMPTS, [12, 13], PROMPTS[0]]
    whole = sample(model, TOKENIZER, rows, 20, 3, **settings)
    alone = [sample(model, TOKENIZER, [row], 20, 3, places=[place], **settings)[0] for place, row in enumerate(rows)]
    assert alone == whole
    order = [4, 0, 6, 2, 5, 1, 3]
    moved = sample(model, TOKENIZER, [rows[place] for place in order], 20, 3, places=order, **settings)
    assert moved == [whole[place] for place in order]
    halves = [sample(model, TOKENIZER, rows[i::2], 20, 3, places=range(i, 7, 2), **settings) for i in (0, 1)]
    assert (halves[0], halves[1]) == (whole[::2], whole[1::2])
    assert whole[0] != whole[6]  # the same prompt in another place
    assert sample(model, TOKENIZER, rows, 20, 3, places=range(1, 8), **settings) != whole


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_token_is_the_first_whose_cumulative_share_exceeds_the_rows_number(settings):
    """By whole forward passes, and the numbers of Python's generator, seeded with the text `seed place`."""
    model = tiny_model("qwen3", torch.float64)
    for place, response in zip((7, 0, 3), sample(model, TOKENIZER, PROMPTS[:3], 12, 5, places=(7, 0, 3), **settings)):
        stream, prompt, expected = random.Random(f"5 {place}"), PROMPTS[(7, 0, 3).index(place)], []
        while len(expected) < 12 and expected[-1:] != [1]:
            sums, number = expected_shares(model, prompt + expected, **settings).cumsum(0), stream.random()
            expected.append(next(token for token, below in enumerate(sums.tolist()) if below > number))
        assert response == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_and_the_largest_number_draw_no_token_without_a_share(dtype):
    for shift in range(50):  # sums that are rounded up and down
        scores = torch.tensor([[-torch.inf, 0.3, 0.1, -shift / 50, -torch.inf]]).repeat(2, 1)
        numbers = torch.tensor([[0.0], [1 - 2**-23]], dtype=dtype)
        assert RowDraws(numbers, 4)(torch.zeros(2, 4), scores).argmax(-1).tolist() == [1, 3]


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_broken_model_is_told_and_not_sampled(weight):
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = weight
    with pytest.raises(FloatingPointError, match="no finite probabilities"):
        sample(model, TOKENIZER, PROMPTS, 4, 0)


# -- prompts ----------------------------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "so"},
]


@pytest.mark.parametrize("length", [256, 24])  # 24: the last turn of the chat, and three of four questions
@pytest.mark.parametrize("around", [{}, {"before": "<s>"}, {"before": "<s>", "after": "</s>"}], ids=str)
def test_a_prompt_has_the_ids_that_it_has_in_training(tmp_path, around, length):
    tokenizer = char_tokenizer(template=CHATML, **around)
    chat = {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
    for row, prompt in (
        ({"prompt": "How so? " * 4, "chosen": "a", "rejected": "b"}, "How so? " * 4),
        ({"prompt": MESSAGES, **chat}, MESSAGES),
    ):
        (pair,), _ = load_pairs(str(write_rows(tmp_path / "rows.jsonl", [row])), tokenizer, 300, length)
        assert prompt_ids(prompt, tokenizer, length) == pair.prompt_ids
    wrapped = as_messages("\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: so\n\nAssistant:", "", "")[0]
    assert wrapped == MESSAGES


def test_a_long_prompt_loses_its_beginning_but_for_the_first_token_of_all():
    assert prompt_ids("abcdef", TOKENIZER, 4) == ids("cdef")
    assert prompt_ids("abcdef", char_tokenizer(before="<s>"), 4) == [0, *ids("def")]


def test_an_empty_prompt_is_a_token_that_can_predict_the_next():
    assert prompt_ids("", TOKENIZER, 4) == [1]
    assert prompt_ids("", char_tokenizer(before="<s>"), 4) == [0]


# -- text --------------------------------------------------------------------------------------------------------------


def word_tokenizer():
    """Like SentencePiece's: a blank is part of the word behind it, and the first one of a text is not written."""
    vocab = {"<unk>": 0, "</s>": 1, "▁Say": 2, "▁hello": 3, "▁world": 4, "!": 5}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_a_response_keeps_the_blank_between_it_and_its_prompt():
    tokenizer = word_tokenizer()
    assert tokenizer.decode([3, 4]) == "hello world"  # the trap
    assert response_text([2], [3, 4, 1], [1], tokenizer) == " hello world"
    assert response_text([2, 3], [5, 1], [1], tokenizer) == "!"


def test_special_tokens_are_no_text():
    assert response_text(ids("ab"), [*ids("cd"), 2, *ids("e"), 1], [1], TOKENIZER) == "cde"
    assert response_text([2, *ids("ab"), 3], [1], [1], TOKENIZER) == ""


def test_a_prompt_cut_within_a_character_does_not_swallow_the_response():
    backend = Tokenizer(models.BPE({c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    whole, answer = tokenizer("é").input_ids, tokenizer("ü!").input_ids
    assert len(whole) == 2
    assert response_text(whole, answer, [1], tokenizer) == "ü!"
    assert response_text(whole[1:], answer, [1], tokenizer) == "ü!"  # its prompt begins in the middle
    assert response_text(whole[:1], answer, [1], tokenizer) == "ü!"  # and this one ends there


def test_blanks_are_not_tidied():
    tokenizer = char_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True  # as Llama 3's settings have it
    assert response_text(ids("a"), ids("b . c ?"), [1], tokenizer) == "b . c ?"


def test_a_streamer_gets_the_one_response():
    class Streamer(transformers.generation.streamers.BaseStreamer):
        tokens, ended = [], False

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Streamer()
    (response,) = sample(tiny_model("qwen3"), TOKENIZER, [[5, 6, 7]], 6, seed=0, streamer=streamer)
    assert (streamer.tokens, streamer.ended) == ([5, 6, 7, *response], True)


# -- the end -----------------------------------------------------------------------------------------------------------


def test_sampling_stops_at_the_end_of_a_turn_and_a_finished_response_is_closed_as_in_training(tmp_path):
    """A model whose own settings do not know the token in which the template ends a turn (Gemma, Qwen2.5 base)."""
    tokenizer, model = char_tokenizer(template=CHATML), tiny_model("qwen3", vocab_size=200)
    assert end_tokens(model, tokenizer) == [1, 3]
    row = {"prompt": MESSAGES, "chosen": [{"role": "assistant", "content": "a"}]}
    row["rejected"] = [{"role": "assistant", "content": "b"}]
    (pair,), _ = load_pairs(str(write_rows(tmp_path / "rows.jsonl", [row])), tokenizer, 300, 200)
    assert (pair.chosen_ids, pair.end) == ([97, 3], 3)
    for ended in ([97, 3], [97, 1]):  # whichever it stopped at
        assert closed(ended, [1, 3], pair.end) == pair.chosen_ids
        assert response_text(pair.prompt_ids, ended, [1, 3], tokenizer) == "a"
    assert closed([97, 98], [1, 3], 3) == [97, 98]  # it ran out of room: no end
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens alike: one in a hundred is an end
    responses = sample(model, tokenizer, [pair.prompt_ids] * 64, 100, seed=0)
    assert {response[-1] for response in responses if len(response) < 100} == {1, 3}
    assert all({1, 3}.isdisjoint(response[:-1]) for response in responses)
