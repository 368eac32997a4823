"""Removing heads and feed-forward units equals silencing them, in every transformer that the view knows."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from neurarium.compress import (
    GPT,
    NM,
    Layout,
    SelfAttention,
    TransformerBlocks,
    apply,
    calibrate,
    explicit,
    finalise,
    magnitude,
    per_sample_grads,
    plan_magnitude,
    sparsegpt,
    wanda,
)
from neurarium.compress.gpt import GPTBlock
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import parameters

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def hugging_face(name: str) -> nn.Module:
    t = pytest.importorskip("transformers")
    make: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
        "llama-bias": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**LLAMA, head_dim=8)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**LLAMA)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**LLAMA, head_dim=6)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**LLAMA, head_dim=10)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2)
        ),
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=2)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL, intermediate_size=48)),
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4)
        ),
    }
    torch.manual_seed(0)
    return noisy(make[name]())


def noisy(model: nn.Module) -> nn.Module:
    """Weights large enough that every unit matters, biases not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def torch_encoder(**options: object) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, **options)  # type: ignore[arg-type]
    return noisy(nn.TransformerEncoder(layer, 2))


def our_gpt() -> nn.Module:
    torch.manual_seed(0)
    return noisy(GPT(50, width=32, heads=4, layers=2, hidden=48, context=40))


