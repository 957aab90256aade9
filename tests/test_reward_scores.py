"""Reward models: the two losses, scores from the layout, transformers' pooling and PEFT's files on the same numbers."""

import copy
import json
import math
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from runs import adapter_of
from tiny_models import CONFIGS, ON, OTHERS, PACKING, SHAPES, WideNorm, assert_same, random_pairs, randomize
from tokenizers import Tokenizer, models
from transformers import AttentionInterface, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from worlds import edit_config, edit_state

import lora
import packed_attention
from formats.model_files import ModelError, enable_checkpointing, load_model, load_skeleton, pad_unlike_ends
from losses import harm_label_loss, reward_loss
from packed_model import prepare_scores
from packing import pack

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# -- the losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "value"),
    [
        (0.0, 0.0, 0.6931471805599453),  # ln 2
        (1.5, 0.5, 0.31326168751822286),  # ln(1 + 1/e)
        (-2.0, 0.0, 2.1269280110429727),
        (-7.0, -27.0, 2.0611536181902037e-09),
    ],
)
def test_the_ranking_loss_has_its_closed_form_and_slope(chosen, rejected, value):
    scores = double(chosen, rejected).requires_grad_()
    loss = reward_loss(scores[:1], scores[1:])
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(value, rel=1e-14)
    loss.sum().backward()
    slope = 1 / (1 + math.exp(chosen - rejected))
    assert scores.grad.tolist() == pytest.approx([-slope, slope], rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_losses_and_their_slopes_are_finite_at_any_score(dtype):
    chosen = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([1e4, 1e4, -1e4, -1e4], dtype=dtype, requires_grad=True)
    ranking = reward_loss(chosen, rejected)
    assert ranking.tolist() == pytest.approx([math.log(2), 2e4, 0, math.log(2)])
    labels = torch.tensor([[-1, 1]] * 4, dtype=dtype)
    labelled = harm_label_loss(chosen, rejected, labels)
    assert labelled.tolist() == [1e4, 2e4, 0, 1e4]
    (ranking + labelled).sum().backward()
    assert chosen.grad.tolist() == [-0.5, -2, 0, -1.5]
    assert rejected.grad.tolist() == [1.5, 2, 0, 0.5]


def test_a_constant_added_to_all_scores_changes_the_ranking_loss_by_no_bit_and_the_label_loss():
    chosen, rejected = double(0.5, -1.25, 3.0), double(0.25, 2.5, -4.0)  # exact in binary
    for constant in (8.0, -64.0, 0.125):
        assert torch.equal(reward_loss(chosen + constant, rejected + constant), reward_loss(chosen, rejected))
        assert (reward_loss(chosen + constant, rejected + constant, 0.1) != reward_loss(chosen, rejected, 0.1)).all()
        labels = double(-1, 1).expand(3, 2)
        moved = harm_label_loss(chosen + constant, rejected + constant, labels)
        assert (moved != harm_label_loss(chosen, rejected, labels)).all()


def test_centring_adds_half_the_sum_of_the_squared_scores_of_each_pair():
    chosen, rejected = double(0.5, -1.0, 3.0), double(0.25, 2.0, -3.0)
    added = reward_loss(chosen, rejected, 0.25) - reward_loss(chosen, rejected)
    # (0.25 + 0.0625)/8, (1 + 4)/8, (9 + 9)/8: the last is not 0, as with TRL's (chosen + rejected)^2
    assert added.tolist() == pytest.approx([0.0390625, 0.625, 2.25], rel=1e-14)


def test_the_label_loss_has_its_closed_form_per_row():
    chosen, rejected = double(2.0, 2.0, -0.5, 0.0), double(-1.0, -1.0, 3.0, 0.0)
    labels = double(-1, 1, 1, -1, 1, 1, -1, -1).view(4, 2)

    def below(score):  # -logsigmoid(score)
        return math.log1p(math.exp(-score))

    expected = [below(2) + below(1), below(-2) + below(-1), below(0.5) + below(-3), 2 * math.log(2)]
    assert harm_label_loss(chosen, rejected, labels).tolist() == pytest.approx(expected, rel=1e-14)


def test_a_separable_labelled_pair_has_a_loss_near_zero():
    chosen, rejected, labels = double(20), double(-20), double(-1, 1)[None]  # safe, harmful
    total = reward_loss(chosen, rejected) + harm_label_loss(chosen, rejected, labels)
    assert 0 < total.item() < 1e-7
    wrong = reward_loss(rejected, chosen) + harm_label_loss(rejected, chosen, labels)
    assert wrong.item() == pytest.approx(80)


def test_flipped_labels_are_negated_scores():
    draw = torch.Generator().manual_seed(0)
    chosen, rejected = 5 * torch.randn(2, 40, generator=draw, dtype=torch.float64)
    labels = torch.randint(-1, 2, (40, 2), generator=draw).double()
    flipped = harm_label_loss(chosen, rejected, -labels)
    assert torch.equal(flipped, harm_label_loss(-chosen, -rejected, labels))
    assert not torch.equal(flipped, harm_label_loss(chosen, rejected, labels))


@pytest.mark.parametrize("size", [0.7, 1e4])
def test_a_response_without_a_label_adds_nothing_and_is_not_pulled(size):
    chosen = (size * double(1, -1, 1, -1)).requires_grad_()
    rejected = (size * double(-1, 1, 1, -1)).requires_grad_()
    labels = double(0, 0, 0, 0, 0, 1, 0, 0).view(4, 2)  # one label among four pairs, of a rejected response
    added = harm_label_loss(chosen, rejected, labels)
    added.sum().backward()
    assert added[[0, 1, 3]].tolist() == [0, 0, 0]
    assert chosen.grad.tolist() == [0, 0, 0, 0]
    assert rejected.grad[[0, 1, 3]].tolist() == [0, 0, 0]
    # The labelled one is harmful and scores above zero: it is pulled down, by sigmoid(score).
    assert added[2].item() == pytest.approx(math.log1p(math.exp(-size)) + size, rel=1e-14)
    assert rejected.grad[2].item() == pytest.approx(1 / (1 + math.exp(-size)), rel=1e-14)


def pulls(loss):
    """Where a step down the loss moves (chosen, rejected) at scores of zero and around it: +1 up, -1 down."""
    signs = set()
    for start in ((0.0, 0.0), (3.0, -3.0), (-3.0, 3.0), (0.5, 0.4)):
        scores = double(*start).requires_grad_()
        loss(scores[:1], scores[1:]).sum().backward()
        signs.add(tuple((-scores.grad).sign().tolist()))
    assert len(signs) == 1
    return signs.pop()


def assert_ranking_and_labels_pull_one_way(ranking, labelled):
    assert pulls(ranking) == (1, -1)
    assert pulls(lambda c, r: labelled(c, r, double(-1, 1)[None])) == (1, -1)  # chosen safe, rejected harmful
    assert pulls(lambda c, r: labelled(c, r, double(-1, -1)[None])) == (1, 1)  # both safe
    assert pulls(lambda c, r: labelled(c, r, double(1, 1)[None])) == (-1, -1)  # both harmful
    assert pulls(lambda c, r: labelled(c, r, double(0, 1)[None])) == (0, -1)
    together = pulls(lambda c, r: ranking(c, r) + labelled(c, r, double(-1, 1)[None]))
    assert together == pulls(ranking)


def test_safe_is_pulled_up_and_harmful_down_and_the_ranking_agrees():
    assert_ranking_and_labels_pull_one_way(reward_loss, harm_label_loss)


@pytest.mark.parametrize("planted", ["labels", "label scores", "ranking"])
def test_a_planted_sign_flip_is_caught(planted):
    def ranking(chosen, rejected):
        return reward_loss(rejected, chosen) if planted == "ranking" else reward_loss(chosen, rejected)

    def labelled(chosen, rejected, labels):
        if planted == "label scores":
            return harm_label_loss(-chosen, -rejected, labels)
        return harm_label_loss(chosen, rejected, -labels if planted == "labels" else labels)

    with pytest.raises(AssertionError):
        assert_ranking_and_labels_pull_one_way(ranking, labelled)


# -- scores from the layout ------------------------------------------------------------------------------------------


def reward_model(name, dtype=torch.float32, head=0.5, **changes):
    """A tiny reward model with random weights, in eval mode; in fp64 its norms are fp64 too."""
    config_class, arguments = CONFIGS.get(name) or OTHERS[name]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config_class(**arguments | {"num_labels": 1} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
        model.score.weight.mul_(head / 0.2)
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        for path, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, WideNorm(module))
    return model


def oracle(model, pairs):
    """(2, B) scores, chosen then rejected: one sequence at a time, score.weight at its last hidden state."""
    weight = model.score.weight[0]
    found = []
    for side in (1, 2):
        for pair in pairs:
            ids = torch.tensor([pair[0] + pair[side]])
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            found.append(hidden[len(pair[0]) + len(pair[side]) - 1].to(weight.dtype) @ weight)
    return torch.stack(found).view(2, -1)


def scores(model, pairs):
    return torch.stack(model.packed_scores(pack(pairs)))


def prepared(model):
    """The model with the packed path on, and an untouched copy for the oracle."""
    untouched = copy.deepcopy(model)
    assert prepare_scores(model) == ON and model.packs_pairs
    return model, untouched


@pytest.mark.parametrize("name", PACKING)
@torch.no_grad()
def test_packed_scores_equal_each_sequence_alone(name):
    model, untouched = prepared(reward_model(name, torch.float64))
    pairs = random_pairs(SHAPES)
    expected = oracle(untouched, pairs)
    assert expected.std() > 0.5
    assert_same(scores(model, pairs), expected)
    model.packs_pairs = False  # the plain path of the same function
    assert_same(scores(model, pairs), expected)


@pytest.mark.parametrize("name", PACKING)
@torch.no_grad()
def test_batch_composition_and_order_leave_a_score_unchanged(name):
    model, _ = prepared(reward_model(name, torch.float64))
    draw = torch.Generator().manual_seed(0)
    pairs = random_pairs(torch.randint(1, 10, (30, 3), generator=draw).tolist())
    together = scores(model, pairs)
    order = torch.randperm(30, generator=draw)
    assert_same(scores(model, [pairs[i] for i in order]), together[:, order])
    assert_same(torch.cat([scores(model, [pair]) for pair in pairs], dim=1), together)
    swapped = [pair._replace(chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids) for pair in pairs]
    assert_same(scores(model, swapped), together.flip(0))


@pytest.mark.parametrize("name", PACKING)
@torch.no_grad()
def test_a_score_is_read_at_the_last_token_whatever_its_id(name):
    """Token ids have no part in it: responses of padding, of EOS and without EOS; equal responses score alike."""
    model, untouched = prepared(reward_model(name, torch.float64))
    pad, eos = 0, 1
    pairs = [
        ([5, 6], [7, eos], [7, eos, eos]),
        ([5, 6], [pad], [7, pad, pad]),
        ([pad, pad, 6], [eos], [9]),
        ([5], [7, 8, 9], [7, 8, 9]),
    ]
    got = scores(model, pairs)
    assert_same(got, oracle(untouched, pairs))
    assert got.flatten()[:-1].unique().numel() == 7 and got[0, 3] == pytest.approx(got[1, 3].item(), rel=1e-12)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("window", [1, 2, 11, 12, 13, 40])
@torch.no_grad()
def test_a_sliding_window_around_the_length_of_the_sequence(name, window):
    model, untouched = prepared(reward_model(name, torch.float64, sliding_window=window))
    pairs = random_pairs([(7, 5, 5), (7, 5, 6), (7, 4, 5)])  # sequences of 11, 12 and 13 tokens
    assert_same(scores(model, pairs), oracle(untouched, pairs))


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_gradients_by_every_parameter_equal_those_of_the_plain_path(name, checkpointed):
    model, untouched = prepared(reward_model(name, torch.float64))
    if checkpointed:
        enable_checkpointing(model)
        model.train()
    pairs = random_pairs(SHAPES)
    weights = torch.linspace(-1, 1.5, 2 * len(pairs), dtype=torch.float64).view(2, -1)  # a different pull on each
    (scores(model, pairs) * weights).sum().backward()
    (oracle(untouched, pairs) * weights).sum().backward()
    expected = {key: parameter.grad for key, parameter in untouched.named_parameters()}
    assert expected["score.weight"].norm() > 1
    for key, parameter in model.named_parameters():
        error = (parameter.grad - expected[key]).norm()
        assert error <= 1e-10 * expected[key].norm() + 1e-13, key


@pytest.mark.parametrize("name", PACKING)
@torch.no_grad()
def test_scores_of_a_bf16_model_are_fp32_and_near_their_fp64_numbers(name):
    draw = torch.Generator().manual_seed(0)
    pairs = random_pairs(torch.randint(1, 12, (60, 3), generator=draw).tolist())  # of few, chance decides
    model = reward_model(name, torch.bfloat16)
    model.score.float()  # as load_model leaves it
    exact = oracle(copy.deepcopy(model).double(), pairs)
    plain = oracle(model, pairs).double()
    assert prepare_scores(model) == ON
    packed = scores(model, pairs)
    assert packed.dtype == torch.float32
    assert not torch.equal(packed, packed.bfloat16().float())
    assert (packed.double() - exact).norm() <= 1.5 * (plain - exact).norm()
    model.score.bfloat16()
    assert scores(model, pairs).dtype == torch.float32


@torch.no_grad()
def test_scores_under_autocast_are_fp32_and_the_head_is_not_rounded():
    model, untouched = prepared(reward_model("llama"))
    pairs = random_pairs(SHAPES)
    with torch.autocast("cpu", torch.bfloat16):
        got = scores(model, pairs)
        model.score.weight.mul_(1 + 2**-12)  # vanishes in bf16
        moved = scores(model, pairs)
    assert got.dtype == torch.float32
    assert 1e-4 < (got - oracle(untouched, pairs)).abs().max() < 0.1
    torch.testing.assert_close(moved, got * (1 + 2**-12), rtol=1e-5, atol=1e-6)
    assert not torch.equal(moved, got)


OFF = {
    "gemma2": "its attention takes softcap",
    "bloom": "",
    "lfm2": "2 of its 3 layers do not take our attention function",
}


@pytest.mark.parametrize("head", [0.5, 0.0], ids=["a head", "a head of zeros"])
@pytest.mark.parametrize("name", ["gemma2", "bloom"])
@torch.no_grad()
def test_a_model_that_cannot_pack_says_why_and_is_scored_one_by_one(name, head):
    model = reward_model(name, torch.float64, head)
    untouched, pairs = copy.deepcopy(model), random_pairs(SHAPES)
    says = prepare_scores(model)
    assert says.startswith("packed pairs: off, sequences are scored one by one (") and OFF[name] in says
    assert not model.packs_pairs
    assert model.config._attn_implementation == untouched.config._attn_implementation
    assert_same(scores(model, pairs), oracle(untouched, pairs))
    assert (scores(model, pairs).abs().max() > 0.5) == bool(head)


@pytest.mark.parametrize("head", [0.5, 0.0], ids=["a head", "a head of zeros"])
@pytest.mark.parametrize("name", PACKING)
def test_a_head_of_zeros_does_not_hide_wrong_attention_from_the_probe(name, head, monkeypatch):
    """The start of every run: all scores are equal, whatever the hidden states are."""

    def rejected_sees_chosen(module, query, key, value, attention_mask, pair_layout=None, **kwargs):
        pair_layout.calls += 1
        return packed_attention.sdpa_attention_forward(module, query, key, value, None, is_causal=True)

    assert prepare_scores(reward_model(name, head=head)) == ON
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed_pairs", rejected_sees_chosen)
    model = reward_model(name, head=head)
    assert "the numbers of a test pair differ by" in prepare_scores(model)
    assert not model.packs_pairs


def test_the_score_of_a_fresh_head_is_zero_and_the_first_loss_ln_2():
    model, _ = prepared(reward_model("qwen3", head=0.0))
    chosen, rejected = model.packed_scores(pack(random_pairs(SHAPES)))
    losses = reward_loss(chosen, rejected)
    assert torch.equal(losses, torch.full((5,), math.log(2)))
    losses.sum().backward()
    assert model.score.weight.grad.norm() > 0.1  # and yet it learns


# -- transformers' own pooling ---------------------------------------------------------------------------------------


def tokenizer_of(**special):
    """A tokenizer of 64 words; special tokens by id."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{k}_token": f"w{i}" for k, i in special.items()})


@torch.no_grad()
def pooled(model, sequences, pad, side):
    """What transformers' reward model says of a padded batch (N,)."""
    model = copy.deepcopy(model)
    model.config.pad_token_id = pad
    width = max(map(len, sequences)) + 1  # every row has padding
    ids, mask = torch.full((len(sequences), width), pad), torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", PACKING)
@torch.no_grad()
def test_transformers_scores_a_padded_batch_as_we_do_with_a_pad_unlike_ends(name, side, tmp_path):
    model, untouched = prepared(reward_model(name))
    pairs = random_pairs([shape for shape in SHAPES if min(shape) > 1] + [(6, 2, 5), (3, 8, 2)])
    sequences = [pair.prompt_ids + pair[part] for part in (1, 2) for pair in pairs]
    eos, ours = 1, scores(model, pairs).flatten()
    pad = pad_unlike_ends(tmp_path, tokenizer_of(eos=eos, pad=eos, unk=3), untouched.config)
    assert pad == 3
    torch.testing.assert_close(pooled(untouched, sequences, pad, side), ours, rtol=1e-5, atol=1e-5)
    # The trap: with pad = eos transformers reads the score at the token before the EOS.
    before_eos = torch.cat([oracle(untouched, [(s[:1], s[1:-1], s[1:-1])])[0] for s in sequences])
    trapped = pooled(untouched, sequences, eos, side)
    torch.testing.assert_close(trapped, before_eos, rtol=1e-5, atol=1e-5)
    assert ((trapped - ours).abs() > 1e-3).all()


@pytest.mark.parametrize(
    ("special", "config_ends", "generation_ends", "expected"),
    [
        (dict(eos=1, pad=2), 1, None, 2),  # its own pad where that will do
        (dict(eos=1, pad=1, unk=3), 1, None, 3),
        (dict(eos=1, unk=3), None, None, 3),
        (dict(eos=1, pad=1, bos=0), 1, None, 0),
        (dict(eos=1, pad=1, bos=1, unk=1, sep=7), 1, None, 7),
        (dict(eos=1, pad=1), 1, None, 0),  # no other special token: an ordinary one
        (dict(eos=0, pad=0), 0, None, 1),
        (dict(eos=1, pad=2), [1, 2], None, 0),  # the pad ends turns
        (dict(eos=1, pad=2), 1, [2, 1, 0], 3),
        (dict(eos=1, pad=2, unk=3), 3, [2], 0),
        (dict(eos=1, pad=2), 1, 2, 0),
    ],
)
def test_the_pad_is_never_a_token_that_ends_a_response(special, config_ends, generation_ends, expected, tmp_path):
    config = transformers.LlamaConfig(eos_token_id=config_ends, bos_token_id=None, vocab_size=64)
    if generation_ends is not None:
        transformers.GenerationConfig(eos_token_id=generation_ends).save_pretrained(tmp_path)
    tokenizer = tokenizer_of(**special)
    pad = pad_unlike_ends(tmp_path, tokenizer, config)
    assert pad == expected
    ends = [tokenizer.eos_token_id, config_ends, generation_ends]
    assert pad not in [end for given in ends for end in (given if isinstance(given, list) else [given])]


# -- adapters with a head, here and in PEFT --------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    """save(name, dtype): a folder of a tiny causal language model."""

    def save(name, dtype=torch.float32):
        config_class, arguments = CONFIGS[name]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config_class(**arguments))
        randomize(p for p in model.parameters() if p.ndim > 1)
        model.to(dtype).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def with_adapter(path, targets=None, seed=5):
    """Our reward model on a base folder, adapter and head random."""
    model = load_model(path, torch.float32, "cpu", scores=True)
    parameters = lora.add_adapter(model, "reward", r=4, alpha=8, target_modules=targets)
    randomize([*parameters, model.score.weight], seed)
    prepare_scores(model)
    return model


