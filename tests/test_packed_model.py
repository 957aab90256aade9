"""The packed pass against sequences scored one by one in fp64; the head's own backward; which path is chosen."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import (
    ON,
    PACKING,
    SHAPES,
    assert_same,
    double_model,
    model_of,
    oracle,
    plain_logps,
    random_adapter,
    random_batch,
    random_pairs,
    scores,
    tiny_model,
)
from torch import nn

import lora
import packed_attention
import packed_model
from formats.model_files import enable_checkpointing
from packed_attention import PairLayout
from packed_model import final_softcap, prepare_model, token_logps
from packing import pack


def prepared(model):
    """The model with the packed path on, and an untouched copy for the oracle."""
    untouched = copy.deepcopy(model)
    assert prepare_model(model) == ON
    return model, untouched


# -- log-probs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKING)
@torch.no_grad()
def test_packed_log_probs_equal_sequences_scored_one_by_one(name):
    model, untouched = prepared(double_model(name))
    pairs = random_pairs(SHAPES)
    expected = oracle(untouched, pairs)
    assert expected.std() > 1  # a model whose scores were all alike could not tell one token from another
    assert_same(scores(model, pairs), expected)
    assert_same(torch.stack(plain_logps(model, pack(pairs))), expected)


@pytest.mark.parametrize(("name", "reason"), [("gemma2", "its attention takes softcap"), ("bloom", "")])
@torch.no_grad()
def test_a_model_that_cannot_pack_says_why_and_is_scored_one_by_one(name, reason):
    model = double_model(name)
    untouched = copy.deepcopy(model)
    says = prepare_model(model)
    assert says.startswith("packed pairs: off, sequences are scored one by one (")
    assert reason in says and len(says) > len("packed pairs: off, sequences are scored one by one ()")
    assert "\n" not in says
    own = untouched.config._attn_implementation  # eager, and sdpa for gemma2 before transformers 5.2x
    assert model.config._attn_implementation == own
    pairs = random_pairs(SHAPES)
    assert_same(scores(model, pairs), oracle(untouched, pairs, own))


@pytest.mark.parametrize("name", PACKING)
def test_gradients_by_every_parameter_equal_those_of_the_plain_path(name):
    model, untouched = prepared(double_model(name))
    pairs = random_pairs(SHAPES)
    weights = torch.linspace(-1, 1.5, 2 * len(pairs), dtype=torch.float64).view(2, -1)  # a different pull on each
    (scores(model, pairs) * weights).sum().backward()
    (oracle(untouched, pairs) * weights).sum().backward()
    expected = {key: parameter.grad for key, parameter in untouched.named_parameters()}
    for key, parameter in model.named_parameters():
        error = (parameter.grad - expected[key]).norm()
        # Key biases move every score of a softmax alike: their true gradient is 0 and only rounding is left of it.
        assert error <= 1e-10 * expected[key].norm() + 1e-13, key


@pytest.mark.parametrize("name", PACKING)
def test_checkpointing_recomputes_the_packed_pass_and_changes_no_gradient(name):
    pairs, gradients = random_pairs(SHAPES), {}
    batch = pack(pairs)
    for how in ("packed", "checkpointed", "plain"):
        model = double_model(name)
        parameters = random_adapter(model)
        model.double()  # fp32 adapters would hide anything below 1e-7
        if how == "plain":
            total = oracle(model, pairs)
        else:
            assert prepare_model(model) == ON
            if how == "checkpointed":
                enable_checkpointing(model)
            model.train()
            layout = PairLayout(batch.segments)
            total = torch.stack(packed_model.logps_of(batch, *packed_model.response_states(model, batch, layout)))
            assert layout.calls == 2
        (total[0] - 0.5 * total[1]).sum().backward()
        if how != "plain":
            # Each of the two layers asks for attention once more in backward, and only where it is checkpointed.
            assert layout.calls == (4 if how == "checkpointed" else 2)
        gradients[how] = [parameter.grad for parameter in parameters]
        assert all(gradient.abs().max() > 1e-3 for gradient in gradients[how])
    for packed, checkpointed, plain in zip(*gradients.values()):
        assert_same(checkpointed, packed)
        assert_same(checkpointed, plain)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "pairs",
    [
        [([7], [1], [9])],
        [([7], [1], [9, 9, 9, 1]), ([7], [8, 1], [1])],
        [([2, 3, 4], [5, 6, 7, 1], [5, 6, 8, 1])],  # equal beginnings
        [([2, 3, 4, 5, 6], [5, 6], [5, 6, 7, 8, 9, 1])],  # one a prefix of the other
        [([2, 3, 4, 5, 6], [5, 6, 7, 8, 9, 1], [5])],
        [([2, 2, 2, 2, 2, 2], [2, 2, 2], [2, 2, 2, 2])],  # one token all over: only positions tell them apart
    ],
    ids=["all-one-token", "one-token-prompts", "equal-beginnings", "prefix", "prefix-turned", "one-word"],
)
@torch.no_grad()
def test_edges_of_lengths_and_of_equal_tokens(name, pairs):
    model, untouched = prepared(double_model(name))
    assert_same(scores(model, pairs), oracle(untouched, pairs))


@pytest.mark.parametrize("shape", [(15, 1, 1), (12, 4, 1), (1, 15, 15)])
@pytest.mark.parametrize(("name", "limit"), [("gpt2", "n_positions"), ("qwen3", "max_position_embeddings")])
@torch.no_grad()
def test_a_pair_may_fill_the_models_positions_and_the_row_be_much_longer(name, limit, shape):
    model, untouched = prepared(double_model(name, **{limit: 16}))
    pairs = random_pairs([shape] * 3)
    assert_same(scores(model, pairs), oracle(untouched, pairs))


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("window", [1, 2, 11, 12, 13, 40])
@torch.no_grad()
def test_a_sliding_window_around_the_length_of_the_sequence(name, window):
    model, untouched = prepared(double_model(name, sliding_window=window))
    assert model.config.sliding_window == window
    pairs = random_pairs([(7, 5, 5), (7, 5, 6), (7, 4, 5)])  # sequences of 11, 12 and 13 tokens
    assert_same(scores(model, pairs), oracle(untouched, pairs))


@torch.no_grad()
def test_a_mask_for_a_window_of_no_tokens_that_no_layer_takes():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    config = transformers.AutoConfig.for_model(
        "qwen2_moe", **sizes, **experts, num_key_value_heads=2
    )  # as published: no windows
    assert config.sliding_window == 0 and set(config.layer_types) == {"full_attention"}
    model, untouched = prepared(transformers.AutoModelForCausalLM.from_config(config).eval())
    pairs = random_pairs([(7, 5, 5), (7, 4, 6)])
    assert_same(scores(model, pairs), oracle(untouched, pairs), tolerance=1e-5)  # fp32


@torch.no_grad()
def test_the_sliding_window_cuts_something_off_in_these_tests():
    """Else every comparison above would pass with the window ignored."""
    model = double_model("mistral")
    pairs = random_pairs(SHAPES)
    narrow = oracle(model, pairs)
    wide = oracle(double_model("llama"), pairs)  # the same weights and equations without a window
    assert (narrow - wide).abs().max() > 0.1


# -- pairs do not meet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKING)
@torch.no_grad()
def test_permuting_pairs_permutes_their_numbers_and_a_pair_alone_has_the_same(name):
    model, _ = prepared(double_model(name))
    draw = torch.Generator().manual_seed(0)
    shapes = torch.randint(1, 10, (40, 3), generator=draw).tolist()
    pairs = random_pairs(shapes)
    together = scores(model, pairs)
    order = torch.randperm(40, generator=draw)
    assert_same(scores(model, [pairs[i] for i in order]), together[:, order])
    alone = torch.cat([scores(model, [pair]) for pair in pairs], dim=1)
    assert_same(alone, together)


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("changed", [1, 2], ids=["chosen", "rejected"])
@torch.no_grad()
def test_changing_one_response_leaves_every_other_number_exactly_alone(name, changed):
    model, _ = prepared(double_model(name))
    pairs = random_pairs([(6, 5, 4), (3, 4, 7), (4, 2, 2)])
    others = random_pairs([(6, 5, 4), (3, 4, 7), (4, 2, 2)], seed=1)
    swapped = [list(pair) for pair in pairs]
    swapped[1][changed] = others[1][changed]
    before, after = scores(model, pairs), scores(model, swapped)
    same = torch.ones(2, 3, dtype=torch.bool)
    same[changed - 1, 1] = False
    assert torch.equal(after[same], before[same])
    assert (after[~same] - before[~same]).abs() > 0.1


@pytest.mark.parametrize("name", PACKING)
@torch.no_grad()
def test_changing_a_prompt_changes_both_responses_of_its_pair_and_no_others(name):
    model, _ = prepared(double_model(name))
    pairs = random_pairs([(4, 3, 3), (4, 3, 3), (4, 3, 3)])
    before = scores(model, pairs)
    after = scores(model, [pairs[0], pairs[1]._replace(prompt_ids=[9, 9, 9, 9]), pairs[2]])
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (after[:, 1] - before[:, 1]).abs().min() > 1e-3


# -- the head ----------------------------------------------------------------------------------------------------


def head_inputs(dtype=torch.float64, tokens=7, vocab=11, width=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=draw, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(vocab, (tokens,), generator=draw)


def naive_logps(hidden, weight, targets, softcap=None):
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)[range(len(targets)), targets]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_head_gradients_pass_gradcheck_and_values_equal_full_logits(softcap, trained_head, chunk):
    hidden, weight, targets = head_inputs()
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    assert torch.autograd.gradcheck(lambda h, w: token_logps(h, w, targets, softcap, chunk), (hidden, weight))
    assert_same(token_logps(hidden, weight, targets, softcap, chunk), naive_logps(hidden, weight, targets, softcap))


def test_a_trained_head_under_a_frozen_backbone_gets_its_gradient():
    hidden, weight, targets = head_inputs()
    weight.requires_grad_()
    (ours,) = torch.autograd.grad(token_logps(hidden, weight, targets, 2.0, 3).pow(2).sum(), weight)
    (naive,) = torch.autograd.grad(naive_logps(hidden, weight, targets, 2.0).pow(2).sum(), weight)
    assert_same(ours, naive)


@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen", "trained"])
def test_no_tokens_give_no_numbers_and_zero_gradients(trained_head):
    hidden, weight, targets = head_inputs(tokens=0)
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    logps = token_logps(hidden, weight, targets)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, 5)
    if trained_head:
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    ("dtype", "out"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_log_probs_are_at_least_fp32_and_gradients_have_the_inputs_type(dtype, out, trained_head):
    hidden, weight, targets = head_inputs(dtype)
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    logps = token_logps(hidden, weight, targets, chunk=3)
    assert logps.dtype == out
    logps.sum().backward()
    assert hidden.grad.dtype == dtype
    assert (weight.grad.dtype if trained_head else None) == (dtype if trained_head else None)


@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen", "trained"])
def test_bf16_errors_are_no_larger_than_those_of_full_bf16_logits(trained_head):
    wide = dict(tokens=200, vocab=500, width=64)
    results = {}
    for how, function, dtype in (
        ("exact", naive_logps, torch.float64),
        ("naive", naive_logps, torch.bfloat16),
        ("ours", lambda *inputs: token_logps(*inputs, chunk=48), torch.bfloat16),
    ):
        hidden, weight, targets = head_inputs(torch.bfloat16, **wide)  # the same rounded numbers for all three
        hidden = hidden.to(dtype).requires_grad_()
        weight = (weight / 8).to(dtype).requires_grad_(trained_head)
        logps = function(hidden, weight, targets)
        pull = torch.linspace(-1, 1, 200, dtype=torch.float64).to(logps.dtype)
        (logps * pull).sum().backward()
        results[how] = [logps.detach(), hidden.grad] + [weight.grad] * trained_head
    for exact, naive, ours in zip(*results.values()):
        assert (ours.double() - exact).norm() <= 1.5 * (naive.double() - exact).norm()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen", "trained"])
def test_nothing_as_wide_as_the_vocabulary_is_kept_for_backward(trained_head, softcap):
    tokens, vocab, width = 40, 211, 8
    hidden, weight, targets = head_inputs(tokens=tokens, vocab=vocab, width=width)
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        logps = token_logps(hidden, weight, targets, softcap, chunk=16)
    assert sorted(kept) == (sorted([(tokens, width), (vocab, width), (tokens,)]) if trained_head else [(tokens, width)])
    assert not [name for name, value in vars(logps.grad_fn).items() if torch.is_tensor(value)]  # nor beside the hooks


def test_autocast_runs_the_head_in_its_type_and_returns_fp32():
    hidden, weight, targets = head_inputs(torch.float32)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(hidden, weight, targets, chunk=3)
    assert torch.equal(logps, token_logps(hidden.bfloat16(), weight.bfloat16(), targets, chunk=3))
    assert (logps - token_logps(hidden, weight, targets)).abs().max() > 1e-4  # that it was bf16 can be seen
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    assert gradient.dtype == torch.float32


@torch.no_grad()
def test_the_final_softcap_of_gemma_is_applied():
    model, untouched = prepared(double_model("gemma3", final_logit_softcapping=1.5))
    assert final_softcap(model) == 1.5
    pairs = random_pairs(SHAPES)
    capped = oracle(untouched, pairs)
    assert_same(scores(model, pairs), capped)
    untouched.config.final_logit_softcapping = None
    assert (oracle(untouched, pairs) - capped).abs().max() > 1


# -- which path runs ---------------------------------------------------------------------------------------------


def assert_off_and_right(model, untouched, reason="its head is more than one matrix"):
    says = prepare_model(model)
    assert says == f"packed pairs: off, sequences are scored one by one ({reason})"
    assert model.packs_pairs is False
    pairs = random_pairs(SHAPES)
    with torch.no_grad():
        assert_same(scores(model, pairs), oracle(untouched, pairs))


@pytest.mark.parametrize("spread", [0, 1])  # a bias that is still 0 will not stay 0 in training
def test_a_head_with_a_bias_takes_the_plain_path(spread):
    model = double_model("llama")
    torch.manual_seed(5)
    model.lm_head = nn.Linear(32, 64).double()
    nn.init.normal_(model.lm_head.bias, std=spread)
    assert_off_and_right(model, copy.deepcopy(model))


@pytest.mark.parametrize("spread", [0, 1])  # a fresh adapter changes nothing yet
def test_an_adapter_on_the_head_takes_the_plain_path_and_counts(spread):
    model = double_model("llama")
    base = oracle(model, random_pairs(SHAPES))
    parameters = lora.add_adapter(model, "policy", r=2, alpha=4, target_modules=["q_proj", "lm_head"])
    for b in parameters[1::2]:
        nn.init.normal_(b, std=spread)
    assert ((oracle(model, random_pairs(SHAPES)) - base).abs().max() > 1) == bool(spread)
    assert_off_and_right(model, copy.deepcopy(model))


@pytest.mark.parametrize("scale", [0.0625, 0.9, 3.0])
def test_a_scaled_head_is_scored_with_its_scale(scale):
    model = double_model("cohere", logit_scale=scale)
    assert_off_and_right(model, copy.deepcopy(model))


@pytest.mark.parametrize("scale", [0.0625, 0.9, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_head_is_refused_in_every_type(dtype, scale):
    says = prepare_model(model_of("cohere", dtype, logit_scale=scale))
    assert says == "packed pairs: off, sequences are scored one by one (its head is more than one matrix)"


def test_a_hybrid_model_is_refused_with_the_number_of_its_other_layers():
    model = double_model("lfm2")
    reason = "2 of its 3 layers do not take our attention function"
    assert_off_and_right(model, copy.deepcopy(model), reason)


def test_the_verdict_may_be_asked_for_twice_and_leaves_no_gradients():
    model = double_model("qwen3")
    assert prepare_model(model) == prepare_model(model) == ON
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", PACKING)
@torch.no_grad()
def test_bf16_models_pack_too_and_stay_near_their_fp64_numbers(name):
    model, pairs = tiny_model(name, torch.bfloat16), random_pairs(SHAPES)
    exact = oracle(copy.deepcopy(model).double(), pairs)
    plain = oracle(model, pairs).double()
    assert prepare_model(model) == ON
    packed = scores(model, pairs)
    assert packed.dtype == torch.float32
    assert (packed.double() - exact).norm() <= 1.5 * (plain - exact).norm()


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 9), (1, 1), (1, 7)])
def test_attention_by_hand_is_torchs_attention(queries, keys, heads, kv_heads, window):
    """In fp64, with gradients: causal, the last query at the last key, query heads grouped on key heads."""
    draw = torch.Generator().manual_seed(0)
    shapes = (1, heads, queries, 8), (1, kv_heads, keys, 8), (1, kv_heads, keys, 8)
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes)
    seen = [
        [key <= query and (window is None or key > query - window) for key in range(keys)]
        for query in range(keys - queries, keys)
    ]
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.tensor(seen), scale=0.3, enable_gqa=heads > kv_heads
    )
    mask = PairLayout(()).mask(queries, keys, window, q, copies=heads // kv_heads)
    got = packed_attention.attention_by_hand(q, k, v, mask, 0.3)
    assert_same(got, expected)
    grad = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    for ours, theirs in zip(torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)):
        assert_same(ours, theirs)


def test_attention_by_hand_takes_over_in_bf16_up_to_its_limit(monkeypatch):
    """It and torch's attention round differently: with the limit moved, the numbers change in bf16 and only there."""
    for dtype in (torch.bfloat16, torch.float32):
        model, results = model_of("llama", dtype), []
        prepare_model(model)
        for limit in (0, 9, 10, packed_attention.BY_HAND):  # the longest branch below has 10 keys
            monkeypatch.setattr(packed_attention, "BY_HAND", limit)
            with torch.no_grad():
                results.append(scores(model, random_pairs([(6, 4, 4)])))
        equal = [torch.equal(results[0], result) for result in results]
        assert equal == [True, True, dtype == torch.float32, dtype == torch.float32]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_gradients_in_bf16_are_as_near_to_fp64_as_those_of_torchs_attention(name, monkeypatch):
    """Long enough for the probabilities to be many and small; over all weights, which rounding hits at random."""
    pairs = random_pairs([(40, 30, 20), (10, 25, 35)])

    def gradient(model):
        model.packed_logps(pack(pairs))[0].sum().backward()
        return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])

    models = [model_of(name, torch.bfloat16) for _ in range(3)]
    exact = models[0].double()
    for model in models:
        prepare_model(model)
    expected, by_hand = gradient(exact), gradient(models[1])
    monkeypatch.setattr(packed_attention, "BY_HAND", 0)
    torchs = gradient(models[2])
    assert not torch.equal(by_hand, torchs)
    assert (by_hand - expected).norm() <= 1.5 * (torchs - expected).norm()


