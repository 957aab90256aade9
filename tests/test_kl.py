"""The KL to the reference: exact, with its own backward, against fp64 autograd and sequences scored one by one."""

import copy

import pytest
import torch
from tiny_models import CONFIGS, random_pairs, tiny_model

import lora
from packed_model import prepare_model, token_logps
from packing import pack

SHAPES = [(5, 4, 3), (1, 1, 6), (7, 2, 2)]


def inputs(dtype=torch.float64, tokens=11, vocab=23, width=5):
    torch.manual_seed(3)
    states, ref_states = torch.randn(tokens, width, dtype=dtype), torch.randn(tokens, width, dtype=dtype)
    weight, ref_weight = torch.randn(vocab, width, dtype=dtype), torch.randn(vocab, width, dtype=dtype)
    return states, weight, torch.randint(vocab, (tokens,)), (ref_states, ref_weight, None)


def naive(states, weight, targets, softcap, reference):
    """log-probs and sum_v p (log p - log q), by autograd."""

    def log_softmax(states, weight, softcap):
        logits = states @ weight.t()
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)

    ours, theirs = log_softmax(states, weight, softcap), log_softmax(*reference)
    return torch.stack((ours.gather(-1, targets[:, None])[:, 0], (ours.exp() * (ours - theirs)).sum(-1)))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_values_and_gradients_are_autograds(softcap, trained_head, chunk):
    states, weight, targets, reference = inputs()
    reference = (*reference[:2], softcap)
    pull = torch.randn(2, len(states), dtype=torch.float64)
    gradients = []
    for function in (lambda: token_logps(states, weight, targets, softcap, chunk, reference),
                     lambda: naive(states, weight, targets, softcap, reference)):  # fmt: skip
        leaves = [tensor.requires_grad_(True) for tensor in (states, weight)[: 1 + trained_head]]
        value = function()
        gradients.append([value.detach(), *torch.autograd.grad((value * pull).sum(), leaves)])
        weight.requires_grad_(False)
    for ours, autograd in zip(*gradients, strict=True):
        assert torch.allclose(ours, autograd, rtol=1e-10, atol=1e-12)


def test_against_itself_the_kl_and_its_gradient_are_exactly_zero_in_every_type():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        states, weight, targets, _ = inputs(dtype, tokens=50, vocab=401, width=16)
        states.requires_grad_()
        kl = token_logps(states, weight, targets, reference=(states.detach(), weight, None))[1]
        assert torch.equal(kl, torch.zeros_like(kl))
        (gradient,) = torch.autograd.grad(kl.sum(), states)
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_logits_for_states_give_the_same_numbers():
    states, weight, targets, (ref_states, ref_weight, _) = inputs()
    expected = token_logps(states, weight, targets, reference=(ref_states, ref_weight, None))
    logits, ref_logits = states @ weight.t(), ref_states @ ref_weight.t()
    before = logits.clone()
    assert torch.allclose(token_logps(logits, None, targets, reference=(ref_logits, None, None)), expected, atol=1e-12)
    assert torch.equal(logits, before)  # the work is done in place, and not in what was given


@pytest.mark.parametrize("name", list(CONFIGS))
def test_kl_of_a_model_with_its_adapter_off_is_that_of_sequences_one_by_one(name):
    """Packed where it can be, else the plain path (gemma2, bloom): the same numbers either way."""
    model = tiny_model(name, torch.float64)
    prepare_model(model)
    lora.add_adapter(model, "policy", 4, 8)
    pairs, batch = random_pairs(SHAPES), pack(random_pairs(SHAPES))

    def both():
        with torch.no_grad(), lora.use_adapter(model, None):
            reference = model.response_states(batch)
        return model.packed_logps(batch, reference)

    assert max(value.abs().max() for value in both()[2:]) < 1e-12  # B is zero: policy = reference
    base = copy.deepcopy(model)
    lora.switch_adapter(base, None)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["policy"], std=0.3)
    chosen_logps, rejected_logps, chosen_kl, rejected_kl = both()
    for side, logps, kl in ((1, chosen_logps, chosen_kl), (2, rejected_logps, rejected_kl)):
        for index, pair in enumerate(pairs):
            ids, split = torch.tensor([pair[0] + pair[side]]), len(pair[0])
            p = model(input_ids=ids, use_cache=False).logits[0, split - 1 : -1].log_softmax(-1)
            q = base(input_ids=ids, use_cache=False).logits[0, split - 1 : -1].log_softmax(-1)
            expected = (p.exp() * (p - q)).sum()
            assert expected > 0.01  # there is something to measure
            assert kl[index].item() == pytest.approx(expected.item(), rel=1e-6)
            of_targets = p.gather(-1, ids[0, split:, None]).sum()
            assert logps[index].item() == pytest.approx(of_targets.item(), rel=1e-6)