def peft_reward_model(path, pad=2, **config):
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=pad)
    config = dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS") | config
    transposed = base.config.model_type == "gpt2"
    model = peft.get_peft_model(base, peft.LoraConfig(fan_in_fan_out=transposed, **config))
    randomize(p for key, p in model.named_parameters() if "lora_" in key or "score.modules_to_save" in key)
    return model.eval()


def sequences_of(pairs):
    return [pair.prompt_ids + pair[part] for part in (1, 2) for pair in pairs]


PAIRS = [pair for pair in random_pairs(SHAPES + [(6, 2, 5), (3, 8, 2)]) if 2 not in pair[0] + pair[1] + pair[2]]


@pytest.mark.parametrize("targets", [None, "two"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_peft_loads_our_adapter_with_its_head(name, targets, base, tmp_path):
    path = base(name)
    two = ["c_attn", "mlp.c_proj"] if name == "gpt2" else ["q_proj", "down_proj"]
    ours = with_adapter(path, two if targets else None)
    expected = scores(ours, PAIRS).flatten()
    assert len(PAIRS) > 3 and expected.std() > 0.1
    lora.save_adapter(ours, "reward", tmp_path / "adapter", str(path), head=ours.score.weight)
    again = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=2)
    assert not torch.equal(again.score.weight, ours.score.weight)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert type(again) is peft.PeftModelForSequenceClassification
    assert torch.equal(again.base_model.model.score.weight, ours.score.weight)
    for side in ("right", "left"):
        got = pooled(again.base_model.model, sequences_of(PAIRS), 2, side)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["score"]}], ids=["", "modules_to_save"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@torch.no_grad()
def test_our_loader_takes_pefts_reward_model(name, options, base, tmp_path):
    path = base(name)
    theirs = peft_reward_model(path, **options)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(path, torch.float32, "cpu", scores=True)
    parameters, head = lora.load_adapter(ours, tmp_path / "adapter", "reward", with_head=True)
    assert torch.equal(head, theirs.base_model.model.score.weight) and head.norm() > 0.1
    assert not any(parameter.requires_grad for parameter in parameters)
    assert torch.equal(ours.score.weight, torch.zeros_like(head))  # the head is the caller's to place
    ours.score.weight.copy_(head)
    assert prepare_scores(ours) == ON
    got = pooled(theirs.base_model.model, sequences_of(PAIRS), 2, "right")
    torch.testing.assert_close(scores(ours, PAIRS).flatten(), got, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_adapter_that_peft_loaded_and_saved_again_comes_back(base, tmp_path):
    path = base("qwen3")
    ours = with_adapter(path)
    lora.save_adapter(ours, "reward", tmp_path / "ours", str(path), head=ours.score.weight)
    again = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=2)
    peft.PeftModel.from_pretrained(again, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load_model(path, torch.float32, "cpu", scores=True)
    _, head = lora.load_adapter(back, tmp_path / "theirs", "reward", with_head=True)
    assert torch.equal(head, ours.score.weight)
    states = [lora.adapter_state(model, "reward") for model in (ours, back)]
    assert all(torch.equal(states[1][key], tensor) for key, tensor in states[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_reward_model_comes_back_bit_for_bit(dtype, base, tmp_path):
    path = base("qwen3")
    ours = load_model(path, dtype, "cpu", scores=True)
    parameters = randomize(lora.add_adapter(ours, "reward", r=4, alpha=8))
    randomize([ours.score.weight], 8)
    prepare_scores(ours)
    lora.save_adapter(ours, "reward", tmp_path / "adapter", "some/base", head=ours.score.weight)
    state = adapter_of(tmp_path / "adapter")
    assert state[lora.HEAD_KEY].shape == (1, 32) and all(tensor.dtype == torch.float32 for tensor in state.values())
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])

    again = load_model(path, dtype, "cpu", scores=True)
    loaded, head = lora.load_adapter(again, tmp_path / "adapter", "reward", trainable=True, with_head=True)
    assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(loaded, parameters, strict=True))
    assert head.dtype == torch.float32 and torch.equal(head, ours.score.weight)
    again.score.weight.copy_(head)
    prepare_scores(again)
    assert torch.equal(scores(again, PAIRS), scores(ours, PAIRS))


def damage_head(make):
    return lambda folder: edit_state(folder, lambda state: state.update({lora.HEAD_KEY: make(state[lora.HEAD_KEY])}))


WRONG_HEADS = {
    "none": (lambda d: edit_state(d, lambda s: s.pop(lora.HEAD_KEY)), "is no reward model: it has no head"),
    "two scores": (damage_head(lambda head: head.repeat(2, 1)), "score.weight is (2, 32), expected (1, 32)"),
    "a flat head": (damage_head(lambda head: head[0]), "score.weight is (32,), expected (1, 32)"),
    "a wider base": (damage_head(lambda head: head.repeat(1, 2)), "score.weight is (1, 64), expected (1, 32)"),
    "another module": (lambda d: edit_config(d, modules_to_save=["score", "lm_head"]), "uses modules_to_save="),
}


@pytest.mark.parametrize("wrong", WRONG_HEADS)
def test_a_wrong_head_is_refused_in_one_sentence_before_the_model_changes(wrong, base, tmp_path):
    damage, named = WRONG_HEADS[wrong]
    path, folder = base("qwen3"), tmp_path / "adapter"
    ours = with_adapter(path)
    lora.save_adapter(ours, "reward", folder, str(path), head=ours.score.weight)
    damage(folder)
    model = load_model(path, torch.float32, "cpu", scores=True)
    with pytest.raises(lora.AdapterError) as error:
        lora.load_adapter(model, folder, "reward", with_head=True)
    assert named in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not lora.lora_layers(model)


def test_a_policy_is_no_reward_model_and_a_reward_model_no_policy(base, tmp_path):
    path = base("qwen3")
    ours = with_adapter(path)
    lora.save_adapter(ours, "reward", tmp_path / "reward", str(path), head=ours.score.weight)
    lora.save_adapter(ours, "reward", tmp_path / "policy", str(path))
    model = load_model(path, torch.float32, "cpu", scores=True)
    with pytest.raises(lora.AdapterError, match="policy is no reward model: it has no head score.weight"):
        lora.load_adapter(model, tmp_path / "policy", "x", with_head=True)
    with pytest.raises(lora.AdapterError, match="reward is a reward model's, with a scalar head"):
        lora.load_adapter(model, tmp_path / "reward", "x")
    assert not lora.lora_layers(model)


@torch.no_grad()
def test_one_base_scores_with_a_reward_adapter_beside_its_policy(base, tmp_path):
    """A causal model takes the reward adapter too (the keys are the same), and the head waits outside."""
    path = base("qwen3")
    ours = with_adapter(path)
    lora.save_adapter(ours, "reward", tmp_path / "reward", str(path), head=ours.score.weight)
    model = load_model(path, torch.float32, "cpu")
    randomize(lora.add_adapter(model, "policy", r=2, alpha=4), 1)
    _, head = lora.load_adapter(model, tmp_path / "reward", "reward", with_head=True)
    ids = torch.tensor([PAIRS[0].prompt_ids + PAIRS[0].chosen_ids])
    with lora.use_adapter(model, "reward"):
        score = model.base_model(input_ids=ids).last_hidden_state[0, -1] @ head[0]
    assert score.item() == pytest.approx(scores(ours, PAIRS)[0, 0].item(), abs=1e-5)


def test_an_adapter_on_the_head_is_refused():
    """The head is trained whole; an adapter on it would be trained by nothing, as scores read its weight alone."""
    with pytest.raises(lora.AdapterError, match="score is the head of the reward model, which is trained whole"):
        lora.add_adapter(reward_model("qwen3"), "reward", r=2, alpha=4, target_modules=["q_proj", "score"])


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_gets_a_head_of_zeros_in_fp32(name, dtype, base):
    path = base(name, dtype)
    model = load_model(path, dtype, "cpu", scores=True)
    assert model.dtype == dtype and not model.training
    assert model.score.weight.dtype == torch.float32
    assert torch.equal(model.score.weight, torch.zeros(1, 32))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).base_model.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.base_model.state_dict().items())


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_a_saved_reward_model_keeps_its_own_head(name, tmp_path):
    model = reward_model(name)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, torch.float32, "cpu", scores=True)
    assert torch.equal(again.score.weight, model.score.weight)
    assert prepare_scores(again) == prepare_scores(model) == ON
    assert torch.equal(scores(again, PAIRS), scores(model, PAIRS))
    half = load_model(tmp_path, torch.bfloat16, "cpu", scores=True)
    assert half.dtype == torch.bfloat16 and half.score.weight.dtype == torch.float32
    torch.testing.assert_close(half.score.weight, model.score.weight, rtol=2**-8, atol=0)


def test_a_head_of_another_kind_is_one_sentence(tmp_path):
    classifier = reward_model("qwen3", num_labels=3)
    classifier.save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="three") as error:
        load_model(tmp_path / "three", torch.float32, "cpu", scores=True)
    assert "\n" not in str(error.value)
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=1))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="bert") as error:
        load_model(tmp_path / "bert", torch.float32, "cpu", scores=True)
    assert "\n" not in str(error.value)


def test_the_skeleton_of_a_reward_model_has_the_layers_of_the_model(base):
    path = base("qwen3")
    skeleton = load_skeleton(path, tokenizer_of(eos=1), SimpleNamespace(trust_remote_code=False), scores=True)
    model = load_model(path, torch.float32, "cpu", scores=True)
    assert lora.select_targets(skeleton) == lora.select_targets(model)
    assert "score" not in lora.select_targets(model)