# -- dropout, generation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {}),  # 0.1 by its own default, nn.Dropout and attention
        ("qwen3", dict(attention_dropout=0.3)),
        ("bloom", dict(hidden_dropout=0.3, attention_dropout=0.3)),
        ("opt", {}),  # 0.1 by its own default, a number handed to F.dropout
    ],
)
@torch.no_grad()
def test_the_base_has_no_dropout_in_train_mode_once_prepared(name, changes):
    model = double_model(name, **changes)
    untouched, pairs = copy.deepcopy(model), random_pairs(SHAPES)
    attention = "eager" if name == "bloom" else "sdpa"
    exact = oracle(untouched, pairs, attention)
    assert (oracle(untouched.train(), pairs, attention) - exact).abs().max() > 1e-3  # there is something to switch off
    prepare_model(model)
    model.train()
    assert torch.equal(scores(model, pairs), scores(model, pairs))
    assert_same(scores(model, pairs), exact)
    assert_same(torch.stack(plain_logps(model, pack(pairs))), exact)


@pytest.mark.parametrize("name", PACKING)
def test_generation_of_a_prepared_model_is_generation_with_sdpa(name):
    model, untouched = prepared(tiny_model(name))
    prompts = [prompt for prompt, *_ in random_pairs([(9, 1, 1), (3, 1, 1), (6, 1, 1)])]
    ids = torch.tensor([[0] * (9 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (9 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    ours, theirs = model.generate(ids, **options), untouched.generate(ids, **options)
    assert model.config._attn_implementation == "packed_pairs"
    assert ours.sequences.shape[1] > 9 + 3
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))


@torch.no_grad()
def test_a_padded_batch_through_the_prepared_model_has_sdpas_logits():
    model, untouched = prepared(double_model("mistral"))
    ids = random_batch([(7, 3, 4)]).input_ids.repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(model(**inputs).logits, untouched(**inputs).logits)


def test_the_packed_path_runs_the_head_on_response_tokens_only():
    model, _ = prepared(double_model("llama", vocab_size=97))
    batch, kept = random_batch(SHAPES), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model.packed_logps(batch)
    assert (sum(batch.lengths), 32) in kept  # the hidden states that predict a response token
    assert not [shape for shape in kept if shape[-1] == 97]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_follows_the_longest_sequence_is_scored_alone(kind):
    # Beyond the original length its angles depend on the longest position of the row: pairs would see each other.
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    model = tiny_model("llama", rope_parameters=rope)
    assert "depends on the longest sequence of the row" in prepare_model(model)
    assert not model.packs_pairs
