"""The three optimisers: offloaded AdamW is AdamW bit for bit, 8-bit AdamW is near it, and schedules, the scaler and
checkpoints treat them alike.
"""

import math
import sys
from argparse import Namespace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from distributed import take_step
from harness import checkpoints, optimizers

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]
SHAPES = (64, 96), (5,), (70, 60), (3, 4)  # above and below the 4,096 numbers from which on moments have 8 bits
UPDATES = 10


def flags(optimizer="adamw", offload=False, learning_rate=0.01, weight_decay=0.1):
    return Namespace(
        optimizer=optimizer, optimizer_offload=offload, learning_rate=learning_rate, weight_decay=weight_decay
    )


def adamw8bit():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 8-bit optimiser")
    return flags("adamw8bit")


def draws(seed, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in shapes]


class Training:
    """Parameters, the same in each instance, and what the scripts have around them."""

    def __init__(self, args, device="cpu", dtype=torch.float32, scale=None):
        self.parameters = [torch.nn.Parameter(start.to(device, dtype)) for start in draws(0)]
        self.optimizer = optimizers.make_optimizer(self.parameters, args)
        self.scheduler = get_scheduler("cosine", self.optimizer, 2, UPDATES)
        self.scaler = torch.amp.GradScaler(device, init_scale=scale or 1.0, enabled=scale is not None)

    def update(self, number, factor=1.0):
        """Update `number` (0, 1, ...), on its gradients times `factor`, clipped; the last parameter has none."""
        gradients = draws(number + 1)[:-1]
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = self.scaler.scale((factor * gradient).to(parameter))
        take_step(self.parameters, self.optimizer, self.scheduler, self.scaler, max_grad_norm=30.0)

    def save(self, folder):
        folder.mkdir()
        at = {"scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict()}
        at["rates"] = [group["lr"] for group in self.optimizer.param_groups]
        checkpoints.save_state(folder, checkpoints.training_tensors(self.parameters, self.optimizer), at)

    def restore(self, folder):
        _, at = checkpoints.load_state(folder, self.parameters, self.optimizer)
        self.scheduler.load_state_dict(at["scheduler"])
        self.scaler.load_state_dict(at["scaler"])


def trained(args, device="cpu"):
    training = Training(args, device)
    for number in range(UPDATES):
        training.update(number)
    return training


def interrupted(args, folder, device="cpu"):
    """As `trained`, but saved after 5 updates and gone on with in another instance."""
    first, second = Training(args, device), Training(args, device)
    for number in range(5):
        first.update(number)
    first.save(folder)
    with torch.no_grad():
        for parameter in second.parameters:
            parameter.zero_()  # what is restored counts, and nothing else
    second.restore(folder)
    for number in range(5, UPDATES):
        second.update(number)
    return second


def furthest(some, others):
    """The largest difference between two lists of tensors."""
    return max((a.detach().cpu() - b.detach().cpu()).abs().max().item() for a, b in zip(some, others, strict=True))


# -- AdamW, and its moments in the CPU's memory ----------------------------------------------------------------------


def test_adamw_is_the_textbook_adamw():
    """Loshchilov and Hutter 2019 (arXiv 1711.05101, algorithm 2), in fp64."""
    training = trained(flags())
    rates = [0.01 * (n / 2 if n < 2 else 0.5 * (1 + math.cos(math.pi * (n - 2) / (UPDATES - 2)))) for n in range(10)]
    weights, first, second = ([x.double() for x in draws(0)[:-1]], [0.0] * 3, [0.0] * 3)
    for number, rate in enumerate(rates):
        gradients = [gradient.double() for gradient in draws(number + 1)[:-1]]
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
        assert norm > 60  # clipping to 30 counts
        for i, gradient in enumerate(gradients):
            gradient = gradient * 30 / norm
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            step = first[i] / (1 - 0.9 ** (number + 1)) / ((second[i] / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8)
            weights[i] = weights[i] - rate * (step + 0.1 * weights[i])
    assert furthest(weights, training.parameters[:-1]) < 2e-6
    assert torch.equal(training.parameters[-1], draws(0)[-1])  # it had no gradient


@pytest.mark.parametrize("device", DEVICES)
def test_offloaded_adamw_is_adamw_also_when_resumed(tmp_path, device):
    expected = trained(flags()).parameters
    assert furthest(expected, draws(0)) > 0.02  # it moved
    most = 0 if device == "cpu" else 1e-6  # a GPU sums the norm in another order
    assert furthest(trained(flags(offload=True), device).parameters, expected) <= most
    assert furthest(interrupted(flags(offload=True), tmp_path / "checkpoint", device).parameters, expected) <= most


def test_a_checkpoint_of_adamw_can_be_gone_on_with_offloaded(tmp_path):
    plain, offloaded = Training(flags()), Training(flags(offload=True))
    plain.update(0)
    plain.save(tmp_path / "checkpoint")
    offloaded.restore(tmp_path / "checkpoint")
    for training in (plain, offloaded):
        training.update(1)
    assert furthest(plain.parameters, offloaded.parameters) == 0


def test_adamw_steps_on_copies_in_the_cpus_memory():
    """Without a GPU the number type stands for the device: the parameters are bf16, the copies fp32."""
    training = Training(flags(offload=True), dtype=torch.bfloat16)
    own = [(parameter.data_ptr(), parameter.dtype) for parameter in training.parameters]
    training.update(0)  # the rate of the first update is 0
    training.update(1)
    assert [(parameter.data_ptr(), parameter.dtype) for parameter in training.parameters] == own
    for parameter, gradient in zip(training.parameters[:-1], draws(2)):
        state = training.optimizer.state[parameter]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in state.values())
        assert state["exp_avg"].shape == gradient.shape
    plain = Training(flags())
    plain.update(0)
    plain.update(1)
    assert 0 < furthest(training.parameters, plain.parameters) < 0.02  # rounded to 8 bits below 4
    assert furthest(training.parameters[:1], draws(0)[:1]) > 0.002  # and written back


def test_restored_moments_do_not_go_where_the_parameters_are(tmp_path):
    """The number type stands for the device, as above: load_state_dict moves moments to both of a parameter's."""
    first, second = (Training(flags(offload=True), dtype=torch.bfloat16) for _ in range(2))
    own = [parameter.data_ptr() for parameter in second.parameters]
    first.update(0)
    first.update(1)
    first.save(tmp_path / "checkpoint")
    second.restore(tmp_path / "checkpoint")
    assert [parameter.data_ptr() for parameter in second.parameters] == own
    for a, b in zip(first.parameters, second.parameters):
        assert torch.equal(a, b) and b.dtype == torch.bfloat16
        before, after = first.optimizer.state[a], second.optimizer.state[b]
        assert before.keys() == after.keys()
        assert all(after[name].dtype == torch.float32 and torch.equal(before[name], after[name]) for name in before)


def test_a_weight_that_is_written_between_two_steps_counts():
    training = Training(flags(offload=True))
    training.update(0)
    with torch.no_grad():
        training.parameters[0].fill_(7.0)
    training.update(1)
    assert (training.parameters[0] - 7).abs().max() < 0.02


def test_gradients_are_back_behind_the_step():
    training = Training(flags(offload=True))
    gradients = draws(1)
    for parameter, gradient in zip(training.parameters, gradients):
        parameter.grad = gradient
    training.optimizer.step()
    for parameter, gradient in zip(training.parameters, gradients):
        assert parameter.grad is gradient


@pytest.mark.gpu
@no_gpu
def test_no_moment_is_on_the_gpu(tmp_path):
    """Allocated bytes behind the first step, and behind a restored one, are those before it."""
    training, resumed = (Training(flags(offload=True), "cuda") for _ in range(2))
    before = torch.cuda.memory_allocated()
    training.update(0)
    assert torch.cuda.memory_allocated() == before
    training.save(tmp_path / "checkpoint")
    resumed.restore(tmp_path / "checkpoint")
    resumed.update(1)
    assert torch.cuda.memory_allocated() == before
    for parameter in resumed.parameters[:-1]:
        assert parameter.is_cuda
        assert all(value.device.type == "cpu" for value in resumed.optimizer.state[parameter].values())


def test_sharded_parameters_are_left_to_their_own_policy():
    """Parameters and gradients are on the CPU with fully_shard's CPUOffloadPolicy, so AdamW's moments are too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        plain = [torch.nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)), offload_policy=CPUOffloadPolicy(pin_memory=False))
        parameters = list(model.parameters())
        optimizer = optimizers.make_optimizer(parameters, flags(offload=True))
        expected = torch.optim.AdamW(plain, lr=0.01, weight_decay=0.1, fused=True)
        x = torch.randn(4, 8)
        for _ in range(3):
            model(x).square().sum().backward()
            torch.nn.functional.linear(x, *plain).square().sum().backward()
            for one in (optimizer, expected):
                one.step()
                one.zero_grad()
        moment = optimizer.state[parameters[0]]["exp_avg"]
        assert isinstance(moment, DTensor) and moment.device.type == "cpu"
        assert furthest([parameter.full_tensor() for parameter in parameters], plain) == 0
    finally:
        dist.destroy_process_group()


# -- moments of 8 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_moments_of_8_bits(device):
    args = adamw8bit()
    training = trained(args, device)
    large, small, other, without = training.parameters
    # two moments of one byte, and an fp32 scale of each for 256 numbers; the count of steps
    assert state_bytes(training, large) == 64 * 96 * 2 + 2 * 64 * 96 // 256 * 4 + 8
    assert state_bytes(training, other) == 70 * 60 * 2 + 2 * math.ceil(70 * 60 / 256) * 4 + 8
    assert state_bytes(training, small) == 5 * 8 + 8  # below 4,096 numbers: fp32
    assert not training.optimizer.state[without]
    assert training.optimizer.state[large]["state1"].dtype == torch.uint8
    plain = trained(flags(), device)
    assert state_bytes(plain, plain.parameters[0]) == 64 * 96 * 8 + 4


def state_bytes(training, parameter):
    return sum(value.nbytes for value in training.optimizer.state[parameter].values())


@pytest.mark.parametrize("device", DEVICES)
def test_8_bit_adamw_is_near_adamw(device):
    """A regression: the way from the start to the end of 20 updates differs by a few per cent."""
    adamw8bit()
    x, truth, start = (tensor.to(device) for tensor in draws(3, [(256, 64), (64, 96), (64, 96)]))
    ends, losses = {}, {}
    for name in ("adamw", "adamw8bit"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = optimizers.make_optimizer([weight], flags(name, learning_rate=0.05))
        losses[name] = []
        for _ in range(20):
            loss = (x @ (weight - truth)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
        ends[name] = weight.detach()
    way, difference = ends["adamw"] - start, ends["adamw8bit"] - ends["adamw"]
    assert losses["adamw"][-1] < 0.3 * losses["adamw"][0]
    assert 0.005 * way.norm() < difference.norm() < 0.06 * way.norm()  # 0.03 on a CPU
    assert losses["adamw8bit"][-1] == pytest.approx(losses["adamw"][-1], rel=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_8_bit_adamw_resumed_is_uninterrupted(tmp_path, device):
    args = adamw8bit()
    whole, resumed = trained(args, device), interrupted(args, tmp_path / "checkpoint", device)
    assert furthest(whole.parameters, resumed.parameters) == 0
    for a, b in zip(whole.parameters, resumed.parameters):
        before, after = whole.optimizer.state[a], resumed.optimizer.state[b]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_count_of_steps_is_restored_for_bf16_parameters(tmp_path):
    args = adamw8bit()
    first, second = (Training(args, dtype=torch.bfloat16) for _ in range(2))
    first.update(0)
    for state in first.optimizer.state.values():
        if state:
            state["step"] += 256  # 257 has no bf16
    first.save(tmp_path / "checkpoint")
    second.restore(tmp_path / "checkpoint")
    assert [int(second.optimizer.state[parameter]["step"]) for parameter in second.parameters[:-1]] == [257] * 3


# -- the scaler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "offload"])
def test_an_update_that_is_not_finite_is_skipped(name, device):
    args = adamw8bit() if name == "adamw8bit" else flags(offload=name == "offload")
    training, expected = (Training(args, device, scale=1024.0) for _ in range(2))
    training.update(0)
    before = [parameter.detach().clone() for parameter in training.parameters]
    training.update(5, factor=math.inf)
    assert furthest(training.parameters, before) == 0
    assert (training.scaler.get_scale(), training.scheduler.last_epoch) == (512.0, 1)
    training.update(1)
    expected.update(0)
    expected.update(1)
    assert furthest(training.parameters, expected.parameters) == 0  # scales are powers of two
    assert furthest(training.parameters, before) > 0.002


def test_an_offloaded_step_that_is_skipped_copies_nothing():
    training = Training(flags(offload=True), scale=1024.0)
    training.update(0, factor=math.inf)
    assert not training.optimizer.state


# -- flags that cannot be --------------------------------------------------------------------------------------------


def error(args, device_type="cpu", **named):
    with pytest.raises(optimizers.OptimizerError) as caught:
        optimizers.check(args, device_type, **named)
    return str(caught.value)


@pytest.mark.parametrize("device", DEVICES)
def test_what_can_be(device):
    optimizers.check(flags(), device)
    optimizers.check(flags(offload=True), device, sharded=True)
    optimizers.check(adamw8bit(), device)


def test_8_bits_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises ImportError
    optimizers.check(flags(), "cpu")
    line = error(flags("adamw8bit"))
    assert line.startswith("--optimizer adamw8bit needs bitsandbytes (")
    assert line.endswith("): pip install bitsandbytes, or --optimizer adamw")


def test_8_bits_offloaded():
    assert error(flags("adamw8bit", offload=True)) == (
        "--optimizer-offload does not go with --optimizer adamw8bit, whose moments are small and stay on the device: "
        "leave one of the two out"
    )


def test_8_bits_of_sharded_weights():
    line = error(flags("adamw8bit"), sharded=True)
    assert line == "--optimizer adamw8bit cannot step on weights that are sharded over ranks: use --optimizer adamw"


def test_8_bits_on_a_device_where_bitsandbytes_cannot_step():
    """MPS: 0.50 has no 8-bit kernel there, and other machines have no such device."""
    args = adamw8bit()
    line = error(args, "mps")
    assert line.startswith("--optimizer adamw8bit: bitsandbytes 0.") and " cannot step on mps (" in line
    assert line.endswith("): use --optimizer adamw") and "\n" not in line and len(line) < 240
