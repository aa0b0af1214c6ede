"""What every replacement of `nn.Linear` promises, over all that the package holds."""

import copy
import importlib.util
import pickle

import pytest
import torch
from torch import Tensor, nn

import optimzoo
from optimzoo.core.hyper import hyper
from optimzoo.modules import Replacement, convert, kinds, merge, unmerge

OPTIONS = {"spectral": {"rank": 3}, "sparse_delta": {"density": 0.1}}  # of kinds without usable defaults here
KINDS = [pytest.param(kind, OPTIONS.get(name, {}), id=name) for name, kind in kinds().items()]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Tied(nn.Module):
    """Two blocks, a free head under another name, and a layer that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.output = nn.Linear(12, 5)
        self.lm_head = nn.Linear(12, 7)
        self.same = nn.Linear(12, 30, bias=False)
        self.same.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return torch.cat([self.output(h), self.lm_head(h), self.same(h)], -1)


@pytest.fixture
def model() -> Tied:
    return Tied().double()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 30, (3, 16))


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


INNER = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_convert_keeps_the_function_and_the_mode(kind, options, model, ids):
    model.blocks[0].eval()
    before, rng = model(ids), torch.get_rng_state()
    assert convert(model, kind, **options) == INNER
    assert torch.equal(torch.get_rng_state(), rng), "a global generator was used"
    torch.testing.assert_close(model(ids), before, rtol=1e-9, atol=1e-12)
    assert model(ids).dtype == torch.float64
    assert all(isinstance(model.get_submodule(name), kind) for name in INNER)
    assert [model.get_submodule(name).training for name in INNER] == [False, False, True, True]
    assert all(not t.is_floating_point() or t.dtype == torch.float64 for t in model.state_dict().values())


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_merge_gives_plain_layers_that_compute_the_same(kind, options, model, ids):
    keys = list(model.state_dict())
    convert(model, kind, **options)
    disturb(model)
    after = model(ids)
    assert merge(model) == INNER
    torch.testing.assert_close(model(ids), after, rtol=1e-9, atol=1e-12)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in INNER)
    assert list(model.state_dict()) == keys
    assert merge(model) == []


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_unmerge_is_bit_exact_and_only_after_keep(kind, options, model, ids):
    convert(model, kind, **options)
    disturb(model)
    before, output = copy.deepcopy(model.state_dict()), model.eval()(ids)
    merge(model, keep=True)
    assert all("." not in key.removeprefix(f"{name}.") for name in INNER for key in model.state_dict() if name in key)
    assert unmerge(model) == INNER
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(ids), output)
    merge(model)
    with pytest.raises(ValueError, match=r"keep=True"):
        unmerge(model)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_state_copies_and_gradients_travel(kind, options, model, ids):
    twin = copy.deepcopy(model)
    convert(model, kind, **options)
    convert(twin, kind, **options)
    disturb(model)
    twin.load_state_dict(model.state_dict())
    for other in (twin, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(ids), model.eval()(ids))
    model.train()(ids).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_what_cannot_be_converted_is_passed_over_or_refused_by_name(kind, options, model):
    with pytest.raises(ValueError, match=r"'same' cannot become .*shared with another module"):
        convert(model, kind, match="same", **options)
    with pytest.raises(ValueError, match=r"'embed' cannot become .*it is a Embedding"):
        convert(model, kind, match="embed", **options)
    with pytest.raises(ValueError, match=r"finds no layer.*blocks\.0\.down"):
        convert(model, kind, match="blocks.0.dwon", **options)
    with pytest.raises(ValueError, match=r"'same' is passed over: its weight is shared"):
        convert(model, kind, match="sam*", **options)
    assert convert(model, kind, match=["lm_head"], **options) == ["lm_head"], "naming a free head in full is a wish"
    assert convert(model, kind, match="blocks.*", exclude="*.up", **options) == INNER[1::2]
    assert convert(model, kind, **options) == INNER[::2]
    with pytest.raises(ValueError, match=r"'blocks\.0\.up' is passed over: it is a .* already; merge\(model\) first"):
        convert(model, kind, match="blocks.*", **options)
    with pytest.raises(ValueError, match=r"'blocks\.0\.up' cannot become .* already; merge\(model\) first"):
        convert(model, kind, match="blocks.0.up", **options)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_unknown_options_name_the_nearest(kind, options, model):
    known = next(iter(kind.options))
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no option '{known}x'; did you mean '{known}'\?"):
        convert(model, kind, **options, **{known + "x": 1})
    assert type(model.blocks[0].up) is nn.Linear, "nothing may change before the options are checked"


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_bound_is_enforced_by_name(kind, options, model):
    for name, option in kind.options.items():
        for bound, step in ((option.ge, -1), (option.gt, 0), (option.le, 1), (option.lt, 0)):
            if bound is not None:
                with pytest.raises(ValueError, match=rf"{name}=.* must be"):
                    convert(model, kind, **{name: bound + step})
        if option.one_of:
            with pytest.raises(ValueError, match=rf"{name}='no such' is not known; it must be one of"):
                convert(model, kind, **{name: "no such"})
        assert option.doc, f"{name} has no meaning"


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_single_layers_and_hooks_are_refused(kind, options, model):
    with pytest.raises(ValueError, match="pass its parent module"):
        convert(nn.Linear(4, 4), kind, **options)
    with pytest.raises(ValueError, match="call its to_linear"):
        merge(kind.from_linear(nn.Linear(8, 8), **next(iter(kind.prepare({"x": nn.Linear(8, 8)}, **options).values()))))
    handle = model.blocks[1].up.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'blocks\.1\.up' has hooks"):
        convert(model, kind, **options)
    handle.remove()
    convert(model, kind, **options)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_subclasses_whose_weight_is_read_elsewhere_stay(kind, options):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert convert(model, kind, **options) == ["linear1", "linear2"]
    with pytest.raises(ValueError, match=r"only a plain nn\.Linear"):
        convert(model, kind, match="self_attn.out_proj", **options)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_merged_model_is_read_by_from_pretrained(kind, options, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    assert len(convert(model, kind, **options)) == 7, "all but the head"
    disturb(model)
    merge(model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 16, (2, 9))
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_what_is_no_layer_and_what_is_no_model_is_refused(model):
    for kind in ("spectral", nn.Linear, optimzoo.SST):
        with pytest.raises(TypeError, match=r"such as optimzoo.SpectralLinear: give such a class"):
            convert(model, kind)
    with pytest.raises(TypeError, match="it takes no list"):
        convert(convert(model, optimzoo.SpectralLinear, rank=2), optimzoo.SpectralLinear, rank=2)


def test_an_optimizer_of_layers_that_were_replaced_since_refuses_to_step(model, ids):
    def step(opt):
        opt.zero_grad()
        model(ids).square().mean().backward()
        opt.step()

    early = optimzoo.AdamW(model)
    convert(model, optimzoo.SampledLinear, match="*.down")  # which keeps the weights
    step(early)
    convert(model, optimzoo.SpectralLinear, match="*.up", rank=2)
    with pytest.raises(RuntimeError, match=r"'blocks.0.up.weight' is in the model no more.*make the optimizer after"):
        step(early)
    late = optimzoo.AdamW(model)
    step(late)
    merge(model, keep=True)
    with pytest.raises(RuntimeError, match=r"in the model no more"):
        step(late)
    unmerge(model)
    step(late)


def test_kinds_are_found_by_reading_the_folder():
    assert kinds()["sampled"].__name__ == "SampledLinear"
    assert all(issubclass(kind, Replacement) and kind is not Replacement for kind in kinds().values())


def test_options_check_type_and_bounds():
    with pytest.raises(TypeError, match="must be an integer"):
        hyper(4, ge=1).check("Kind", "rank", 2.5)
    with pytest.raises(TypeError, match="must be a number"):
        hyper(0.5, ge=0).check("Kind", "ratio", True)
    with pytest.raises(ValueError, match="ratio=nan is out of range; it must be > 0 and <= 1"):
        hyper(0.3, gt=0, le=1).check("Kind", "ratio", float("nan"))
    assert hyper(None, gt=0).check("Kind", "density", None) is None
