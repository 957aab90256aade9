"""What the checks stand on: lines of a report, tiny models of four kinds, pairs of random tokens, updates."""

import collections
from argparse import Namespace
from typing import NamedTuple

import torch
import transformers
from torch.autograd import DeviceType

import distributed
import lora
import losses
from formats.model_files import enable_checkpointing, sees
from harness import optimizers
from packed_model import prepare_model
from packing import pack
from preference_data import Pair

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = dict(vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=2, max_position_embeddings=1024)
SIZES |= dict(num_attention_heads=8, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=0)
GEMMA = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
KINDS = {  # name -> (transformers' name, its config)
    "qwen3": ("qwen3", SIZES | dict(head_dim=64, tie_word_embeddings=True)),
    "mistral, window 16": ("mistral", SIZES | dict(head_dim=64, sliding_window=16)),
    "gemma3, window 16": ("gemma3_text", SIZES | dict(head_dim=64) | GEMMA),
    "gpt2": ("gpt2", dict(vocab_size=2048, n_layer=2, n_head=4, n_embd=256, n_positions=1024)),
}
IMAGE = 2047  # the token that stands for a piece of a picture
TOWER = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
TOWER |= dict(model_type="clip_vision_model", image_size=32, patch_size=8)
TEXT = SIZES | dict(model_type="llama", head_dim=64)
ROPE = dict(rope_type="default", mrope_section=[4, 6, 6], rope_theta=10_000.0)
QWEN2_VL = dict(text_config=SIZES | dict(rope_parameters=ROPE), image_token_id=IMAGE, video_token_id=2046)
QWEN2_VL |= dict(vision_config=dict(depth=2, embed_dim=128, hidden_size=256, num_heads=4, mlp_ratio=2, patch_size=4))
SEEING = {  # name -> as in KINDS
    "llava": ("llava", dict(vision_config=TOWER, text_config=TEXT, image_token_id=IMAGE, image_seq_length=16)),
    "qwen2-vl": ("qwen2_vl", QWEN2_VL | dict(vision_start_token_id=2044, vision_end_token_id=2045)),
}
GRIDS = [[(1, 4, 6)], [(1, 8, 4), (1, 2, 2)], [], [(1, 6, 6)]]  # patches of the pictures of each pair
NEEDS_GPU = "not tried: this needs a GPU"
SHAPES = [(37, 20, 31), (5, 64, 1), (80, 48, 49), (16, 1, 96)]  # tokens of prompt, chosen, rejected


class Report:
    """A line for each finding: ok, FAIL (wrong), slow (right, but far from what the card can), note."""

    def __init__(self):
        self.found = collections.Counter()

    def line(self, kind, what, text):
        self.found[kind] += 1
        print(f"{kind:4}  {what:36} {text}", flush=True)

    def check(self, is_right, what, text, otherwise="FAIL"):
        self.line("ok" if is_right else otherwise, what, text)

    def judge(self, what, value, limit):
        """A distance that is to be at most `limit`."""
        self.check(value <= limit, what, f"{value:.1e} (at most {limit:.0e})")


def build(config, dtype=torch.float32):
    """A causal language model of transformers with random weights, or one that sees."""
    of_text, seeing = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (seeing if sees(config) else of_text)[type(config)]._from_config(config, dtype=dtype)


