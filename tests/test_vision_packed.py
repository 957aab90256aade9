"""Pairs with pictures, packed, against sequences one by one through the model's own forward, in fp64, on each family:
log-probs, KL, gradients of LoRA; planted mistakes are seen; each picture is encoded once.
"""

import copy

import pytest
import torch
from tiny_models import ON, assert_same
from tiny_vision import IMAGE, PACKED, PLAIN, Processed, family, vision_model, with_response
from torch.utils.flop_counter import FlopCounterMode

import lora
import vision
from formats.model_files import enable_checkpointing
from harness import speed
from packed_model import prepare_model, response_states
from packing import hold_out, joined, pack
from preference_data import Pair, fingerprint


def prepared(model, pairs):
    return prepare_model(model, pack(pairs[:1]))


def one_by_one(model, raw, reference=False):
    """(2, B) log-probs by the model's own forward, pixels and positions; with a reference (4, B), the KLs below."""
    sums, kls = [], []
    for side in (1, 2):
        for prompt, *responses, given in raw:
            response = responses[side - 1]
            beside = with_response(model, given, len(prompt), len(response))
            ids, tables = torch.tensor([prompt + response]), []
            for adapter in ("policy", None) if reference else ("policy",):
                with lora.use_adapter(model, adapter):
                    logits = model(input_ids=ids, use_cache=False, **beside).logits[0, len(prompt) - 1 : -1]
                tables.append(logits.log_softmax(-1))
            sums.append(tables[0].gather(1, torch.tensor(response)[:, None]).sum())
            if reference:
                kls.append((tables[0].exp() * (tables[0] - tables[1])).sum())
    return torch.stack(sums + kls).view(-1, len(raw))


NAMES = [build.__name__ for build in PACKED]


@pytest.mark.parametrize("name", NAMES)
def test_log_probs_kl_and_gradients_equal_those_one_by_one(name):
    model, untouched, pairs, raw = family(name)
    assert prepared(model, pairs) == ON
    batch = pack(pairs)
    assert sum(given is not None for given in batch.pictures) == 3
    with torch.no_grad(), lora.use_adapter(model, None):
        reference = response_states(model, batch)
    got, expected = torch.stack(model.packed_logps(batch, reference)), one_by_one(untouched, raw, reference=True)
    assert expected[:2].std() > 1 and expected[2:].min() > 0.01
    assert_same(got.detach(), expected.detach())
    weights = torch.linspace(-1, 1.5, got.numel(), dtype=torch.float64).view(got.shape)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(untouched.named_parameters())
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            assert parameter.grad.norm() > 1e-6
            assert_same(parameter.grad, gradients[path].grad, 1e-9)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
def test_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointed in (False, True):
        model, _, pairs, _ = family(name)
        prepared(model, pairs)
        if checkpointed:
            enable_checkpointing(model)
        model.train()
        chosen, rejected = model.packed_logps(pack(pairs))
        (chosen - 0.5 * rejected).sum().backward()
        gradients.append([parameter.grad for path, parameter in model.named_parameters() if "lora_" in path])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_same(checkpointed, plain)


@pytest.mark.parametrize("name", [build.__name__ for build in PLAIN])
@torch.no_grad()
def test_where_pictures_see_themselves_whole_sequences_are_scored_one_by_one(name):
    model, untouched, pairs, raw = family(name)
    text = [(prompt[-6:], *responses, None) for prompt, *responses, _ in raw]  # no pictures
    pairs, raw = pairs + [Pair(*row[:3]) for row in text], raw + text
    line = prepared(model, pairs)
    reason = "its pictures see themselves whole" if name == "gemma3" else "the tokens of its prompts see each other"
    assert line == f"packed pairs: off, sequences are scored one by one ({reason})"
    assert prepared(copy.deepcopy(model).bfloat16(), pairs) == line  # where rounding might hide it
    assert_same(torch.stack(model.packed_logps(pack(pairs))), one_by_one(untouched, raw))


# -- mistakes that would be seen -----------------------------------------------------------------------------------


