"""learn_prompt.py: where the vectors start, what they are trained to, files that PEFT loads; and what it and
train_with_preference_prompt.py do to the toy world.
"""

import json
import math

import pytest
import torch
from peft import PeftModel
from runs import metrics_of, one_line, run_script
from safetensors.torch import load_file
from tiny_models import logps_of_one, tiny_model
from transformers import AutoModelForCausalLM
from worlds import CHATML, char_tokenizer

import learn_prompt
import lora
import toy_world
import train_with_preference_prompt
from formats.model_files import load_model, load_tokenizer
from packed_model import prepare_model
from packing import pack
from preference_data import Pair, load_pairs
from preference_prompt import read_soft_prompt, use_soft_prompt, with_virtual_tokens

QUICK = """--dtype fp32 --device cpu --report-to none --learning-rate 1e-2 --batch-size 4 --max-length 64
    --gradient-accumulation-steps 2 --max-prompt-length 32 --eval-samples 4 --logging-steps 1 --beta 1""".split()
TEXT = "Be nice!"
STILL = ["--learning-rate", 1e-12, "--max-steps", 1]  # what is saved is what training started from


@pytest.fixture
def learn(world, tmp_path, capsys):
    """learn(name, words ...) -> (folder, lines of metrics.jsonl, vectors)."""

    def run(name, *words, text=TEXT):
        where = ["--model", world / "model", "--dataset-path", world / "pairs.jsonl", "--output-dir", tmp_path / name]
        where += [] if text is None else ["--preference-text", text]
        run_script([*where, *QUICK, *words], learn_prompt)
        return tmp_path / name, metrics_of(tmp_path / name), read_soft_prompt(tmp_path / name, 32)[0]

    return run


@pytest.fixture(scope="module")
def embeddings(world):
    return load_file(world / "model/model.safetensors")["model.embed_tokens.weight"]  # of token n, an ASCII number


# -- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num, says", [(None, TEXT), (3, TEXT[:3]), (len(TEXT) + 2, TEXT + TEXT[:2])])
def test_a_text_is_repeated_and_cut(learn, embeddings, num, says):
    _, _, vectors = learn("out", *STILL, *(["--num-virtual-tokens", num] if num else []))
    assert torch.equal(vectors, embeddings[[ord(letter) for letter in says]])


def test_random_tokens_and_noise_of_their_size(learn, embeddings):
    drawn = {}
    for init in ("vocab", "random"):
        for seed in (1, 2):
            words = ["--prompt-init", init, "--seed", seed]
            drawn[init, seed] = learn(f"{init}{seed}", *STILL, *words, text=None)[2]
            assert drawn[init, seed].shape == (20, 32)
        assert not torch.equal(drawn[init, 1], drawn[init, 2])
    for seed in (1, 2):
        is_row = (drawn["vocab", seed][:, None] == embeddings).all(-1)  # (20, 128)
        assert is_row.any(1).all() and is_row.any(0).sum() > 10
        assert not (drawn["random", seed][:, None] == embeddings).all(-1).any()
        noise = drawn["random", seed]
        assert noise.std().item() == pytest.approx(embeddings.std().item(), rel=0.15)
        assert abs(noise.mean().item()) < 4 * noise.std().item() / math.sqrt(640)


def test_gemmas_vectors_are_scaled_as_its_layer_scales_them(learn, tmp_path):
    model = tiny_model("gemma3", vocab_size=128)
    model.save_pretrained(tmp_path / "gemma")
    char_tokenizer(template=CHATML).save_pretrained(tmp_path / "gemma")
    _, _, vectors = learn("out", *STILL, "--model", tmp_path / "gemma", text="hi")
    expected = model.get_input_embeddings().weight[[ord("h"), ord("i")]] * math.sqrt(32)
    torch.testing.assert_close(vectors, expected.detach(), rtol=1e-6, atol=0)


# -- training ---------------------------------------------------------------------------------------------------------


