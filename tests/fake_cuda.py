"""CUDA without a GPU: tensors on `cuda` have shapes, types and devices, and no numbers; those on the CPU are real.

Every operator goes through one dispatch mode.  Those on fake tensors run in torch's FakeTensorMode, which raises where
devices, types or shapes do not go together.  What would make the host wait for a GPU is written down, with the line of
ours that asked:

    read      .item(), bool(), float(), .tolist()                 for all that is queued
    D2H       a copy to the CPU that is not non_blocking          the same
    H2D       a copy from memory that is not pinned               until the copy is through
    shape     nonzero, boolean masks, masked_select, unique       the shape of the result is read

Kernels are counted as operators that are no views: one may be several, so the count is a lower bound.  torch's private
parts are in use here: it works with the torch of requirements.txt alone (`on_tested_torch`).
"""

import collections
import contextlib
import ctypes
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]
TESTED = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
on_tested_torch = pytest.mark.skipif(
    torch.__version__.partition("+")[0] != TESTED.removeprefix("torch==") or torch.version.cuda is not None,
    reason=f"fake CUDA takes the place of private parts of {TESTED} without CUDA",
)

aten = torch.ops.aten
SHAPE_IS_READ = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
NO_KERNEL = "detach _unsafe_view lift_fresh empty empty_like empty_strided new_empty new_empty_strided alias".split()
NO_KERNEL = {f"aten::{name}" for name in [*NO_KERNEL, "_reshape_alias"]}
GB = 10**9