def tiny_model(kind, dtype, device, seed=0):
    """A model with random weights, the same on every device."""
    name, settings = (KINDS | SEEING)[kind]
    torch.manual_seed(seed)
    model = build(transformers.CONFIG_MAPPING[name](**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    return model.to(device, dtype).eval()


def adapted(kind, dtype, device):
    """(tiny model with LoRA, its parameters): A and B random."""
    model = tiny_model(kind, dtype, device)
    torch.manual_seed(1)
    parameters = lora.add_adapter(model, "policy", 8, 16)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for b in parameters[1::2]:
            b.copy_(0.02 * torch.randn(b.shape, generator=draw))
    return model, parameters


def random_pairs(shapes, vocab=2048, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = lambda count: torch.randint(2, vocab, (count,), generator=draw).tolist()
    return [Pair(ids(prompt), ids(chosen), ids(rejected)) for prompt, chosen, rejected in shapes]


class Made(NamedTuple):
    """What a processor would have made of the pictures of a prompt."""

    ids: list  # of the prompt
    given: dict  # {name: tensor} that the model takes beside them
    digests: tuple

    def open(self):
        return self.ids, self.given


def pairs_with_pictures(kind):
    """Pairs of one of SEEING, of random tokens and pixels: one picture, two of other sizes, none, one."""
    draw, pairs = torch.Generator().manual_seed(0), []
    for number, (pair, grids) in enumerate(zip(random_pairs(SHAPES, vocab=2000), GRIDS, strict=True)):
        if not grids:
            pairs.append(pair)
            continue
        if kind == "llava":
            block = [IMAGE] * 16 * len(grids)
            given = {"pixel_values": torch.randn(len(grids), 3, 32, 32, generator=draw)}
        else:  # a token is 2 x 2 patches of 4 x 4 pixels, three colours, two frames
            sizes = [frames * height * width for frames, height, width in grids]
            block = [token for size in sizes for token in (2044, *[IMAGE] * (size // 4), 2045)]
            given = {"pixel_values": torch.randn(sum(sizes), 96, generator=draw), "image_grid_thw": torch.tensor(grids)}
        ids = pair.prompt_ids[:3] + block + pair.prompt_ids[3:]
        if kind != "llava":
            given["mm_token_type_ids"] = torch.tensor([[int(token == IMAGE) for token in ids]])
        pairs.append(pair._replace(prompt_ids=ids, pictures=Made(ids, given, (f"picture {number}",))))
    return pairs


def loss_and_gradient(model, parameters, batch, with_kl, scale=1.0):
    """(log-probs (2B,), flat gradient of the DPO loss), fp64 on the CPU; scale: of the loss in backward, for fp16."""
    for parameter in parameters:
        parameter.grad = None
    states = None
    if with_kl:
        with torch.no_grad(), lora.use_adapter(model, None):
            states = model.response_states(batch)
    chosen, rejected, *divergences = model.packed_logps(batch, states)
    total = losses.dpo_loss(chosen, rejected, chosen.detach() - 1, rejected.detach() + 1, 0.1)[0].sum()
    total = total + 0.1 * sum(divergences).sum() if divergences else total
    (total * scale).backward()
    gradient = torch.cat([(parameter.grad / scale).double().flatten().cpu() for parameter in parameters])
    return torch.cat((chosen, rejected)).detach().double().cpu(), gradient


def profiled(work):
    """What a GPU did in work(): torch's averages of a profile."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:  # without that it warns
        work()
        torch.cuda.synchronize()
    return profiler.key_averages()


def launches_of(events):
    """Kernels and copies of a profile, once each: the host's calls that launched them are events too."""
    return sum(event.count for event in events if event.device_type != DeviceType.CPU)


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


class Updates:
    """Updates of DPO on a model with random weights, with LoRA (full: of all weights); its reference is the model."""

    def __init__(self, config, dtype, device, full=False, checkpointing=False, roles=("policy",)):
        with device:
            model = build(config, torch.float32 if full else dtype)
        self.model, self.device, self.roles = model, device, roles
        self.parameters = list(model.parameters()) if full else []
        for role in () if full else reversed(roles):  # the policy last: it is on
            parameters = lora.add_adapter(model, role, 16, 32, trainable=role == "policy")
            self.parameters = parameters if role == "policy" else []
        prepare_model(model)
        if checkpointing:
            enable_checkpointing(model, draws=False)
        model.train()
        flags = dict(optimizer="adamw", optimizer_offload=False, learning_rate=1e-5, weight_decay=0.0)
        self.optimizer = optimizers.make_optimizer(self.parameters, Namespace(**flags))
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.autocast = torch.autocast(device.type, dtype, enabled=full)

    def update(self, pairs):
        batch = pack(pairs, self.device)
        with self.autocast:
            chosen, rejected = self.model.packed_logps(batch)
            all_losses = losses.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0]
        self.scaler.scale(all_losses.sum() / len(pairs)).backward()
        distributed.take_step(self.parameters, self.optimizer, self.schedule, self.scaler, 1.0)

    def update_with_four_roles(self, pairs):
        """One of Safe-MM-DPO: the KL to the reference, which is the base, and scores of two reward models."""
        batch = pack(pairs, self.device)
        head = torch.ones(1, self.model.config.hidden_size, device=self.device)
        with torch.no_grad():
            for role in self.roles[1:]:
                with lora.use_adapter(self.model, role):
                    self.model.packed_scores(batch, head)
            with lora.use_adapter(self.model, None):
                states = self.model.response_states(batch)
        chosen, rejected, chosen_kl, rejected_kl = self.model.packed_logps(batch, states)
        all_losses = losses.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0]
        ((all_losses + 0.1 * (chosen_kl + rejected_kl)).sum() / len(pairs)).backward()
        distributed.take_step(self.parameters, self.optimizer, self.schedule, self.scaler, 1.0)
