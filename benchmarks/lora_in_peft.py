"""What our LoRA does to a model, and whether plain PEFT then does the same: for benchmarks/architectures.py and tests.

numbers = in_peft(model)    # {"fresh": 0.0, "effect": 3.1, "peft": 0.0, "warnings": [], "merged": 2e-6}
"""

import copy
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one folder up

import lora


@torch.no_grad()
def in_peft(model, target_modules=None, tokens=24):
    """The largest differences of logits on `tokens` tokens, {name: number}, and what PEFT warned of; in eval mode.

    fresh: by an adapter just added; effect: by one with A and B drawn, so that the next two mean something; peft: of
    PEFT with the file of that adapter from ours; merged: of the merged model from the adapted one.
    """
    import peft  # a yardstick: tests and benchmarks alone have it

    base, ours = model, copy.deepcopy(model)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = (7919 * torch.arange(tokens)[None] + 31) % (vocabulary - 3) + 3

    def logits(of):
        return of(input_ids=ids, use_cache=False).logits.float()

    before = logits(base)
    parameters = lora.add_adapter(ours, "policy", r=4, alpha=8, target_modules=target_modules)
    numbers = {"fresh": logits(ours) - before}
    draw = torch.Generator().manual_seed(7)
    for parameter in parameters:
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    adapted = logits(ours)
    numbers["effect"] = adapted - before
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora.save_adapter(ours, "policy", folder, base_model="some/base")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    numbers["peft"] = logits(theirs) - adapted
    lora.merge_adapter(ours, "policy")
    numbers["merged"] = logits(ours) - adapted
    numbers = {name: difference.abs().max().item() for name, difference in numbers.items()}
    return numbers | {"warnings": [str(w.message) for w in caught if w.category is not FutureWarning]}
