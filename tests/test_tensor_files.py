"""What a file holds when it is read counts, whatever becomes of the file: on a CPU the libraries map it."""

import os
import shutil

import pytest
import torch
from runs import adapter_bytes, dpo_run
from safetensors.torch import save_file
from tiny_models import CONFIGS, tiny_model
from worlds import make_adapter

import lora
from formats.model_files import ModelError, load_model
from formats.tensor_files import load_file
from preference_prompt import read_soft_prompt

IDS = torch.tensor([[70, 80, 90, 100]])


def spoil(path):
    """Overwrite the tensors of a file in place, as `cp` does."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        file.write(b"\x3e" * (size - file.tell()))


def of_model(folder, scores):
    tiny_model("qwen3", vocab_size=128).save_pretrained(folder)
    model = load_model(str(folder), torch.float32, "cpu", scores=scores)
    return folder / "model.safetensors", lambda: model(input_ids=IDS, use_cache=False).logits


def of_reward_model(folder, _):
    model = tiny_model("qwen3", vocab_size=128)
    lora.add_adapter(model, "reward", 4, 8)
    lora.save_adapter(model, "reward", folder, "some/base", head=torch.ones(1, 32))
    _, head = lora.load_adapter(tiny_model("qwen3", vocab_size=128), folder, "harmless", with_head=True)
    return folder / "adapter_model.safetensors", lambda: head


def of_adapter(folder, _):
    tiny_model("qwen3", vocab_size=128).save_pretrained(folder / "model")
    adapter = folder / "adapter"
    make_adapter(folder / "model", adapter)
    model = load_model(str(folder / "model"), torch.float32, "cpu")
    lora.load_adapter(model, adapter, "policy")
    return adapter / "adapter_model.safetensors", lambda: model(input_ids=IDS, use_cache=False).logits


def of_soft_prompt(folder, _):
    path = folder / "soft.safetensors"
    save_file({"prompt_embeddings": torch.randn(3, 32)}, path)
    vectors, _ = read_soft_prompt(path, 32)
    return path, lambda: vectors


def of_tensors(folder, _):
    path = folder / "some.safetensors"
    save_file({"a": torch.randn(40, 50)}, path)
    tensors = load_file(path)
    return path, lambda: tensors["a"]


KINDS = {
    "model": (of_model, False),
    "reward model": (of_model, True),
    "head of a reward adapter": (of_reward_model, None),
    "adapter": (of_adapter, None),
    "soft prompt": (of_soft_prompt, None),
    "tensors": (of_tensors, None),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_overwritten_after_it_was_read_changes_nothing(tmp_path, kind):
    make, scores = KINDS[kind]
    path, values = make(tmp_path, scores)
    before = values().clone()
    spoil(path)
    (name, *_) = load_file(path)
    assert load_file(path)[name].unique().tolist() == [pytest.approx(0.18578, abs=1e-5)]  # other numbers by now
    assert torch.equal(values(), before)
    if os.path.exists("/proc/self/maps"):  # nor can one that is cut off end the process
        with open("/proc/self/maps") as maps:
            assert str(path) not in maps.read()


@pytest.fixture
def somebody_else(tmp_path, monkeypatch):
    """From a call on, this process may read what all may read; tmp_path is the current folder."""
    monkeypatch.chdir(tmp_path)  # what is above it is not asked for then
    tmp_path.chmod(0o755)
    user = os.geteuid()

    def become():
        if user == 0:  # who may read everything
            os.seteuid(65534)

    yield become
    os.seteuid(user)


def test_weights_that_only_their_owner_may_read_are_not_called_missing(tmp_path, somebody_else):
    """safetensors writes them so."""
    path, _ = of_adapter(tmp_path, None)
    model = tiny_model("qwen3", vocab_size=128)
    for file in (path, tmp_path / "model/model.safetensors"):
        file.chmod(0)
    somebody_else()
    with pytest.raises(lora.AdapterError, match=r"^adapter cannot be read as an adapter \(.*Permission denied"):
        lora.load_adapter(model, "adapter", "policy")
    with pytest.raises(ModelError, match=r"^no model at model \(.*Permission denied: 'model/model.safetensors'\)"):
        load_model("model", torch.float32, "cpu")


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_tied_weights_stay_tied_and_all_numbers_what_they_are(tmp_path, name):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), torch.float32, "cpu")
    assert all(tensor.untyped_storage().resizable() for tensor in (*loaded.parameters(), *loaded.buffers()))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    ids = IDS % 60
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_base_that_is_overwritten_under_a_run_trains_the_same_adapter(world, tmp_path, monkeypatch):
    plain = dpo_run(world, tmp_path / "plain")
    model = shutil.copytree(world / "model", tmp_path / "model")
    step = torch.optim.AdamW.step

    def spoiling(*given, **named):
        spoil(model / "model.safetensors")
        return step(*given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    dpo_run(world, tmp_path / "run", model=model)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(plain.folder)