def difference(model, batch, expected):
    got = torch.stack(model.packed_logps(batch))
    return ((got - expected).abs() / expected.abs()).max().item()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_positions_that_do_not_restart_and_exchanged_pictures_are_seen(name, monkeypatch):
    model, untouched, pairs, raw = family(name)
    prepared(model, pairs)
    expected = one_by_one(untouched, raw)
    assert difference(model, pack(pairs), expected) < 1e-12

    batch = pack(pairs)
    with monkeypatch.context() as patch:
        on = torch.arange(batch.input_ids.shape[1])
        patch.setattr(vision, "positions", lambda *_: on[None])
        assert difference(model, batch, expected) > 1e-2

    encode = vision.encode

    def exchanged(*args):
        features = encode(*args)["image"]
        if isinstance(features.pooler_output, torch.Tensor):
            features.pooler_output = features.pooler_output.flip(0)
        else:
            lengths = [len(feature) for feature in features.pooler_output]
            features.pooler_output = list(torch.cat(list(features.pooler_output)).flip(0).split(lengths))
        return {"image": features}

    with monkeypatch.context() as patch:
        patch.setattr(vision, "encode", exchanged)
        assert difference(model, pack(pairs), expected) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_pair_is_encoded_once_for_policy_and_reference(name):
    model, _, pairs, _ = family(name)
    prepared(model, pairs)
    kind, calls = type(model.base_model), []
    with pytest.MonkeyPatch.context() as patch:
        encode = kind.get_image_features
        patch.setattr(kind, "get_image_features", lambda self, *a, **k: calls.append(1) or encode(self, *a, **k))
        batch = pack(pairs)
        with lora.use_adapter(model, None):
            reference = response_states(model, batch)
        model.packed_logps(batch, reference)
        assert len(calls) == 2  # of three pairs with pictures, as the first was the probe's
        again = torch.stack(model.packed_logps(pack(pairs)))
        assert len(calls) == 2
        patch.setattr(vision, "KEPT_BYTES", 0)
        del model.base_model.kept_features
        for number in (5, 8):
            assert torch.equal(torch.stack(model.packed_logps(pack(pairs))), again)
            assert len(calls) == number


# -- what two pairs with the same ids and other pictures are -----------------------------------------------------------


def seeing(number, prompt=(5, 6), chosen=(7,), rejected=(8,)):
    return Pair([*prompt], [*chosen], [*rejected], pictures=Processed([*prompt], {}, (f"sha {number}",)))


def test_prompts_with_other_pictures_are_other_prompts():
    pairs = [seeing(number) for number in range(8)]
    train, held_out = hold_out(pairs, 3, seed=0)
    assert len(train) == 5 and len(held_out) == 3
    both, labels = joined(pairs[:2], [pairs[1], pairs[2]])
    assert len(both) == 3 and labels == [[1, 0], [1, 1], [0, 1]]
    assert fingerprint(pairs[:1]) != fingerprint(pairs[1:2])
    assert fingerprint(pairs[:1]) != fingerprint([pairs[0]._replace(pictures=None)])


# -- its useful work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "smolvlm"])
def test_useful_operations_count_tokens_of_pictures_in_the_decoder_and_not_the_tower(name):
    """torch's own counter over a forward and a backward, attention left out: in the second pass features were kept."""
    model, raw = vision_model(name, torch.float32)
    pairs = [
        Pair(*pair, pictures=given and Processed(pair[0], given, (f"sha {number}",)))
        for number, (*pair, given) in enumerate(raw)
    ]
    prepared(model, pairs)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # so that gradients flow through every layer
    products = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            chosen, rejected = model.packed_logps(pack(pairs))
            (chosen - rejected).sum().backward()
        counts.append(sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in products))
    without = [pair._replace(prompt_ids=[token for token in pair[0] if token != IMAGE]) for pair in pairs]
    assert sum(speed.useful_flops(model, pairs)) == counts[1] < counts[0], "with and without the tower"
    assert sum(speed.useful_flops(model, without)) < 0.8 * counts[1]
