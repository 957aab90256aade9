"""One call of FlashAttention for all pairs of a row: the kernel's contract, done by hand in fp64 on a CPU, against the
path of two calls for each pair and against sequences scored one by one; where the kernel is taken, and with what.
"""

import copy

import pytest
import torch
from odd_models import Calls, build
from tiny_models import (
    ON,
    PACKING,
    SHAPES,
    assert_same,
    double_model,
    oracle,
    random_adapter,
    random_pairs,
    scores,
    tiny_model,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import packed_attention
from formats.model_files import enable_checkpointing
from packed_attention import PairLayout, Spans, attend_at_once, attend_by_pairs
from packed_model import packed_scores, prepare_model
from packing import Segment, pack

SEGMENTS = Segment(0, 6, 10, 13), Segment(13, 14, 15, 16), Segment(16, 28, 33, 45)


def by_hand(query, key, value, spans, scaling, reach):
    """What FlashAttention promises (flash_attn_varlen_func, causal): sequence by sequence, the last query at the last
    key; query head h reads key head h // (heads / kv heads); a window of `reach` keys, the query's own among them.
    """
    outputs, groups = [], query.shape[1] // key.shape[1]
    query_borders, key_borders = spans.query_borders.tolist(), spans.key_borders.tolist()
    assert spans.most_queries == max(b - a for a, b in zip(query_borders, query_borders[1:]))
    assert spans.most_keys == max(b - a for a, b in zip(key_borders, key_borders[1:]))
    for n in range(len(query_borders) - 1):
        q = query[query_borders[n] : query_borders[n + 1]]
        k, v = (x[key_borders[n] : key_borders[n + 1]].repeat_interleave(groups, 1) for x in (key, value))
        rows = torch.arange(len(k) - len(q), len(k))[:, None]
        columns = torch.arange(len(k))
        seen = (columns <= rows) & (columns > rows - (reach or len(k)))
        weights = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        weights = weights.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.fixture
def flash_by_hand(monkeypatch):
    """Every packed pass takes the one call, and the kernel is the one above."""
    monkeypatch.setattr(packed_attention, "runs_flash", lambda query: True)
    monkeypatch.setattr(packed_attention, "flash", by_hand)


def test_spans_of_a_row():
    """p0 p1 c0 r0 r1 | p0 c0 c1 r0."""
    spans = Spans.of((Segment(0, 2, 3, 5), Segment(5, 6, 8, 9)), "cpu")
    assert spans.query_borders.tolist() == [0, 3, 5, 8, 9]  # of the row itself: p0 p1 c0, r0 r1, p0 c0 c1, r0
    assert spans.key_borders.tolist() == [0, 3, 7, 10, 12]
    assert spans.key_places.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 5, 8]
    assert (spans.most_queries, spans.most_keys) == (3, 4)
    assert {x.dtype for x in spans[:3]} == {torch.int32}