def test_what_is_trained_is_what_plain_forwards_measure(learn, world):
    """Rewards of the held-out pairs before and after: beta times what the vectors in front do to each response."""
    folder, metrics, vectors = learn("out", "--test-dataset-path", world / "pairs.jsonl", "--eval-samples", 6)
    model = load_model(world / "model", torch.float64, "cpu")
    pairs, _ = load_pairs(str(world / "pairs.jsonl"), load_tokenizer(world / "model"), 64, 32, limit=6)
    text = torch.tensor([ord(letter) for letter in TEXT])
    for line, soft in ((metrics[0], model.get_input_embeddings()(text)), (metrics[-1], vectors.double())):
        with torch.no_grad():
            rewards = [
                [logps_of_one(model, p[0], p[side], soft) - logps_of_one(model, p[0], p[side]) for side in (1, 2)]
                for p in pairs
            ]
        chosen, rejected = torch.tensor(rewards).T
        assert line["eval_rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4)
        assert line["eval_rewards/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-4)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean().item()
        assert line["eval_loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert metrics[-1]["eval_loss"] < 0.8 * metrics[0]["eval_loss"]
    behind, _, other = learn("behind", "--preference-position", "before-response")
    assert read_soft_prompt(behind, 32)[1] == "before-response" and not torch.equal(other, vectors)
    assert read_soft_prompt(folder, 32)[1] == "prefix"


def test_the_model_stays_as_it_was_to_the_last_bit(learn, world, monkeypatch):
    loaded, plain = [], AutoModelForCausalLM.from_pretrained

    def kept(*given, **named):
        found = plain(*given, **named)  # the model, and what its file had of it
        loaded.append(found[0])
        return found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", kept)
    learn("out")
    (model,) = loaded
    before = load_file(world / "model/model.safetensors")
    after = dict(model.state_dict())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


# -- files ------------------------------------------------------------------------------------------------------------


def test_peft_loads_the_folder_and_gives_the_same_log_probs(learn, world):
    folder, _, vectors = learn("out", "--learning-rate", 0.1)
    found = torch.load(folder / "prompt_embeddings.pt", weights_only=True)
    assert torch.equal(found["prompt_embeddings"], vectors) and vectors.shape == (len(TEXT), 32)
    assert {"README.md", "args.json", "trainer_state.json", "learn_prompt.py"} <= {
        path.name for path in folder.iterdir()
    }
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "model"), folder).eval()
    ours = load_model(world / "model", torch.float32, "cpu")
    prepare_model(ours)
    pairs, _ = load_pairs(str(world / "pairs.jsonl"), load_tokenizer(world / "model"), 64, 32, limit=5)
    use_soft_prompt(ours, vectors)
    put = [Pair(with_virtual_tokens(p[0], len(vectors), "prefix"), p[1], p[2]) for p in pairs]
    with torch.no_grad():
        logps = torch.stack(ours.packed_logps(pack(put)))
        for place, pair in enumerate(pairs):
            for side in (1, 2):
                row = torch.tensor([pair[0] + pair[side]])
                table = theirs(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].log_softmax(-1)
                response = torch.tensor(pair[side])
                expected = table[-len(response) - 1 : -1].gather(1, response[:, None]).sum()
                assert logps[side - 1, place].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


MISTAKES = [
    ([], "--prompt-init text and --preference-text"),
    (["--preference-text", ""], "--prompt-init text and --preference-text"),
    (["--prompt-init", "vocab", "--preference-text", "T"], "--prompt-init text and --preference-text"),
    (["--preference-text", "T", "--num-virtual-tokens", "0"], "--num-virtual-tokens: has to be at least 1"),
    (["--preference-text", "T", "--preference-position", "system"], "--preference-position"),
    (["--preference-text", "T", "--lora-r", "4"], "unknown flag --lora-r"),
]


@pytest.mark.parametrize("words, sentence", MISTAKES)
def test_a_mistake_is_one_sentence(capsys, words, sentence):
    with pytest.raises(SystemExit) as ended:
        learn_prompt.get_args(words)
    assert ended.value.code == 2
    assert sentence in one_line(capsys)


# -- the toy world ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def polite(toy, tmp_path_factory):
    """polite(script, name, words ...) -> (folder, first and last evaluation): a run on the toy world's polite pairs."""
    where = tmp_path_factory.mktemp("polite")

    def run(script, name, *words):
        data = [
            "--dataset-path",
            toy / "train/polite_pairs.jsonl",
            "--test-dataset-path",
            toy / "test/polite_pairs.jsonl",
        ]
        size = (
            "--eval-samples 100 --batch-size 16 --gradient-accumulation-steps 1 --max-length 64 --max-prompt-length 32"
        )
        how = ["--model", toy / "model", "--dtype", "fp32", "--device", "cpu", "--report-to", "none", "--seed", 1]
        run_script(
            [*how, *data, *size.split(), "--cache-dir", where / "cache", "--output-dir", where / name, *words], script
        )
        evaluations = [line for line in metrics_of(where / name) if "eval_loss" in line]
        return where / name, evaluations[0], evaluations[-1]

    return run


@pytest.fixture(scope="module")
def learned(polite):
    words = ["--preference-text", toy_world.PREFERENCE_TEXT, "--beta", 1, "--learning-rate", 1e-2, "--max-steps", 20]
    return polite(learn_prompt, "soft", *words)


@pytest.fixture(scope="module")
def politeness(toy):
    """politeness(text in front, adapter) -> the rule's verdict on 300 responses to held-out prompts."""
    tokenizer = load_tokenizer(toy / "model")
    prompts = [json.loads(line)["prompt"] for line in (toy / "prompts.jsonl").read_text().splitlines()]

    def judge(text="", folder=None):
        model = load_model(toy / "model", torch.float32, "cpu")
        if folder:
            lora.load_adapter(model, folder, "policy")
        asked = [f"{text}\n{prompt}" if text else prompt for prompt in prompts]
        return toy_world.judge_model(model, tokenizer, asked, num_responses=2, batch_size=300)["polite"]

    return judge


@pytest.fixture(scope="module")
def with_the_text(politeness):
    """How polite the start model is behind the preference text; without it, hardly."""
    prompted = politeness(toy_world.PREFERENCE_TEXT)
    assert prompted > politeness() + 0.4
    return prompted


def test_a_learned_soft_prompt_beats_the_text_it_starts_from(learned):
    _, first, last = learned
    assert last["step"] == 20
    margin, half = "eval_rewards/margins", "eval_rewards/margins_ci95"
    assert last[margin] - last[half] > first[margin] + first[half]


def test_the_policy_has_the_texts_effect_without_the_text(polite, politeness, with_the_text):
    words = ["--preference-text", toy_world.PREFERENCE_TEXT, "--learning-rate", 2e-3, "--alpha", 1]
    folder, first, last = polite(train_with_preference_prompt, "text", *words, "--lora-dropout", 0, "--max-steps", 16)
    assert first["eval_preference_metrics/pref_gap"] > 2 and first["eval_preference_metrics/gap_closed"] == 0
    assert last["eval_preference_metrics/gap_closed"] >= 0.9
    assert politeness(folder=folder) >= with_the_text - 0.03


def test_the_policy_has_a_soft_prompts_effect_without_it(polite, learned, politeness, with_the_text):
    words = [
        "--use-prompt-embedding",
        "--prompt-embedding-path",
        learned[0],
        "--learning-rate",
        2e-3,
        "--alpha",
        1,
        "--lora-dropout",
        0,
        "--max-steps",
        20,
    ]
    folder, first, last = polite(train_with_preference_prompt, "from soft", *words)
    # What the soft prompt is worth is what learning it has measured, 1 / beta of a reward being 1 nat.
    gap = first["eval_preference_metrics/pref_gap"]
    assert gap == pytest.approx(learned[2]["eval_rewards/margins"], rel=1e-4)
    assert last["eval_preference_metrics/gap_closed"] >= 0.9
    assert politeness(folder=folder) >= with_the_text - 0.03
