"""Sorted fine-tuning: its loss, its sub-models, and generation with a cache."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.backbones import VisionTransformerS
from neurarium.dynamic.decoder import Decoder
from neurarium.dynamic.gates import Patience
from neurarium.dynamic.parts import take_apart
from neurarium.dynamic.sorted_llm import SortedFineTuning
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing import exits as checks
from neurarium.testing.examples.dynamic.decoders import sorted_llama

V = 11


def widened(model: nn.Module) -> nn.Module:
    """Larger weights, so that rows differ."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


def small(layers: int = 4) -> Decoder:
    torch.manual_seed(0)
    return widened(Decoder(V, width=16, heads=2, layers=layers, context=24))


def hugging(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    wide = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 24}
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=24, **sizes))
    elif kind == "opt":
        config = transformers.OPTConfig(ffn_dim=24, word_embed_proj_dim=8, **wide, **(sizes | {"pad_token_id": 1}))
        model = transformers.OPTForCausalLM(config)
    else:
        attention = kind.removeprefix("llama-")
        config = transformers.LlamaConfig(intermediate_size=24, num_key_value_heads=2, attn_implementation=attention, **wide, **sizes)
        model = transformers.LlamaForCausalLM(config)
    return widened(model)


ids = torch.randint(V, (5, 6), generator=torch.Generator().manual_seed(1))
MODELS = ["decoder", "llama-sdpa", "llama-eager", "gpt2", "opt"]
NEW = 5


def made(kind: str) -> nn.Module:
    return small() if kind == "decoder" else hugging(kind)


