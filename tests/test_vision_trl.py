"""The same weights, pictures and order through TRL's DPOTrainer with PEFT and through ours: the losses of ten updates.

The shared adapter has a random lora_B: with B = 0 the gradient of A is zero, and half of the comparison proves nothing.
"""

import pytest
import torch
import transformers
from PIL import Image
from runs import metrics_of, run_script
from tiny_llava import TEMPLATE, picture, processor_of
from tiny_vision import IMAGE, vision_model
from transformers import AutoModelForImageTextToText, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from worlds import assistant, char_tokenizer, user, write_rows

import lora
from packing import epoch_plan

STEPS, BATCH, RATE, BETA = 10, 2, 3e-3, 1.0
# Without the line break behind a turn, which TRL learns and ours leaves out.
PLAIN = TEMPLATE.replace("{{ '<|im_end|>\n' }}", "{{ '<|im_end|>' }}")
QWEN = "<|image_pad|>", "<|video_pad|>"


class OfImages(transformers.Qwen2VLProcessor):
    """Qwen2-VL's processor without that of videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = QWEN
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([*QWEN])
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen2_vl_processor(tokenizer):
    pixels = dict(patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=16 * 16, max_pixels=32 * 32)
    return OfImages(Qwen2VLImageProcessorPil(**pixels), tokenizer, PLAIN)


KINDS = {
    "llava": (processor_of, {"<image>": IMAGE}),
    "qwen2_vl": (qwen2_vl_processor, dict(zip(QWEN, (IMAGE, 151)))),
}


@pytest.fixture(scope="module", params=KINDS)
def shared(request, tmp_path_factory):
    """(folder with model, adapter, pictures and pairs; processor; rows in the order of our epoch)."""
    folder = tmp_path_factory.mktemp(request.param)
    make, tokens = KINDS[request.param]
    model, _ = vision_model(request.param, torch.float32)
    model.save_pretrained(folder / "model")
    mark = next(iter(tokens))
    tokenizer = char_tokenizer(template=PLAIN.replace("<image>", mark), more=tokens)
    processor = make(tokenizer)
    processor.chat_template = tokenizer.chat_template
    tokenizer.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.add_adapter(model, "random", r=4, alpha=8):
            parameter.normal_(0, 0.05, generator=generator)
    lora.save_adapter(model, "random", folder / "adapter", str(folder / "model"))
    (folder / "pictures").mkdir()
    rows = []
    for number in range(STEPS * BATCH):
        picture(number).save(folder / f"pictures/{number}.png")
        said = {"chosen": f"a {chr(97 + number)}", "rejected": f"no {number}"}
        rows.append({"images": [f"pictures/{number}.png"], "prompt": f"what {number % 3}?"} | said)
    write_rows(folder / "pairs.jsonl", rows)
    plan = epoch_plan(range(len(rows)), 0, 42, BATCH, 1, 1)
    return folder, processor, [rows[i] for _, ranks in plan for part in ranks[0] for i in part]


def losses_of_trl(shared, out, shown=lambda place: place):
    """shown(place): whose picture TRL is given for the row at a place."""
    folder, processor, rows = shared
    datasets, trl, peft = (
        pytest.importorskip(name, reason=f"yardstick {name} not installed") for name in ("datasets", "trl", "peft")
    )
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(folder / "adapter"), is_trainable=True)
    losses = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    given = []
    for place, row in enumerate(rows):
        image = Image.open(folder / rows[shown(place)]["images"][0]).convert("RGB")
        asked = [user([{"type": "image"}, {"type": "text", "text": row["prompt"]}])]
        said = {side: [assistant([{"type": "text", "text": row[side]}])] for side in ("chosen", "rejected")}
        given.append({"images": [image], "prompt": asked} | said)
    config = dict(per_device_train_batch_size=BATCH, learning_rate=RATE, beta=BETA, max_steps=STEPS, max_grad_norm=0.0)
    config |= dict(max_length=None, logging_steps=1, bf16=False, use_cpu=True, gradient_checkpointing=False)
    config |= dict(save_strategy="no", report_to="none", disable_tqdm=True, output_dir=str(out))
    rows = datasets.Dataset.from_list(given)
    InOrder(
        model, args=trl.DPOConfig(**config), train_dataset=rows, processing_class=processor, callbacks=[Recorder()]
    ).train()
    return losses


@pytest.fixture
def our_losses(shared, tmp_path, monkeypatch):
    folder, processor, _ = shared
    # Qwen2-VL's folder does not load without torchvision.
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    words = ["--model", folder / "model", "--dataset", folder / "pairs.jsonl", "--adapter", folder / "adapter"]
    words += ["--eval-samples", 0, "--dtype", "fp32", "--device", "cpu", "--batch-size", BATCH, "--report-to", "none"]
    words += ["--gradient-accumulation-steps", 1, "--learning-rate", RATE, "--beta", BETA, "--max-grad-norm", 0]
    run_script(
        [*words, "--logging-steps", 1, "--max-length", 96, "--max-prompt-length", 64, "--output-dir", tmp_path / "o"]
    )
    return [line["loss"] for line in metrics_of(tmp_path / "o")]


def test_losses_of_ten_updates(shared, our_losses, tmp_path):
    theirs = losses_of_trl(shared, tmp_path / "trl")
    assert len(our_losses) == len(theirs) == STEPS
    assert min(our_losses) < 0.6, "the runs have to move for the comparison to mean anything"
    assert max(abs(a - b) for a, b in zip(our_losses, theirs, strict=True)) < 1e-4
    exchanged = losses_of_trl(shared, tmp_path / "other", lambda place: place ^ 1)  # the two of each update
    assert max(abs(a - b) for a, b in zip(our_losses, exchanged, strict=True)) > 1e-3
