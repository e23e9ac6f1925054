from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from router.blending.statistics import fisher_information, gram_matrices

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def model(base_folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig.from_pretrained(base_folder)).eval()


def test_gram_matrices_are_mean_outer_products_of_the_inputs_without_padding(model: LlamaForCausalLM) -> None:
    tokens = torch.randint(1, 60, (3, 7))
    lengths = [7, 4, 2]
    attention = torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])
    batches = [{"input_ids": tokens[:2], "attention_mask": attention[:2], "labels": tokens[:2]}]
    batches.append({"input_ids": tokens[2:], "attention_mask": attention[2:]})
    found = gram_matrices(model, batches, [Q, DOWN])
    rows = []
    for row, length in zip(tokens, lengths, strict=True):  # one at a time, no padding
        with torch.no_grad():
            hidden = model.model.embed_tokens(row[None, :length])
            rows.append(model.model.layers[0].input_layernorm(hidden)[0])
    x = torch.cat(rows)
    torch.testing.assert_close(found[Q], x.mT @ x / len(x), rtol=1e-4, atol=1e-5)
    assert found[DOWN].shape == (48, 48)
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks


def test_fisher_information_is_the_mean_squared_gradient(model: LlamaForCausalLM) -> None:
    samples = []
    for k in range(3):
        tokens = torch.randint(1, 60, (1, 5 + k))
        labels = tokens.clone()
        labels[:, :3] = -100
        samples.append({"input_ids": tokens, "labels": labels})
    found = fisher_information(model, samples, [Q, DOWN])
    for name in (Q, DOWN):
        weight = model.get_submodule(name).weight
        expected = torch.zeros_like(weight)
        for sample in samples:
            logits = model(sample["input_ids"]).logits[0, :-1].log_softmax(-1)
            answer = sample["labels"][0, 1:]
            kept = answer != -100
            likelihood = logits[kept].gather(1, answer[kept][:, None]).sum()
            expected += torch.autograd.grad(likelihood, weight)[0].square() / len(samples)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)


def test_weights_may_be_frozen_and_the_expert_loaded(model: LlamaForCausalLM, adapters: list[Path]) -> None:
    adapted = PeftModel.from_pretrained(model, str(adapters[0]))
    names = [f"base_model.model.{Q}"]
    tokens = torch.randint(1, 60, (1, 6))
    sample = {"input_ids": tokens, "labels": tokens}
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    assert float(fisher_information(adapted, [sample], names)[names[0]].sum()) > 0
    assert gram_matrices(adapted, [sample], names)[names[0]].shape == (32, 32)


def test_what_cannot_be_measured_is_refused(model: LlamaForCausalLM) -> None:
    tokens = torch.randint(1, 60, (2, 6))
    with pytest.raises(ValueError, match=r"no linear layer 'model\.norm'"):
        gram_matrices(model, [], ["model.norm"])
    with pytest.raises(ValueError, match="no samples"):
        gram_matrices(model, [], [Q])
    with pytest.raises(ValueError, match="no samples"):
        fisher_information(model, [], [Q])
    with pytest.raises(ValueError, match="one sample with labels"):
        fisher_information(model, [{"input_ids": tokens, "labels": tokens}], [Q])
    with pytest.raises(ValueError, match="no answer"):
        fisher_information(model, [{"input_ids": tokens[:1], "labels": torch.full((1, 6), -100)}], [Q])