def line_of_ours():
    """file:line of the innermost frame that is the project's, outside of tests."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
    ours = [frame for frame in frames if not {"tests", ".venv"} & set(Path(frame.filename).parts)]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "a test"


def is_mask(index):
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class FakeCuda(TorchDispatchMode):
    """waits {(kind, line of ours): how often}, while `listens`, to `heard` kernels; kernels {operator: how often};
    attention {(kernel of torch's attention, causal or mask): how often}.
    """

    def __init__(self):
        super().__init__()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits, self.kernels, self.attention = (collections.Counter() for _ in range(3))
        self.listens, self.heard = True, 0
        self.pinned = []  # held, so that no other storage gets the number of one

    def wait(self, kind):
        if self.listens:
            self.waits[kind, line_of_ours()] += 1

    def fake(self, tensor, device="cuda:0", dtype=None):
        """A fake tensor like a real one, on `device`."""
        with self.fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=device)

    def is_pinned(self, tensor):
        return any(tensor.untyped_storage()._cdata == pinned.untyped_storage()._cdata for pinned in self.pinned)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:  # C++ asks, for streams: of `meta` there are none
            return torch.device("meta") if isinstance(args[0], FakeTensor) else args[0].device
        fakes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        device = kwargs.get("device") and torch.device(kwargs["device"])
        if fakes and device and device.type == "meta":  # it took the device from what it was told
            kwargs, device = kwargs | {"device": torch.device("cuda:0")}, torch.device("cuda:0")
        if fakes:  # and what it made there
            args, kwargs = tree_map(self._off_meta, (args, kwargs))
        if not fakes and not (device and device.type == "cuda"):
            return function(*args, **kwargs)
        if function is aten._local_scalar_dense.default:
            self.wait("read")
            return torch.ones((), dtype=args[0].dtype).item()
        if function is aten._to_copy.default and fakes and device and device.type == "cpu":
            if not kwargs.get("non_blocking"):
                self.wait("D2H")
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function is aten._to_copy.default and not fakes:
            if not (self.is_pinned(args[0]) and kwargs.get("non_blocking")):
                self.wait("H2D")
            return self.fake(args[0], device, kwargs.get("dtype"))
        if function is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.wait("D2H")
            return args[0].fill_(1)
        if function is aten.copy_.default and not isinstance(args[1], FakeTensor):
            if not self.is_pinned(args[1]):
                self.wait("H2D")
            args = args[0], self.fake(args[1]), *args[2:]
        if function in SHAPE_IS_READ:
            self.wait("shape")
            with self.fake_mode:
                if function is aten.nonzero.default:
                    return torch.empty(1, args[0].ndim, dtype=torch.long, device=args[0].device)
                if function is aten.masked_select.default:
                    return torch.empty(1, dtype=args[0].dtype, device=args[0].device)
        if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = args[0], self._indices(args[1]), *args[2:]
        if not function.is_view and function.name().partition(".")[0] not in NO_KERNEL:
            self.kernels[function.name().partition(".")[0]] += 1
            self.heard += self.listens
        with self.fake_mode:
            return function(*args, **kwargs)

    def _off_meta(self, leaf):
        is_meta = isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor) and leaf.device.type == "meta"
        return self.fake(leaf) if is_meta else leaf

    def _indices(self, indices):
        """A mask is as many indices as it has dimensions, found by reading it; what is on the CPU is copied first."""
        found = []
        for index in indices:
            if is_mask(index):
                self.wait("shape")
                with self.fake_mode:
                    found += [torch.zeros(1, dtype=torch.long, device="cuda:0") for _ in range(index.ndim)]
            elif index is not None and not isinstance(index, FakeTensor):
                self.wait("H2D")
                found.append(self.fake(index))
            else:
                found.append(index)
        return found


def guard_devices():
    """A build without CUDA lacks the guard of its devices, which indexing asks for: the one of `meta` does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    registry = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    registry[cuda] = registry[cuda] or registry[meta]
    torch._C._ensureCUDADeviceGuardSet()


def kernel_of(query, key, mask, causal, grouped, capability):
    """The kernel that torch's attention takes on CUDA with cuDNN's off (sdp_utils.cpp of 2.11 to 2.13)."""
    is_half, square = query.element_size() == 2, query.shape[2] == key.shape[2]
    narrow = query.dtype == torch.float16 or (query.dtype == torch.bfloat16 and capability >= (8, 0))
    size, same_heads = query.shape[-1], query.shape[1] == key.shape[1]
    if capability >= (8, 0) and narrow and mask is None and size <= 256 and (square or not causal):
        return "flash"
    if size % (8 if is_half else 4) == 0 and (narrow or query.dtype == torch.float32) and same_heads and not grouped:
        return "efficient"
    return "math"


@contextlib.contextmanager
def cuda_without_gpu(capability=(8, 0)):
    """A block in which `cuda` is fake, of this compute capability.  Yields the FakeCuda."""
    guard_devices()
    mode, patches = FakeCuda(), pytest.MonkeyPatch()
    real_attention, real_tensor = F.scaled_dot_product_attention, torch.tensor

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not isinstance(query, FakeTensor):
            return real_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        kernel = kernel_of(query, key, attn_mask, is_causal, enable_gqa, capability)
        mode.attention[kernel, "causal" if is_causal else "mask"] += 1
        if kernel == "flash":
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if kernel == "math":
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            given = attn_mask, dropout_p, is_causal
            return aten._scaled_dot_product_attention_math(query, key, value, *given, scale=scale)[0]
        if attn_mask is not None:
            assert all(stride % 8 == 0 for stride in attn_mask.stride()[:-1]), "the kernel would copy the mask"
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        given = attn_mask, torch.is_grad_enabled(), dropout_p, is_causal
        return aten._scaled_dot_product_efficient_attention(query, key, value, *given, scale=scale)[0]

    def tolist(self):
        mode.wait("read")
        return torch.ones(self.shape, dtype=self.dtype).tolist()

    def tensor(data, *args, device=None, **kwargs):
        if device is None or torch.device(device).type != "cuda":
            return real_tensor(data, *args, device=device, **kwargs)
        mode.wait("H2D")
        return mode.fake(real_tensor(data, *args, **kwargs), device)

    def pin_memory(self, *_):
        assert not isinstance(self, FakeTensor), f"pin_memory of a tensor on {self.device}"
        mode.pinned.append(self.clone())
        return mode.pinned[-1]

    class Event:
        def __init__(self, **_):
            self.record = lambda *_: None
            self.elapsed_time = lambda other: 1.0

    patches.setattr(F, "scaled_dot_product_attention", attention)
    patches.setattr(FakeTensor, "tolist", tolist)  # which takes number by number
    patches.setattr(torch.Tensor, "pin_memory", pin_memory)
    patches.setattr(torch, "tensor", tensor)
    patches.setattr(torch.cuda, "Event", Event)
    patches.setattr(torch.cuda, "synchronize", lambda *_: mode.wait("read"))
    patches.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": capability}
    answers |= {"is_bf16_supported": capability >= (8, 0), "mem_get_info": (80 * GB, 80 * GB), "_lazy_init": None}
    answers |= {"set_device": None, "set_rng_state": None, "get_rng_state": torch.zeros(16, dtype=torch.uint8)}
    answers |= dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated"), GB)
    for name, answer in answers.items():
        patches.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    try:
        with torch.autograd.set_multithreading_enabled(False), mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield mode
    finally:
        patches.undo()
        torch.backends.cuda.enable_cudnn_sdp(True)


def to_fake_cuda(model, mode, moved=None):
    """Put fake tensors on cuda:0 in the place of a real model's; shared ones stay shared.  moved {real: fake}."""
    moved = {} if moved is None else moved
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                if parameter not in moved:
                    fake = mode.fake(parameter.detach())
                    moved[parameter] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = moved[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):
                module._buffers[name] = mode.fake(buffer)
    return model