@pytest.mark.parametrize("reach", [None, 1, 3, 8, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
def test_one_call_is_two_calls_for_each_pair(heads, kv_heads, reach, flash_by_hand):
    draw = torch.Generator().manual_seed(0)
    shapes = (1, heads, 45, 8), (1, kv_heads, 45, 8), (1, kv_heads, 45, 8)
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    expected = attend_by_pairs(*inputs, PairLayout(SEGMENTS), 0.3, reach)
    got = attend_at_once(*inputs, Spans.of(SEGMENTS, "cpu"), 0.3, reach)
    assert_same(got, expected)
    pull = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    for ours, theirs in zip(torch.autograd.grad(got, inputs, pull), torch.autograd.grad(expected, inputs, pull)):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", PACKING)
def test_whole_models_by_one_call_give_what_sequences_alone_give(name, flash_by_hand):
    """Log-probs, KL to the base, scores, and LoRA's gradients, with and without checkpointing, in fp64."""
    pairs = random_pairs(SHAPES)
    batch, results = pack(pairs), {}
    for how in ("at once", "checkpointed", "alone"):
        model = double_model(name)
        parameters = random_adapter(model)
        model.double()  # fp32 adapters would hide anything below 1e-7
        if how == "alone":
            total = oracle(model, pairs)
        else:
            assert prepare_model(model) == ON
            if how == "checkpointed":
                enable_checkpointing(model)
            model.train()
            with torch.no_grad(), lora.use_adapter(model, None):
                base = model.response_states(batch)
            *sides, chosen_kl, rejected_kl = model.packed_logps(batch, base)
            total = torch.stack(sides)
            assert (chosen_kl > 0).all() and (rejected_kl > 0).all()
        (total[0] - 0.5 * total[1]).sum().backward()
        results[how] = [total.detach(), *(parameter.grad for parameter in parameters)]
    for at_once, checkpointed, alone in zip(*results.values()):
        assert_same(at_once, alone)
        assert_same(checkpointed, at_once)


@torch.no_grad()
def test_scores_by_one_call_are_those_by_pairs(monkeypatch):
    model, batch, head = tiny_model("mistral", torch.float64), pack(random_pairs(SHAPES)), torch.randn(1, 32)
    assert prepare_model(model) == ON
    expected = torch.stack(packed_scores(model, batch, head))
    monkeypatch.setattr(packed_attention, "runs_flash", lambda query: True)
    monkeypatch.setattr(packed_attention, "flash", by_hand)
    assert_same(torch.stack(packed_scores(model, batch, head)), expected)


@torch.no_grad()
def test_chunks_go_by_pairs_unless_no_sequence_leaves_its_first(monkeypatch):
    """Llama 4's layers of chunks of 12: the kernel knows windows, and no chunks."""
    taken = []
    monkeypatch.setattr(packed_attention, "runs_flash", lambda query: True)
    monkeypatch.setattr(packed_attention, "flash", lambda *inputs: taken.append(inputs[-1]) or by_hand(*inputs))
    model = build("llama4", torch.float64)
    untouched = copy.deepcopy(model)
    assert prepare_model(model).startswith(ON)
    for shapes, of_layers in (([(9, 5, 4)], [None]), ([(4, 3, 3)], [None, None])):
        taken.clear()
        got, pairs = scores(model, random_pairs(shapes)), random_pairs(shapes)
        assert taken == of_layers
        assert_same(got, oracle(untouched, pairs), tolerance=1e-6)


# -- on CUDA, without a GPU ----------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Names and arguments of the operators that are called."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append((function.name(), args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def __init__(self):
        super().__init__()
        self.found = []


def on_cuda(dtype, capability, monkeypatch, head_dim=8, reach=None):
    """The operators and the calls of torch's attention for three pairs, in fake tensors, which have no numbers."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(packed_attention, "send", lambda tensor, device: torch.empty_like(tensor, device=device))
    module = nn.Module()
    module.pair_reach = reach
    with FakeTensorMode():
        query = torch.empty(1, 4, 45, head_dim, dtype=dtype, device="cuda")
        key = torch.empty(1, 2, 45, head_dim, dtype=dtype, device="cuda")
        with Calls() as calls, Operators() as operators:
            output = packed_attention.packed_attention(module, query, key, key, None, PairLayout(SEGMENTS))[0]
    assert output.shape == (1, 45, 4, head_dim) and output.device.type == "cuda"
    return [found for found in operators.found if "flash" in found[0]], calls.found


@pytest.mark.parametrize("reach", [None, 5])
@pytest.mark.parametrize(("dtype", "capability"), [(torch.bfloat16, (8, 0)), (torch.float16, (9, 0))])
def test_on_newer_gpus_three_pairs_are_one_call(dtype, capability, reach, monkeypatch):
    flash, others = on_cuda(dtype, capability, monkeypatch, reach=reach)
    ((name, args, kwargs),) = flash
    assert name == "aten::_flash_attention_forward" and not others
    query, key, value, query_borders, key_borders, *numbers = args
    assert query.shape == (45, 4, 8) and key.shape == value.shape == (45 + 6 + 1 + 12, 2, 8)  # heads are grouped
    assert query_borders.shape == key_borders.shape == (7,)
    assert numbers == [17, 24, 0.0, True, False]
    window = (kwargs.get("window_size_left"), kwargs.get("window_size_right"))
    assert window == ((None, None) if reach is None else (4, 0))


@pytest.mark.parametrize(
    ("dtype", "capability", "head_dim"),
    [
        (torch.float16, (7, 5), 8),
        (torch.float32, (9, 0), 8),
        (torch.bfloat16, (9, 0), 512),
        (torch.bfloat16, (9, 0), 12),
    ],
)
def test_elsewhere_each_head_has_keys_of_its_own(dtype, capability, head_dim, monkeypatch):
    """Grouped heads would be torch's math kernel, which keeps tokens x tokens for each head."""
    flash, calls = on_cuda(dtype, capability, monkeypatch, head_dim)
    assert not [name for name, *_ in flash if name == "aten::_flash_attention_forward"]
    assert calls == [(True, False), (True, True)] * 3  # (as many heads, by a mask): chosen, rejected


@pytest.mark.parametrize(("keys", "queries"), [(9, 3), (16, 16), (1, 1)])
def test_rows_of_masks_begin_at_whole_16_bytes(keys, queries):
    mask = PairLayout(()).mask(queries, keys, None, torch.empty(0, dtype=torch.bfloat16))
    assert mask.shape == (queries, keys) and mask.stride(0) % 8 == 0 and mask.stride(1) == 1


def test_under_autocast_queries_are_cast_once_in_each_layer():
    """Norms of fp32 weights leave fp32: 2 layers, query and key, of which the value is in bf16 already."""
    model, casts = tiny_model("qwen3"), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
                casts.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    assert prepare_model(model) == ON
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts():
        scores(model, random_pairs([(5, 4, 3)] * 3))
    assert [shape for shape in casts if shape[1:2] in ((4,), (2,))] == [(1, 4, 36, 8), (1, 2, 36, 8)] * 2
