"""A tiny LLaVA as a user has one: a folder with model, tokenizer and processor; pictures, and rows read with these."""

import io
from argparse import Namespace

import torch
import transformers
from PIL import Image
from runs import adapter_of
from tiny_vision import IMAGE, vision_model
from worlds import char_tokenizer, write_rows

from formats.model_files import load_tokenizer
from formats.picture_reader import PictureReader
from preference_data import load_pairs

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_model(folder):
    """A LLaVA of 16 tokens a picture, in fp32, with its tokenizer and processor."""
    model, _ = vision_model("llava", torch.float32)
    model.save_pretrained(folder)
    tokenizer = char_tokenizer(template=TEMPLATE, more={"<image>": IMAGE})
    processor_of(tokenizer).save_pretrained(folder)
    return folder


def processor_of(tokenizer):
    sizes = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )


def write_seen(folder):
    """The model, and pictures for 16 rows of `row`."""
    write_model(folder / "model")
    (folder / "pictures").mkdir()
    for number in range(16):
        picture(number, (40, 32) if number % 3 else (64, 48)).save(folder / f"pictures/{number}.png")
    return folder


def picture(number, size=(40, 32)):
    image = Image.effect_noise(size, 90).convert("RGB")
    image.paste((number * 9 % 256, number * 31 % 256, number * 77 % 256), (0, 0, 20, 20))
    return image


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def row(number):
    asked = {"prompt": f"what {number}?", "chosen": f"a {chr(97 + number)}", "rejected": f"no {number}"}
    if number % 4 == 3:
        return asked  # without
    if number % 4 == 2:
        return asked | {"images": [f"pictures/{number}.png", f"pictures/{number - 1}.png"]}
    return asked | {"image": f"pictures/{number}.png"}


def reader_of(folder):
    tokenizer = load_tokenizer(str(folder / "model"))
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    args = Namespace(model=str(folder / "model"), trust_remote_code=False)
    return tokenizer, PictureReader(args, config, tokenizer)


def read(folder, rows, max_prompt_length=48, **options):
    path = write_rows(folder / "rows.jsonl", rows)
    tokenizer, reader = reader_of(folder)
    return load_pairs(str(path), tokenizer, 512, max_prompt_length, reader=reader, **options)[0]


def assert_same_adapter(one, other, tolerance=0.0):
    first, second = adapter_of(one), adapter_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=tolerance, atol=tolerance)
