"""chat_text.py: templates of the usual families -> the text, its end, its cut; what a template drops is said."""

import json
from datetime import datetime

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from worlds import assistant, load, system, user, write_rows

from formats import chat_text, model_files, row_prompts
from formats.chat_text import as_messages, prompt_ids, prompt_text, render, response_end, turn_end
from formats.row_files import DataError, Unusable


def turns(start, end, header="{% if add_generation_prompt %}{{ '" + "S" + "assistant\n' }}{% endif %}", trim=""):
    """A template of turns like ChatML's."""
    one = "{{ '" + start + "' + m['role'] + '\n' + m['content']" + trim + " + '" + end + "\n' }}"
    return "{% for m in messages %}" + one + "{% endfor %}" + header.replace("S", start)


CHATML = turns("<|im_start|>", "<|im_end|>")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
DATED = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
REASONING = (  # DeepSeek-R1's distilled models: the thought goes, and generation begins with a thought
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = turns("<|", "<|end|>", "{% if add_generation_prompt %}<|assistant\n{% else %}{{ eos_token }}{% endif %}")
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + END + '\n' }}{% endfor %}"
PLAIN += "{% if add_generation_prompt %}assistant: {% endif %}"
FAMILIES = {  # template, BOS, EOS, special tokens, the end of a response; the text behind "x" at the end of a chat
    "Gemma": (
        NO_SYSTEM + "{{ bos_token }}" + turns("<t>", "</t>", trim=" | trim"),
        "<bos>",
        "<eos>",
        "<t> </t>",
        "</t>",
    ),
    "Phi-3": (PHI_3, "<s>", "<|endoftext|>", "<|end|>", "<|end|>"),
    "Qwen2.5 base": (CHATML, None, "<|endoftext|>", "<|im_start|> <|im_end|>", "<|im_end|>"),
    "ChatML": (CHATML, None, "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    "Llama 2": (LLAMA_2, "<s>", "</s>", "", "</s>"),
    "Zephyr": (turns("<|u|>", "</s>"), "<s>", "</s>", "", "</s>"),
    "Llama 3": ("{{ bos_token }}" + turns("<|h|>", "<|eot_id|>"), "<b>", "<e>", "<|h|> <|eot_id|>", "<|eot_id|>"),
    "DeepSeek-R1": (REASONING, "<|begin|>", "<|end|>", "<|user|> <|assistant|>", "<|end|>"),
    "only the answer has an end": (
        PLAIN.replace("END", "('</a>' if m.role == 'assistant' else '')"),
        None,
        "<eos>",
        "</a>",
        "</a>",
    ),  # fmt: skip
    "no token": (PLAIN.replace("END", "''"), "<s>", "</s>", "", "</s>"),
}


def bpe_tokenizer(template=CHATML, bos=None, eos="<|im_end|>", special="<|im_start|>", plain=()):
    """Byte-level BPE with merges of a few words; it writes a BOS before a text by itself, where there is one."""
    special = special.split()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[*([bos] if bos else []), eos, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the capital of France is Paris user assistant system alpha beta gamma"] * 3, trainer
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if bos:
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    names = {"eos_token": eos, "additional_special_tokens": special} | ({"bos_token": bos} if bos else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = template
    return fast


def family(name):
    *words, end = FAMILIES[name]
    tokenizer = bpe_tokenizer(*words)
    return tokenizer, tokenizer.convert_tokens_to_ids(end)


def row(prompt, chosen="4", rejected="5"):
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def texts(tmp_path, tokenizer, *rows, **options):
    """([decoded (prompt, chosen, rejected)], the report without row 0) of rows."""
    pairs, report = load(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, **options)
    return [tuple(map(tokenizer.decode, pair[:3])) for pair in pairs], [
        line for line in report[1:] if "row 0" not in line
    ]


# -- the end of a response --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_response_ends_in_the_one_token_that_ends_the_assistants_turn(tmp_path, name):
    tokenizer, end = family(name)
    assert turn_end(tokenizer) == response_end([user("a")], tokenizer) == end
    assert response_end("a", tokenizer) == tokenizer.eos_token_id
    (pair,), _ = load(write_rows(tmp_path / "rows.jsonl", [row([user("2+2?")])]), tokenizer)
    for response, said in ((pair.chosen_ids, "4"), (pair.rejected_ids, "5")):
        assert response[-1] == end and {end, tokenizer.eos_token_id}.isdisjoint(response[:-1])
        assert tokenizer.decode(response[:-1]).strip() == said
    assert pair.end == (None if end == tokenizer.eos_token_id else end)
    (plain,), _ = load(write_rows(tmp_path / "s.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]), tokenizer)
    assert plain.chosen_ids[-1] == tokenizer.eos_token_id and plain.end is None


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name not in ("DeepSeek-R1", "only the answer has an end")]
)
def test_strings_that_are_rendered_already_are_the_chat(tmp_path, name):
    """No second BOS, no second end: the ids of the messages, but for a BOS that a template leaves to the tokenizer."""
    tokenizer, _ = family(name)
    prompt = prompt_text([user("2+2?")], tokenizer)
    strings = {"prompt": prompt}
    for side, said in (("chosen", "4"), ("rejected", "5")):
        strings[side] = render([user("2+2?"), assistant(said)], tokenizer)[len(prompt) :]
    (chat,), _ = load(write_rows(tmp_path / "chat.jsonl", [row([user("2+2?")])]), tokenizer)
    (pair,), _ = load(write_rows(tmp_path / "strings.jsonl", [strings]), tokenizer)
    bos = tokenizer.bos_token_id
    added = [bos] * (bos is not None and chat.prompt_ids[0] != bos)
    assert pair._replace(prompt_ids=None) == chat._replace(prompt_ids=None)
    assert pair.prompt_ids == added + chat.prompt_ids == prompt_ids(prompt, tokenizer, 99)


def test_an_end_in_the_middle_of_a_plain_string_stays(tmp_path):
    tokenizer = bpe_tokenizer(None, eos="</s>", special="")
    rows = {"prompt": "a", "chosen": "b</s> c", "rejected": "d</s>\n</s> "}
    assert texts(tmp_path, tokenizer, rows)[0] == [("a", "b</s> c</s>", "d</s>")]


# -- the beginning of an answer, code, dates --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_the_prompt_begins_is_continued(tmp_path, name):
    tokenizer, end = family(name)
    prompt = [user("Where?"), assistant("The capital is")]
    ((start, chosen, rejected),), _ = texts(tmp_path, tokenizer, row(prompt, " Paris", " Rome"))
    header = render([user("Where?"), assistant("The capital is Paris")], tokenizer).partition("The capital is")[0]
    assert start == header + "The capital is"
    assert [tokenizer.decode(end) in said for said in (start.removeprefix(header), chosen)] == [False, True]
    assert chosen.startswith(" Paris") and rejected.startswith(" Rome")
    assert tokenizer.decode(prompt_ids(prompt, tokenizer, 99)) == start


def test_a_transcript_that_ends_in_words_of_the_assistant_is_continued(tmp_path):
    strings = {"prompt": "\n\nHuman: Where?\n\nAssistant: In ", "chosen": "Paris\n", "rejected": " Rome"}
    (pair,), _ = texts(tmp_path, bpe_tokenizer(), strings, chat_template_strings=True)
    assert pair[0].endswith("<|im_start|>assistant\nIn") and pair[1:] == (" Paris<|im_end|>", "  Rome<|im_end|>")


@pytest.mark.parametrize(
    ("response", "words"),
    [
        ("    return x\n", "    return x"),
        ("\n\n    a\n    b", "    a\n    b"),
        ("\treturn x", "\treturn x"),
        ("  a\n", "  a"),
        (" Yes.\n\n", "Yes."),
        ("\n \nYes.", "Yes."),
    ],
)
def test_code_keeps_its_indentation(response, words):
    messages, [chosen], _ = as_messages("    x = 1\nMend it.\n", response, "no")
    assert (messages[0]["content"], chosen["content"]) == ("    x = 1\nMend it.", words)
    messages, [chosen], _ = as_messages("\n\nHuman:  Hi.\n\nAssistant:", f"\n{response}", "no")  # two blanks: typed so
    assert (messages[0]["content"], chosen["content"]) == ("Hi.", words)


def test_a_template_writes_the_same_date_every_day(tmp_path):
    tokenizer = bpe_tokenizer("{{ strftime_now('%A %-d %B %Y, %Y-%m-%d') }}" + CHATML)
    assert render([user("a")], tokenizer).startswith("Friday 26 July 2024, 2024-07-26<|im_start|>")
    assert render([user("a")], tokenizer, day=datetime(2031, 1, 5)).startswith("Sunday 5 January 2031, 2031-01-05<|im")
    assert f"{datetime.now():%Y-}" in render([user("a")], tokenizer, day=None)
    _, report = texts(tmp_path, bpe_tokenizer(DATED), row([user("a")]))
    assert report == ["  the chat template writes a date: 26 Jul 2024 in every run"]
    plain = CHATML.replace("user", "\n\nuser")
    assert render([user("a")], bpe_tokenizer(plain)) == bpe_tokenizer(plain).apply_chat_template(
        [user("a")], tokenize=False
    )


def test_arguments_of_a_row_reach_the_template():
    tokenizer = bpe_tokenizer("{% if shout %}{{ 'LOUD ' }}{% endif %}" + CHATML)
    for text in (
        prompt_text([user("a")], tokenizer, shout=True),
        tokenizer.decode(prompt_ids([user("a")], tokenizer, 99, shout=True)),
    ):
        assert text == "LOUD <|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


# -- cuts -------------------------------------------------------------------------------------------------------------

TALK = [system("Be brief."), user("first question"), assistant("one"), user("second question"), assistant("two")]


def lengths_of(tokenizer, *chats):
    return [len(tokenizer(prompt_text(chat, tokenizer), add_special_tokens=False)["input_ids"]) for chat in chats]


def test_whole_turns_go_first_and_the_system_message_stays():
    tokenizer = bpe_tokenizer()
    talk = [*TALK, user("the end?")]
    chats = [talk, talk[:1] + talk[3:], talk[:1] + talk[5:]]
    sizes = lengths_of(tokenizer, *chats)
    for chat, size, longer in zip(chats, sizes, (999, *sizes)):
        for room in (size, longer - 1):
            assert tokenizer.decode(prompt_ids(chat, tokenizer, room)) == prompt_text(chat, tokenizer)
            assert prompt_ids(talk, tokenizer, room) == prompt_ids(chat, tokenizer, 999)


@pytest.mark.parametrize("name", FAMILIES)
def test_words_are_cut_and_headers_stay(name):
    tokenizer, _ = family(name)
    words = "alpha beta gamma é 你好 " * 40 + "the end?"
    (bare,) = lengths_of(tokenizer, [user("")])
    for room in range(bare + 1, bare + 60, 7):
        ids = prompt_ids([user("older"), assistant("turn"), user(words)], tokenizer, room)
        text = tokenizer.decode(ids)
        assert room - 3 <= len(ids) <= room  # a character is three tokens at most
        kept = next(words[-n:] for n in range(len(words), -1, -1) if prompt_text([user(words[-n:])], tokenizer) == text)
        assert words.endswith(kept)
    with pytest.raises(Unusable, match="no room"):
        prompt_ids([user(words)], tokenizer, bare)


def test_the_longest_words_are_cut_be_they_the_systems():
    tokenizer = bpe_tokenizer()
    chat = [system("alpha " * 99 + "rule."), user("the question?")]
    text = tokenizer.decode(prompt_ids(chat, tokenizer, 60))
    assert text.endswith(
        "alpha alpha rule.<|im_end|>\n<|im_start|>user\nthe question?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text.startswith("<|im_start|>system\n")


def test_training_cuts_a_chat_as_sampling_does(tmp_path):
    tokenizer = bpe_tokenizer()
    prompt = [system("Be brief."), user("alpha beta " * 50), assistant("so"), user("gamma " * 50 + "the end?")]
    rows = [row(prompt), row([user("short")])]
    pairs, report = load(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, max_prompt_length=60)
    assert [pair.prompt_ids for pair in pairs] == [prompt_ids(r["prompt"], tokenizer, 60) for r in rows]
    assert len(pairs[0].prompt_ids) == 60 and tokenizer.decode(pairs[0].chosen_ids) == "4<|im_end|>"
    assert "  cut 1 pairs to --max-length 512 or --max-prompt-length 60" in report


def test_headers_that_leave_no_room_leave_the_row_out(tmp_path):
    with pytest.raises(
        DataError, match="1 because the chat template's own words leave no room within --max-prompt-len"
    ):
        texts(tmp_path, bpe_tokenizer(), row([user("a")]), max_prompt_length=5)


# -- what is said -----------------------------------------------------------------------------------------------------


def test_what_a_template_drops_is_counted_and_said_once(tmp_path):
    thought = "<think>\nadd them\n</think>\n\n4"
    rows = [row([user("2+2?")], thought, thought.replace("4", "five")), row([user("3+3?")], "6", "7")]
    rows.append(row([user("2"), assistant(thought), user("3")], "a", "b"))
    rows.append(row([user("2")], thought, thought.replace("add", "do")))  # equal without what was thought
    tokenizer, _ = family("DeepSeek-R1")
    got, report = texts(tmp_path, tokenizer, *rows)
    assert [pair[1] for pair in got] == ["\n\n4<|end|>", "6<|end|>", "a<|end|>"]
    path = tmp_path / "rows.jsonl"
    assert report == [
        f"  left out 1 rows: 1 because the two responses are equal as the model reads them; the first is {path}:4: "
        "the two responses are equal as the model reads them",
        f"  in 3 pairs the prompt in training is not that of generation; the first is {path}:1, and lacks '<think>\\n'",
        f"  in 1 pairs the chat template drops text of the responses; the first is {path}:1, 44 of 49 characters",
        f"  in 1 pairs the chat template drops text of the prompt; the first is {path}:3, 21 of 25 characters",
    ]


def test_a_template_that_trims_code_is_said_and_one_that_keeps_all_is_not(tmp_path):
    code = row([user("f")], "    return x", "    return\n    y")
    trims = bpe_tokenizer(turns("<|im_start|>", "<|im_end|>", trim=" | trim"))
    where = f"the first is {tmp_path / 'rows.jsonl'}:1"
    _, report = texts(tmp_path, trims, code)
    assert report == [f"  in 1 pairs the chat template drops text of the responses; {where}, 8 of 22 characters"]
    for tokenizer, plain in ((bpe_tokenizer(), code), (trims, row([system(" s\n"), user("\n\nq ")], " a\n b ", "c"))):
        assert texts(tmp_path, tokenizer, plain)[1] == []


def test_a_thought_that_the_prompt_of_generation_begins_is_not_dropped(tmp_path):
    tokenizer = bpe_tokenizer(
        turns("<|im_start|>", "<|im_end|>") + "{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    thought = "<think>\nadd them\n</think>\n\n4"  # Qwen3.5 and Nemotron: of this, the prompt has the first line
    got, report = texts(tmp_path, tokenizer, row([user("2+2?")], thought, thought.replace("4", "five")))
    assert got[0][0].endswith("assistant\n<think>\n") and got[0][1] == "add them\n</think>\n\n4<|im_end|>"
    assert report == []


def test_a_system_message_that_a_template_leaves_out_is_said(tmp_path):
    tokenizer = bpe_tokenizer("{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML)
    _, report = texts(tmp_path, tokenizer, row([system("Be brief."), user("a")]), row([user("a")]))
    assert report == [
        f"  in 1 pairs the chat template drops text of the prompt; the first is {tmp_path / 'rows.jsonl'}:1, "
        "8 of 9 characters"
    ]


def test_turns_of_the_user_inside_responses_are_counted(tmp_path):
    talk = [[assistant(said), user("So?"), assistant("Yes.")] for said in ("Hello", "What")]
    rows = [{"prompt": [user("Hi")], "chosen": talk[0], "rejected": talk[1]}, row([user("a")])]
    _, report = texts(tmp_path, bpe_tokenizer(), *rows)
    where = f"the first is {tmp_path / 'rows.jsonl'}:1"
    assert report == [f"  in 1 pairs the responses hold turns of the user, which carry loss; {where}"]


def test_a_prompt_that_is_rendered_already_and_gets_the_template_again_is_said(tmp_path):
    strings = {"prompt": prompt_text([user("a")], bpe_tokenizer()), "chosen": "b", "rejected": "c"}
    _, report = texts(tmp_path, bpe_tokenizer(), strings, chat_template_strings=True)
    what = "the prompt's words hold the end of a turn, as the chat template writes it"
    assert report == [f"  in 1 pairs {what}; the first is {tmp_path / 'rows.jsonl'}:1"]
    assert texts(tmp_path, bpe_tokenizer(), strings)[1] == []


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (NO_SYSTEM + CHATML, "the chat template refuses its messages .System role not supported."),
        ("{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML, "drops it"),
    ],
)
def test_a_preference_without_a_place_names_the_other_place(tmp_path, template, reason):
    path = write_rows(tmp_path / "rows.jsonl", [row([user("a")])])
    prefer = lambda prompt: [system("Be brief."), *prompt]
    for skip_invalid in (False, True):
        with pytest.raises(DataError, match=rf"^{path}:1: no place .*{reason}.*: use --preference-position user$"):
            load(path, bpe_tokenizer(template), prefer=prefer, skip_invalid=skip_invalid)


def test_a_cut_chat_and_its_preference_say_the_same_words(tmp_path):
    tokenizer, json_row = (
        bpe_tokenizer(),
        row([user("alpha beta " * 50), assistant("so"), user("gamma " * 60 + "end?")]),
    )
    prefer = lambda prompt: [system("Be brief."), *prompt]
    before = json.dumps(json_row)
    (pair,), _ = load(write_rows(tmp_path / "rows.jsonl", [json_row]), tokenizer, max_prompt_length=50, prefer=prefer)
    said = tokenizer.decode(pair.prompt_ids)
    assert tokenizer.decode(pair.prompted_ids) == "<|im_start|>system\nBe brief.<|im_end|>\n" + said
    assert json.dumps(json_row) == before and len(pair.prompt_ids) == 50


def test_a_tokenizers_own_words_that_are_not_special_end_a_turn_too():
    tokenizer = bpe_tokenizer(eos="</s>", plain=["<|im_end|>"])
    assert tokenizer.decode([chat_text.turn_end(tokenizer)]) == "<|im_end|>"


def test_a_whole_model_that_is_saved_stops_at_the_end_of_a_turn(tmp_path):
    """Other tools read generation_config.json; a base model's knows the end of a text alone."""
    tokenizer, end = family("Qwen2.5 base")
    for known, ends in ((None, [end]), (0, [0, end]), ([0, end], [0, end])):
        GenerationConfig(eos_token_id=known).save_pretrained(tmp_path)
        model_files.save_tokenizer(tokenizer, tmp_path)
        assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == ends
    model_files.save_tokenizer(tokenizer, tmp_path / "adapter")
    assert not (tmp_path / "adapter/generation_config.json").exists()
    assert (tmp_path / "adapter/tokenizer.json").exists()


@pytest.mark.parametrize("again", ["", "It is"])
def test_a_beginning_that_both_responses_repeat_stands_once(again):
    prompt = [user("Capital of France?"), assistant("It is")]
    row = {"prompt": prompt, "chosen": [assistant(again + " Paris.")], "rejected": [assistant(again + " Lyon.")]}
    asked, chosen, rejected = row_prompts.parted(row["prompt"], row["chosen"], row["rejected"])
    assert asked == prompt
    assert [chosen[0]["content"], rejected[0]["content"]] == [" Paris.", " Lyon."]
