"""Which parameter is what, in models as people have them."""

import pytest
import torch
from torch import nn

from optimzoo import SWAN, AdamW, param_groups
from optimzoo.functional.names import clean_name

transformers = pytest.importorskip("transformers")


def rules(model: nn.Module) -> dict[str, str]:
    return {name: rule for name, _, rule, _, _ in SWAN(model).routes()}


def test_llama():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    found = rules(transformers.LlamaForCausalLM(config))
    matrices = {name for name, rule in found.items() if rule == "swan"}
    assert matrices == {name for name in found if "_proj" in name}


def test_bert_as_long_as_it_is_wide():
    """As many positions as hidden units are no reason to take a layer for a head."""
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    found = rules(transformers.BertForMaskedLM(config))
    assert found["bert.encoder.layer.0.attention.self.query.weight"] == "swan"
    assert found["bert.encoder.layer.0.output.dense.weight"] == "swan"
    assert found["bert.embeddings.position_embeddings.weight"] == "adamw"
    assert found["bert.embeddings.word_embeddings.weight"] == "adamw"


def test_heads_are_known_by_the_names_of_their_modules():
    layers = {name: nn.Linear(16, 10) for name in ("body", "head", "score", "classifier", "headroom", "underscore")}
    model = nn.Module()
    model.inner = nn.ModuleDict(layers)
    names = {f"inner.{name}.weight" for name in ("body", "headroom", "underscore")}
    for params in (model, model.named_parameters()):
        assert {name for name, _, rule, _, _ in SWAN(params).routes() if rule == "swan"} == names
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=5
    )
    assert rules(transformers.LlamaForSequenceClassification(config))["score.weight"] == "adamw"


def test_wrappers_are_whole_parts_of_a_name():
    assert clean_name("module._orig_mod.layers.0._fsdp_wrapped_module.weight") == "layers.0.weight"
    assert clean_name("vision_module.submodule.module.weight") == "vision_module.submodule.weight"


def test_gpt2_is_seen_as_out_by_in():
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    groups = {group["name"]: group for group in param_groups(model)}
    assert groups["transposed matrices"]["layout"] == "transposed"
    assert len(groups["transposed matrices"]["params"]) == 4
    names = [name for name, _ in groups["embeddings and heads"]["params"]]
    assert names == ["transformer.wte.weight", "transformer.wpe.weight"], "a tied head appears once"
    opt, p = SWAN(model, weight_decay=0.0), model.transformer.h[0].attn.c_attn.weight
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    p.grad[:, 3] = 1.0  # one output's gradient is constant over its inputs: no signal
    opt.step()
    assert torch.equal(p[:, 3], before[:, 3])
    assert not torch.equal(p[:, 2], before[:, 2])


def test_experts_and_routers_go_to_adamw():
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    for name, rule in rules(transformers.MixtralForCausalLM(config)).items():
        hidden = "self_attn" in name and name.endswith("weight")
        assert rule == ("swan" if hidden else "adamw"), name


def test_convolutions_are_flattened_and_transposed_ones_left_alone():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ConvTranspose2d(16, 8, 3), nn.BatchNorm2d(8))
    everything = {f"{i}.{part}" for i in (0, 1, 2) for part in ("weight", "bias")}
    assert rules(model) == dict.fromkeys(everything, "adamw") | {"0.weight": "swan"}


def test_names_decide_where_there_is_no_module():
    model = nn.ModuleDict({"wte": nn.Embedding(40, 16), "up": nn.Linear(16, 16), "lm_head": nn.Linear(16, 40)})
    found = {name: rule for name, _, rule, _, _ in SWAN(model.named_parameters()).routes()}
    assert [name for name, rule in found.items() if rule == "swan"] == ["up.weight"]


def test_groups_suit_torch_and_vectors_are_not_decayed():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16), nn.LayerNorm(16))
    torch.optim.SGD(param_groups(model), lr=0.1)
    decays = {group["name"]: group["weight_decay"] for group in AdamW(model, weight_decay=0.3).param_groups}
    assert decays == {"matrices": 0.3, "embeddings and heads": 0.3, "vectors": 0.0}