CAUSAL = ["llama", "llama-bias", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt"]
FAMILIES: dict[str, Callable[[], nn.Module]] = {name: (lambda name=name: hugging_face(name)) for name in (*CAUSAL, "bert", "vit")}
FAMILIES |= {"torch": torch_encoder, "torch-norm-first": lambda: torch_encoder(norm_first=True, activation="gelu"), "gpt": our_gpt}


def logits(name: str, model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if name.startswith("torch"):
        x = torch.randn(3, 7, 32, generator=generator)
    elif name == "vit":
        x = torch.randn(3, 3, 8, 8, generator=generator)
    else:
        x = torch.randint(3, 50, (3, 7), generator=generator)
    with torch.no_grad():
        y = model(x)
    return getattr(y, "logits", y)


def some(blocks: TransformerBlocks, even: bool) -> dict[str, Tensor]:
    """Keeps half of the heads and two thirds of the units: the same number in all blocks, or not."""
    generator, kept = torch.Generator().manual_seed(3), {}
    for i, (key, n) in enumerate(blocks.sizes().items()):
        keep = (n // 2 if key.endswith("heads") else 2 * n // 3) + (0 if even else (i // 2) % 2)
        kept[key] = torch.randperm(n, generator=generator)[:keep]
    return kept


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("even", [True, False])
def test_removing_equals_zeroing(name: str, even: bool) -> None:
    model = FAMILIES[name]()
    before = copy.deepcopy(model.state_dict())
    blocks = TransformerBlocks.of(model)
    assert len(blocks) == 2
    assert not blocks.skipped
    kept = some(blocks, even)
    silent, small = blocks.zero(kept), blocks.remove(kept)
    dense, expected, found = (logits(name, m) for m in (model, silent, small))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (dense - expected).abs().max() > 0.05, "the removed units do nothing: the test shows nothing"
    sizes = TransformerBlocks.of(small).sizes()
    assert sizes == {k: len(v) for k, v in kept.items()}
    gone = sum((n - sizes[k]) * blocks.unit_parameters()[k] for k, n in blocks.sizes().items())
    assert parameters(model) - parameters(small) == gone > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    torch.testing.assert_close(logits(name, blocks.remove({})), dense)
    # a stored state dict fits the shapes that `resized` makes, and the whole module pickles
    again = TransformerBlocks.of(FAMILIES[name]()).resized(sizes)
    again.load_state_dict(small.state_dict())
    assert torch.equal(logits(name, again), found)
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    assert torch.equal(logits(name, torch.load(buffer, weights_only=False)), found)
    # it trains on, and can be made smaller again
    loss = small.train()(**{"input_ids": torch.arange(3, 8)[None]}).logits.sum() if name in CAUSAL else None
    if loss is not None:
        loss.backward()
        assert all(p.grad is not None for b in TransformerBlocks.of(small) for p in b.module.parameters())
    smaller = TransformerBlocks.of(small).remove({k: [0] for k in sizes})
    assert set(TransformerBlocks.of(smaller).sizes().values()) == {1}


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("even", [True, False])
def test_generation_with_its_cache_goes_on(name: str, even: bool) -> None:
    model = FAMILIES[name]()
    blocks = TransformerBlocks.of(model)
    small = blocks.remove(some(blocks, even))
    prompt = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, plain = (small.generate(prompt, attention_mask=prompt > 0, use_cache=c, **options) for c in (True, False))
    assert cached.shape == (1, 9)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_saving_as_hugging_face_does(name: str, tmp_path) -> None:
    """Where the config can say the sizes, from_pretrained needs nothing else; otherwise `resized` helps."""
    model = FAMILIES[name]()
    blocks = TransformerBlocks.of(model)
    kept = some(blocks, even=True)
    if name in ("gpt2", "opt"):  # their config ties heads * head_dim to the width
        kept = {k: v for k, v in kept.items() if k.endswith("ffn")}
    small = blocks.remove(kept)
    small.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(name, back), logits(name, small))


def test_our_gpt_generates_and_is_causal() -> None:
    model = our_gpt()
    blocks = TransformerBlocks.of(model)
    small = blocks.remove(some(blocks, even=False))
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    assert small.generate(ids, 40).shape == (2, 49)
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 50
    assert torch.equal(model(ids)[:, :5], model(changed)[:, :5])
    assert parameters(GPT(65)) == 3 * 111_840 + (65 + 64) * 96 + 192  # the head is tied
    drawn = [model.generate(ids, 5, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*drawn)
    with pytest.raises(BadInput, match="context of 40"):
        model(torch.zeros(1, 41, dtype=torch.long))


def test_our_gpt_has_second_derivatives_and_per_sample_gradients() -> None:
    model, ids = our_gpt().double(), torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    name = "blocks.0.attention.k.weight"

    def loss(weight: Tensor, ids: Tensor = ids) -> Tensor:
        out = torch.func.functional_call(model, {name: weight}, (ids,))
        return nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    weight = model.get_parameter(name).detach()
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        variable = weight.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(variable), variable, create_graph=True)
        (product,) = torch.autograd.grad(first, variable, step)
        rows = per_sample_grads(
            model, ids, ids, lambda out, y: nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), y[:, 1:].flatten()), names=[name]
        )
    plus, minus = (torch.func.grad(loss)(weight + sign * 1e-6 * step) for sign in (1, -1))
    torch.testing.assert_close(product, (plus - minus) / 2e-6, rtol=1e-4, atol=1e-6)
    for i in range(3):
        torch.testing.assert_close(rows[i].view_as(weight), torch.func.grad(loss)(weight, ids[i : i + 1]).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt", "torch", "gpt2"])
def test_the_smaller_model_exports(name: str) -> None:
    model = FAMILIES[name]()
    small = TransformerBlocks.of(model).remove({next(k for k in TransformerBlocks.of(model).sizes()): [0, 2]})
    x = torch.randn(2, 5, 32) if name == "torch" else torch.randint(3, 50, (2, 5))
    program = torch.export.export(small, (x,), {"use_cache": False} if name == "gpt2" else {}, strict=False)
    found, expected = program.module()(x, **({"use_cache": False} if name == "gpt2" else {})), small(x)
    torch.testing.assert_close(getattr(found, "logits", found), getattr(expected, "logits", expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_torch_attention(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first)
    ours = SelfAttention.of(theirs)
    x = torch.randn(3, 5, 16) if batch_first else torch.randn(5, 3, 16)
    causal, padding = torch.ones(5, 5).triu(1).bool(), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    for masks in ({}, {"attn_mask": causal}, {"key_padding_mask": padding}, {"attn_mask": causal, "key_padding_mask": padding},
                  {"attn_mask": torch.randn(12, 5, 5)}):  # fmt: skip
        expected, _ = theirs(x, x, x, need_weights=False, **masks)
        torch.testing.assert_close(ours(x, x, x, **masks)[0], expected)
    torch.testing.assert_close(ours(x[0])[0], theirs(x[0], x[0], x[0])[0])
    ours.causal = True
    torch.testing.assert_close(ours(x)[0], theirs(x, x, x, attn_mask=causal)[0])
    torch.testing.assert_close(ours(x, key_padding_mask=padding)[0], theirs(x, x, x, attn_mask=causal, key_padding_mask=padding)[0])
    with torch.no_grad():  # the fused kernel
        torch.testing.assert_close(ours(x)[0], theirs(x, x, x, attn_mask=causal)[0])
    with pytest.raises(BadInput, match="one input"):
        ours(x, x + 1, x)
    with pytest.raises(BadInput, match="batch \\* heads"):
        ours(x, attn_mask=torch.zeros(4, 5, 5))


def test_a_smaller_torch_encoder_takes_padded_batches_in_eval_mode() -> None:
    model = torch_encoder()
    blocks = TransformerBlocks.of(model)
    kept = {"layers.1.heads": [0, 3]}  # the first layer keeps torch's attention and its fused path
    x, padding = torch.randn(3, 6, 32), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        small, silent = (m(x, src_key_padding_mask=padding) for m in (blocks.remove(kept), blocks.zero(kept)))
    torch.testing.assert_close(small[~padding], silent[~padding], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "torch", "bert"])
def test_explicit_is_the_same_function_of_linear_layers(name: str) -> None:
    model = FAMILIES[name]()
    opened = explicit(model)
    torch.testing.assert_close(logits(name, opened), logits(name, model), rtol=1e-5, atol=1e-5)
    x = torch.randn(3, 7, 32) if name == "torch" else torch.randint(3, 50, (3, 7))
    blocks = TransformerBlocks.of(opened)
    stats = calibrate(opened, [x])
    for block in blocks:
        assert {v.name for v in (*block.qkv, block.out, *block.up, block.down)} <= set(stats)
    pruned = magnitude(opened, sparsity=0.5)
    with pytest.raises(UnsupportedModel, match="finalise"):
        TransformerBlocks.of(pruned)
    kept = some(blocks, even=False)
    expected = TransformerBlocks.of(model).zero(kept)
    torch.testing.assert_close(logits(name, blocks.remove(kept)), logits(name, expected), rtol=1e-5, atol=1e-5)
    for method in (wanda, sparsegpt):
        small = method(opened, [x], pattern=NM(2, 4), sequential=False)
        assert NM(2, 4).holds(TransformerBlocks.of(finalise(small)).blocks[0].down.weight != 0)
    plan = plan_magnitude(opened, sparsity=0.0, scope="layer")
    torch.testing.assert_close(logits(name, apply(opened, plan)), logits(name, opened))


def test_views_read_and_write_what_is_stored() -> None:
    for name in ("llama", "gpt2", "torch", "gpt"):
        model = FAMILIES[name]()
        before = logits(name, model)
        block = TransformerBlocks.of(model).blocks[1]
        captured = []
        handle = block.down.module.register_forward_pre_hook(lambda m, args, c=captured: c.append(args[0]))
        torch.backends.mha.set_fastpath_enabled(False)
        logits(name, model)
        torch.backends.mha.set_fastpath_enabled(True)
        handle.remove()
        y = captured[0] @ block.down.weight.T + (0 if block.down.bias is None else block.down.bias)
        torch.testing.assert_close(y, block.down.module(captured[0]).detach(), rtol=1e-4, atol=1e-5)
        assert [v.weight.shape for v in block.qkv] == [(32, 32), *[(16 if name == "llama" else 32, 32)] * 2]
        shift = torch.zeros(32)
        shift[3] = 1.0
        block.down.add_bias(shift)
        block.out.add_bias(shift)
        assert (logits(name, model) - before).abs().max() > 1e-3
        assert block.down.bias[3] != 0


class Mine(nn.Module):
    """A user's own block, with the fused projection of a single matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.per_head, self.heads = 4, 3
        self.mix, self.back, self.wide, self.narrow = nn.Linear(8, 36), nn.Linear(12, 8), nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, self.per_head)).transpose(1, 2) for t in self.mix(x).chunk(3, -1))
        x = x + self.back(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(torch.sigmoid(self.wide(x)))  # sigmoid(0) is not 0: units must be cut where they are read


def test_a_layout_describes_your_own_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Mine(), Mine())
    with pytest.raises(UnsupportedModel, match="Sequential: has no transformer block among GPT2Block"):
        TransformerBlocks.of(model)
    layout = Layout(Mine, ("mix",), "back", ("wide",), "narrow", "per_head", {"heads": "heads"})
    blocks = TransformerBlocks.of(model, [layout])
    kept, x = {"0.heads": [2], "0.ffn": [1, 5, 7], "1.heads": [0, 2]}, torch.randn(2, 5, 8)
    torch.testing.assert_close(blocks.remove(kept)(x), blocks.zero(kept)(x))
    with pytest.raises(UnsupportedModel, match="0: a Mine without bakc"):
        TransformerBlocks.of(model, [Layout(Mine, ("mix",), "bakc", ("wide",), "narrow", "per_head")])
    with pytest.raises(UnsupportedModel, match="0: sizes do not fit"):
        TransformerBlocks.of(model, [Layout(Mine, ("mix",), "back", ("mix",), "narrow", "per_head")])


def test_what_cannot_be_done_is_named() -> None:
    blocks = TransformerBlocks.of(our_gpt())
    with pytest.raises(BadInput, match=r"blocks\.0\.heads: would lose all of its 4 units"):
        blocks.remove({"blocks.0.heads": []})
    with pytest.raises(BadInput, match=r"unknown unit group 'blocks\.7\.heads'"):
        blocks.remove({"blocks.7.heads": [0]})
    for bad in ([4], [-1], [1, 1]):
        with pytest.raises(BadInput, match="kept indices"):
            blocks.zero({"blocks.0.heads": bad})
    tied = our_gpt()
    tied.blocks[1].up.weight = tied.blocks[0].up.weight
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.up: its weight is shared with blocks\.1\.up"):
        TransformerBlocks.of(tied)
    with pytest.raises(UnsupportedModel, match="TransformerDecoderLayer"):
        TransformerBlocks.of(nn.TransformerDecoderLayer(8, 2, 8))
    both = nn.Transformer(8, 2, 1, 1, 8)
    assert "decoder.layers.0" in TransformerBlocks.of(both).skipped
    with pytest.raises(UnsupportedModel, match="add_bias_kv"):
        SelfAttention.of(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    assert isinstance(our_gpt().blocks[0], GPTBlock)