@torch.no_grad()
def recomputed(model: nn.Module, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy generation without any cache."""
    parts = take_apart(model)
    for _ in range(new):
        tokens = torch.cat([tokens, parts.logits(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


def test_with_all_depths_it_is_the_mean_of_the_prefixes_losses():
    model = small()
    y = torch.randint(V, ids.shape, generator=torch.Generator().manual_seed(2))
    y[:, :3] = -100  # the prompt is not part of the response
    want = []
    for depth in (1, 3, 4):
        h = model.embed(ids)
        for layer in model.layers[:depth]:
            h = layer(h)
        logits = model.head(model.norm(h))[:, 3:]
        want.append(F.cross_entropy(logits.flatten(0, 1), y[:, 3:].flatten()))
    torch.testing.assert_close(SortedFineTuning(model, (1, 3, 4)).loss(ids, y), torch.stack(want).mean())


def test_with_the_last_depth_alone_it_is_ordinary_fine_tuning_step_for_step():
    ordinary, model = small(), small()
    policy = SortedFineTuning(model, (4,))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (ordinary, policy)]
    for step in range(3):
        x, y = ids.roll(step, 1), ids.roll(step - 1, 1)
        losses = F.cross_entropy(ordinary(x).flatten(0, 1), y.flatten()), policy.loss(x, y, step)
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ordinary.parameters(), model.parameters(), strict=True))


def test_it_adds_no_parameters_unless_heads_are_separate():
    model = small()
    assert sum(p.numel() for p in SortedFineTuning(model, (1, 2, 4)).parameters()) == sum(p.numel() for p in model.parameters())
    own = SortedFineTuning(model, (1, 2, 4), shared_head=False)
    extra = sum(p.numel() for m in (model.norm, model.head) for p in m.parameters())
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in model.parameters()) + 2 * extra
    shared = SortedFineTuning(model, (1, 2, 4))
    for a, b in zip(own.outputs(ids), shared.outputs(ids)):  # they begin as copies
        torch.testing.assert_close(a, b)


def test_a_few_depths_at_a_time_cover_all_and_are_right_on_average():
    policy = SortedFineTuning(small(), (1, 2, 3, 4), accumulate=2)
    drawn = [policy.sampled(step) for step in range(200)]
    assert {k for d in drawn for k in d} == {0, 1, 2, 3} and all(len(d) == 2 for d in drawn)
    with torch.no_grad():
        few = torch.stack([policy.loss(ids, ids, step) for step in range(200)]).mean()
        policy.accumulate = None
        assert few.item() == pytest.approx(policy.loss(ids, ids).item(), rel=0.02)


@pytest.mark.parametrize("kind", MODELS)
def test_generation_agrees_with_recomputing_everything(kind):
    model = made(kind)
    policy = SortedFineTuning(model, (1, 2, 4)).eval()
    whole = policy.generate(ids, max_new_tokens=NEW, threshold=2.0)  # nothing is that sure: the whole model
    assert torch.equal(whole.tokens, recomputed(model, ids, NEW)) and (whole.depth == 4).all()
    assert torch.equal(policy.generate(ids, max_new_tokens=NEW, depth=4).tokens, whole.tokens)
    assert torch.equal(policy.generate(ids, max_new_tokens=NEW, depth=2).tokens, recomputed(policy.extract(2).eval(), ids, NEW))


@pytest.mark.parametrize("kind", ["decoder", "llama-eager", "opt"])
def test_generation_costs_what_it_says(kind):
    policy = SortedFineTuning(made(kind), (1, 2, 4)).eval()
    sure = policy.generate(ids, max_new_tokens=NEW, threshold=2.0)
    scores = policy.outputs(ids)[0].softmax(-1).amax(-1).detach().sort().values
    middle = float(scores[1:3].mean())  # between two rows
    for setting in ({"depth": 2}, {"threshold": middle}, {"threshold": -1.0}):
        policy.generate(ids, max_new_tokens=NEW, **setting)
        with FlopCounterMode(display=False) as counter:
            written = policy.generate(ids, max_new_tokens=NEW, **setting)
        assert counter.get_total_flops() == int(written.cost.sum())
        for row in (0, 3):  # rows of a batch do not influence each other
            alone = policy.generate(ids[row : row + 1], max_new_tokens=NEW, **setting)
            assert torch.equal(alone.tokens[0], written.tokens[row]) and torch.equal(alone.depth[0], written.depth[row])
            assert alone.cost[0] == written.cost[row] <= sure.cost[row]


def test_skipped_layers_get_keys_of_the_hidden_state_that_left():
    """A second token that goes to the end must attend to keys that the first one, which left early, never computed itself."""
    model = small(layers=3)
    policy = SortedFineTuning(model, (1, 3)).eval()
    prompt = ids[:1]
    with torch.no_grad():
        first = recomputed_at(model, prompt, 1)
        past = []
        h = model.embed(prompt)
        for layer in model.layers:
            h, kept = layer.step(h)
            past.append(kept)
        h = model.embed(first, 6)
        h, past[0] = model.layers[0].step(h, past[0])
        gone = h  # the hidden state that left
        second = model.head(model.norm(gone))[:, -1].argmax(-1, keepdim=True)
        for i in (1, 2):
            _, (k, v) = model.layers[i].attention.attend(model.layers[i].attention_norm(gone))
            past[i] = torch.cat([past[i][0], k], 2), torch.cat([past[i][1], v], 2)
        h = model.embed(second, 7)
        for layer, kept in zip(model.layers, past):
            h = layer.step(h, kept)[0]
        third = model.head(model.norm(h))[:, -1].argmax(-1)

        class Now(Patience):  # the first two tokens leave at once, the third one does not
            asked = 0

            def forward(self, k, logits, memory=None):
                self.asked += 1
                return logits.new_full((len(logits),), float(self.asked <= 2)), memory

        policy.generate(prompt, max_new_tokens=3, depth=3)
        policy.gate = Now()
        policy._prices(6, 8)
        policy.gate.asked = 0
        written = policy.generate(prompt, max_new_tokens=3, threshold=0.5)
    assert written.depth.tolist() == [[1, 1, 3]]
    assert written.tokens[0, 6:].tolist() == [int(first), int(second), int(third)]


def recomputed_at(model: Decoder, prompt: torch.Tensor, depth: int) -> torch.Tensor:
    h = model.embed(prompt)
    for layer in model.layers[:depth]:
        h = layer(h)
    return model.head(model.norm(h))[:, -1].argmax(-1, keepdim=True)


def test_decoders_keep_the_contract_with_targets_of_both_shapes():
    policy = sorted_llama().make(0)
    x = torch.randint(11, (20, 7), generator=torch.Generator().manual_seed(5))
    checks.check_loss(policy, x, x.roll(-1, 1))
    checks.check_loss(policy, x, x[:, 0])


def test_a_vision_transformer_is_trained_and_cut_the_same_way():
    torch.manual_seed(0)
    model = VisionTransformerS(image=8, patch=4, width=16, depth=3, heads=2, classes=3)
    policy = SortedFineTuning(model, (1, 2, 3)).eval()
    x, y = torch.randn(24, 1, 8, 8), torch.randint(3, (24,))
    with torch.no_grad():
        torch.testing.assert_close(policy.outputs(x)[-1], model(x))
        torch.testing.assert_close(policy.extract(2)(x), policy.outputs(x)[1])
    policy.calibrate([(x, y)])
    checks.check_policy(policy.use(x, budget=0.6 * policy.costs(x).full), x, y)
    with pytest.raises(UnsupportedModel, match="no language model"):
        policy.generate(ids, max_new_tokens=2)


def test_separate_heads_go_along_when_a_depth_is_cut_out():
    policy = SortedFineTuning(small(), (1, 2, 4), shared_head=False).eval()
    for p in policy.staged.own.parameters():
        nn.init.normal_(p)
    for depth, want in zip((1, 2, 4), policy.outputs(ids)):
        torch.testing.assert_close(policy.extract(depth)(ids)[:, -1], want)
    assert len(policy.staged.model.layers) == 4


def test_a_language_model_that_does_more_than_its_parts_is_refused():
    class Scaled(Decoder):
        def forward(self, ids):
            return 30 * torch.tanh(super().forward(ids) / 30)

    with pytest.raises(UnsupportedModel, match="own logits"):
        SortedFineTuning(widened(Scaled(V, width=16, heads=2, layers=2)), (1, 2))
    for model in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), nn.Sequential()):
        with pytest.raises(UnsupportedModel):
            SortedFineTuning(model, (1,))


@pytest.mark.parametrize(
    "call",
    [
        lambda p: SortedFineTuning(small(), ()),
        lambda p: SortedFineTuning(small(), (2, 1)),
        lambda p: SortedFineTuning(small(), (0, 4)),
        lambda p: SortedFineTuning(small(), (1, 5)),
        lambda p: SortedFineTuning(small(), (1, 4), accumulate=3),
        lambda p: p.decide(ids.float()),
        lambda p: p.decide(ids[:0]),
        lambda p: p.decide(ids + V),
        lambda p: p.decide(ids, budget=1e12),
        lambda p: p.loss(ids, torch.full_like(ids, -100)),
        lambda p: p.loss(ids, ids + V),
        lambda p: p.loss(ids, ids[:, 1:]),
        lambda p: p.loss(ids[:0], ids[:0]),
        lambda p: p.extract(3),
        lambda p: p.generate(ids, max_new_tokens=0),
        lambda p: p.generate(ids, max_new_tokens=4, depth=3),
        lambda p: p.generate(ids, max_new_tokens=4, depth=2, threshold=0.5),
        lambda p: p.generate(ids, max_new_tokens=20, depth=2),
        lambda p: p.generate(ids[:0], max_new_tokens=2, depth=2),
        lambda p: p.generate(ids, max_new_tokens=2, budget=1e12),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(BadInput):
        call(SortedFineTuning(small(), (1, 2, 4)))


def test_sampling_follows_its_generator_and_copies_go_on_alike():
    policy = SortedFineTuning(small(), (1, 2, 4)).eval()
    options = {"max_new_tokens": 6, "threshold": 0.5, "temperature": 1.0}
    want, again = (policy.generate(ids, generator=torch.Generator().manual_seed(3), **options).tokens for _ in range(2))
    assert torch.equal(want, again)
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert torch.equal(twin.generate(ids, generator=torch.Generator().manual_seed(3), **options).tokens, want)
