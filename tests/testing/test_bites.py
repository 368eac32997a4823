"""The suite must bite: for each role a sound method passes every check, and deliberately broken twins are caught by the check named."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.roles import Evaluation, History, Outcome, Report, Study
from neurarium.testing import Example, check_method
from neurarium.testing.suite import CHECKS, run_check

# ---------------------------------------------------------------- layer and model


class Good(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * self.scale


class MutatesInput(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(1.5))


class MovesRNG(Good):
    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        return super().forward(x)


class Remembers(Good):
    """Carries a tensor from call to call."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) + getattr(self, "last", 0.0)
        self.last = out.detach().mean()
        return out


class DropsState(Good):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.randn(6)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.hidden.to(x)


class MixesRows(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class WrongAtBatchOne(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(0)


class FixedDtype(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class DeadParameter(Good):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * self.scale.detach()


class MutedParameter(Good):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * (self.scale.detach() + 0 * self.scale)


class Unpicklable(Good):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class DataDependent(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() > -1e9 else x


def module_example(cls: type[nn.Module], seeds: bool = True) -> Example:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return cls()

    return Example("layer", make=make if seeds else _unseeded(cls), inputs=lambda n, seed: (torch.randn(n, 6),))


def _unseeded(cls: type[nn.Module]) -> object:
    generator = torch.Generator()

    def make(seed: int) -> nn.Module:
        module = cls()
        with torch.no_grad():
            module.scale.copy_(torch.randn(6, generator=generator))
        return module

    return make


def test_a_sound_layer_passes_everything() -> None:
    ran = check_method(module_example(Good))
    assert set(ran) >= set(CHECKS["layer"]) - {"cuda"}


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (MutatesInput, "stateless_calls"),
        (MovesRNG, "stateless_calls"),
        (Remembers, "stateless_calls"),
        (DropsState, "state_dict"),
        (MixesRows, "batch_size"),
        (WrongAtBatchOne, "batch_size"),
        (FixedDtype, "dtypes"),
        (DeadParameter, "gradients"),
        (MutedParameter, "gradients"),
        (Unpicklable, "copies"),
        (DataDependent, "export"),
    ],
)
def test_broken_layers_are_caught(cls: type[nn.Module], check: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 - some are caught by torch's own error
        run_check(module_example(cls), check)
    with pytest.raises(AssertionError, match=check):
        check_method(module_example(cls))


def test_a_layer_that_ignores_its_seed_is_caught() -> None:
    with pytest.raises(AssertionError, match="seed is ignored"):
        run_check(module_example(Good, seeds=False), "deterministic")


# ---------------------------------------------------------------- optimizer


class SGD(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def update(self, p, group):
        state = self.state[p]
        m = state.setdefault("m", torch.zeros_like(p))
        m.mul_(group["momentum"]).add_(p.grad)
        p.sub_(m, alpha=group["lr"])


class DropsMomentum(SGD):
    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class IgnoresGroups(SGD):
    def update(self, p, group):
        super().update(p, self.param_groups[-1])


class NoneIsZero(SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p) if p.grad is None else p.grad
        return super().step(closure)


class Noisy(SGD):
    def update(self, p, group):
        p.grad = p.grad + 1e-3 * torch.randn_like(p)
        super().update(p, group)


class ScalesGradients(SGD):
    def update(self, p, group):
        p.grad.mul_(0.5)
        super().update(p, group)


class Ascends(SGD):
    def update(self, p, group):
        p.add_(p.grad, alpha=group["lr"])


class DividesByNorm(SGD):
    def update(self, p, group):
        p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


class ForgetsClosure(SGD):
    def step(self, closure=None):
        super().step()


class Float32Only(SGD):
    def update(self, p, group):
        p.data = (p.float() - group["lr"] * p.grad.float()).data


def test_a_sound_optimizer_passes_everything() -> None:
    assert set(check_method(Example("optimizer", make=SGD))) >= set(CHECKS["optimizer"]) - {"cuda"}


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (DropsMomentum, "resumes"),
        (IgnoresGroups, "groups"),
        (NoneIsZero, "missing_gradients"),
        (DividesByNorm, "missing_gradients"),
        (Noisy, "leaves_the_rest_alone"),
        (ScalesGradients, "leaves_the_rest_alone"),
        (Ascends, "descends"),
        (ForgetsClosure, "closure"),
        (Float32Only, "dtypes"),
    ],
)
def test_broken_optimizers_are_caught(cls: type[SGD], check: str) -> None:
    with pytest.raises(Exception):  # noqa: B017
        run_check(Example("optimizer", make=cls), check)


# ---------------------------------------------------------------- learner


@dataclass
class GoodLearner:
    """Plain SGD with a seeded order of batches; refuses recurrent modules."""

    def setup(self, model: nn.Module, seed: int, resume: dict | None) -> dict:
        return dict(resume) if resume else {"epoch": 0, "steps": 0, "losses": []}

    def batches(self, loader, seed: int, epoch: int) -> list:
        loaded = list(loader)
        order = torch.randperm(len(loaded), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        return [loaded[i] for i in order]

    def fit(self, model, loader, *, epochs, seed=0, resume=None, **options) -> History:
        for name, module in model.named_modules():
            if isinstance(module, nn.RNNBase):
                raise UnsupportedModel("recurrent modules cannot be trained by this rule", module=name)
        state = self.setup(model, seed, resume)
        for epoch in range(state["epoch"], epochs):
            total, n = 0.0, 0
            for x, y in self.batches(loader, seed, epoch):
                if not torch.isfinite(x).all():
                    raise BadInput(f"step {state['steps']}: the batch has values that are not finite")
                loss = self.update(model, x, y)
                total, n = total + loss, n + 1
                state["steps"] += 1
            if n == 0:
                raise BadInput("the loader is empty")
            state["losses"] = [*state["losses"], {"loss": total / n}]
            state["epoch"] = epoch + 1
        return History(train=tuple(state["losses"]), steps=state["steps"], state=state)

    def update(self, model, x, y) -> float:
        loss = nn.functional.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        return loss.item()


class LearnsCopy(GoodLearner):
    def fit(self, model, *args, **options):
        return super().fit(copy.deepcopy(model), *args, **options)


class SeedBlind(GoodLearner):
    def batches(self, loader, seed, epoch):
        loaded = list(loader)
        return [loaded[i] for i in torch.randperm(len(loaded))]


class ReseedsGlobally(GoodLearner):
    def fit(self, *args, **options):
        torch.manual_seed(options.get("seed", 0))
        return super().fit(*args, **options)


class ForgetsEpoch(GoodLearner):
    def fit(self, model, loader, *, epochs, seed=0, resume=None, **options):
        history = super().fit(model, loader, epochs=epochs, seed=seed, resume=resume)
        return History(history.train, steps=history.steps, state={**history.state, "epoch": 0})


class NormalisesInPlace(GoodLearner):
    def update(self, model, x, y):
        return super().update(model, x.mul_(0.5), y)


class NeedsTwoRows(GoodLearner):
    def update(self, model, x, y):
        return super().update(model, (x - x.mean(0)) / x.std(0), y)


class SwallowsNaN(GoodLearner):
    def update(self, model, x, y):
        return super().update(model, torch.nan_to_num(x), y)

    def fit(self, model, loader, **options):
        return super().fit(model, [(torch.nan_to_num(x), y) for x, y in loader], **options)


class SkipsSilently(GoodLearner):
    def fit(self, model, loader, **options):
        linear = nn.Sequential(*[m for m in model.modules() if isinstance(m, nn.Linear)][-1:])
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            model[1].weight.data += 0.1
            return History(({"loss": 0.0},), steps=1, state={"x": linear})
        return super().fit(model, loader, **options)


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def recurrent() -> nn.Module:
    return nn.Sequential(nn.LSTM(5, 3), nn.LayerNorm(3))


def learner_example(cls: type) -> Example:
    def loader(seed: int) -> list:
        g = torch.Generator().manual_seed(seed)
        return [(torch.randn(4, 5, generator=g), torch.randint(0, 3, (4,), generator=g)) for _ in range(4)]

    return Example("learner", make=cls, model=mlp, loader=loader, unsupported=recurrent)


def test_a_sound_learner_passes_everything() -> None:
    assert set(check_method(learner_example(GoodLearner))) == set(CHECKS["learner"])


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (LearnsCopy, "trains_in_place"),
        (SeedBlind, "same_seed_same_result"),
        (SeedBlind, "keeps_the_global_state"),
        (ReseedsGlobally, "keeps_the_global_state"),
        (ForgetsEpoch, "resumes"),
        (NormalisesInPlace, "leaves_data_alone"),
        (NeedsTwoRows, "batch_of_one"),
        (SwallowsNaN, "refuses_bad_input"),
        (SkipsSilently, "refuses_unsupported"),
    ],
)
def test_broken_learners_are_caught(cls: type, check: str) -> None:
    with pytest.raises(AssertionError):
        run_check(learner_example(cls), check)


# ---------------------------------------------------------------- transform


def halve(model: nn.Module) -> nn.Module:
    """Sets the smaller half of every weight to zero."""
    result = copy.deepcopy(model)
    linears = [m for m in result.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise UnsupportedModel("there is no Linear layer to prune", module="")
    with torch.no_grad():
        for m in linears:
            m.weight *= m.weight.abs() > m.weight.abs().median()
    return result


def in_place(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    return copy.deepcopy(model)


def shallow(model: nn.Module) -> nn.Module:
    return nn.Sequential(*model)


def evals_input(model: nn.Module) -> nn.Module:
    model.eval()
    return halve(model)


def leaves_hook(model: nn.Module) -> nn.Module:
    result = halve(model)
    model[0].register_forward_hook(_nothing)
    return result


def _nothing(*args: object) -> None:
    return None


def random_mask(model: nn.Module) -> nn.Module:
    result = halve(model)
    with torch.no_grad():
        result[0].weight *= torch.rand_like(result[0].weight) > 0.5
    return result


def freezes(model: nn.Module) -> nn.Module:
    return halve(model).requires_grad_(False)


class Hooked(nn.Module):
    """Keeps its function in an attribute that a state_dict does not carry."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.function = [inner]
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](x) * self.scale


def hides_weights(model: nn.Module) -> nn.Module:
    return Hooked(halve(model))


def takes_anything(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def transform_example(f: object) -> Example:
    nothing = nn.Sequential(nn.ReLU())
    return Example("transform", apply=f, model=mlp, inputs=lambda n, seed: (torch.randn(n, 5),), unsupported=lambda: nothing)


def test_a_sound_transform_passes_everything() -> None:
    assert set(check_method(transform_example(halve))) == set(CHECKS["transform"])


@pytest.mark.parametrize(
    ("f", "check"),
    [
        (in_place, "input_untouched"),
        (evals_input, "input_untouched"),
        (leaves_hook, "input_untouched"),
        (random_mask, "input_untouched"),
        (random_mask, "deterministic"),
        (shallow, "shares_no_memory"),
        (freezes, "trains_on"),
        (hides_weights, "saves_and_copies"),
        (takes_anything, "refuses_unsupported"),
    ],
)
def test_broken_transforms_are_caught(f: object, check: str) -> None:
    with pytest.raises(AssertionError):
        run_check(transform_example(f), check)


# ---------------------------------------------------------------- policy


class TwoExits(nn.Module):
    """Leaves at the first head if it is sure enough. full/early costs are those of the Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.rest = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.register_buffer("tau", torch.tensor(0.4))

    early, late = 2 * (36 + 18), 2 * (36 + 18 + 18)
    full_cost = late

    def leaves(self, y: Tensor, budget: float | None) -> Tensor:
        if budget is not None and budget < self.early:
            raise BadInput(f"budget {budget:g} is below the cheapest path: {self.early} FLOPs")
        sure = y.softmax(-1).amax(-1)
        return torch.ones_like(sure, dtype=torch.bool) if budget is not None and budget < self.late else sure >= self.tau

    def forward(self, x: Tensor) -> Tensor:
        return self.decide(x).output

    def decide(self, x: Tensor, *, budget: float | None = None, threshold: float | None = None) -> Outcome:
        h = torch.relu(self.first(x))
        y = self.head(h)
        out = self.leaves(y, budget)
        y = y.clone()
        if not out.all():
            y[~out] = self.rest(h[~out])
        return Outcome(y, self.price(out), (~out).long())

    def price(self, out: Tensor) -> Tensor:
        return torch.where(out, self.early, self.late)


class MasksOnly(TwoExits):
    """Runs everything for every row and charges as if it had not."""

    def decide(self, x, *, budget=None, threshold=None):
        h = torch.relu(self.first(x))
        y, last = self.head(h), self.rest(h)
        out = self.leaves(y, budget)
        return Outcome(torch.where(out[:, None], y, last), self.price(out), (~out).long())


class Undercharges(TwoExits):
    def price(self, out):
        return torch.where(out, self.early - 36, self.late - 36)


class ByBatch(TwoExits):
    """Leaves where a row is surer than the others: its result depends on them."""

    def leaves(self, y, budget):
        sure = y.softmax(-1).amax(-1)
        return super().leaves(y, budget) if budget is not None else sure > sure.mean()


class Backwards(TwoExits):
    def leaves(self, y, budget):
        if budget is not None and budget < self.early:
            raise BadInput("too little")
        sure = y.softmax(-1).amax(-1)
        return torch.full_like(sure, budget >= self.late, dtype=torch.bool) if budget is not None else sure >= self.tau


class TakesAnyBudget(TwoExits):
    def leaves(self, y, budget):
        return super().leaves(y, None if budget is None else max(budget, self.early))


class HiddenThreshold(TwoExits):
    def __init__(self) -> None:
        super().__init__()
        self.secret = 0.3 + 0.4 * torch.rand(()).item()

    def leaves(self, y, budget):
        return super().leaves(y, budget) if budget is not None else y.softmax(-1).amax(-1) >= self.secret


class RandomExit(TwoExits):
    def leaves(self, y, budget):
        return super().leaves(y, budget) if budget is not None else torch.rand(len(y)) > 0.5


class OtherForward(TwoExits):
    def forward(self, x):
        return self.rest(torch.relu(self.first(x)))


def policy_example(cls: type) -> Example:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return cls()

    return Example("policy", make=make, inputs=lambda n, seed: (torch.randn(n, 6),))


def test_a_sound_policy_passes_everything() -> None:
    assert set(check_method(policy_example(TwoExits))) >= set(CHECKS["policy"]) - {"cuda", "stops_early", "picks_a_configuration"}


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (MasksOnly, "cost_is_true"),
        (Undercharges, "cost_is_true"),
        (ByBatch, "rows_are_independent"),
        (Backwards, "budgets_are_monotone"),
        (TakesAnyBudget, "budgets_are_monotone"),
        (HiddenThreshold, "keeps_state"),
        (RandomExit, "deterministic"),
        (OtherForward, "forward_is_decide"),
    ],
)
def test_broken_policies_are_caught(cls: type, check: str) -> None:
    with pytest.raises(AssertionError):
        run_check(policy_example(cls), check)


# ---------------------------------------------------------------- searcher


class RandomSearch:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.told: list[Evaluation] = []

    def __getstate__(self):
        return {"told": self.told, "rng": self.generator.get_state()}

    def __setstate__(self, state):
        self.told, self.generator = state["told"], torch.Generator()
        self.generator.set_state(state["rng"])

    def ask(self):
        return {"x": torch.rand((), generator=self.generator).item()}

    def tell(self, config, value):
        self.told.append(Evaluation(config, value))

    def search(self, space, objective, budget):
        for _ in range(budget):
            config = self.ask()
            self.tell(config, objective(config))
        return Study(tuple(self.told))


class GlobalRandom(RandomSearch):
    def ask(self):
        return {"x": torch.rand(()).item()}


class LosesGenerator(RandomSearch):
    def __setstate__(self, state):
        super().__setstate__(state)
        self.generator = torch.Generator().manual_seed(0)


class LosesBest(RandomSearch):
    def search(self, space, objective, budget):
        super().search(space, objective, budget)
        return Study(())


def searcher_example(cls: type) -> Example:
    return Example("searcher", make=cls, search=lambda s: s.search(None, lambda c: (c["x"] - 0.5) ** 2, 10))


def test_a_sound_searcher_passes_everything() -> None:
    assert set(check_method(searcher_example(RandomSearch))) == set(CHECKS["searcher"])


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (GlobalRandom, "reproducible"),
        (GlobalRandom, "keeps_the_global_state"),
        (LosesGenerator, "resumes"),
        (LosesBest, "keeps_the_best"),
    ],
)
def test_broken_searchers_are_caught(cls: type, check: str) -> None:
    with pytest.raises(AssertionError):
        run_check(searcher_example(cls), check)


# ---------------------------------------------------------------- probe


@dataclass(frozen=True)
class Bound(Report):
    bound: Tensor


def lipschitz(model: nn.Module, x: Tensor) -> Bound:
    """The product of spectral norms bounds the gradient norm of an MLP with 1-Lipschitz activations."""
    if not len(x) or not torch.isfinite(x).all():
        raise BadInput("the input is empty or not finite")
    norms = [torch.linalg.matrix_norm(m.weight.detach(), 2) for m in model.modules() if isinstance(m, nn.Linear)]
    return Bound(torch.stack(norms).prod())


def leaves_eval(model: nn.Module, x: Tensor) -> Bound:
    model.eval()
    return lipschitz(model, x)


def leaves_grad(model: nn.Module, x: Tensor) -> Bound:
    model(x).sum().backward()
    return lipschitz(model, x)


def leaves_probe_hook(model: nn.Module, x: Tensor) -> Bound:
    model[0].register_forward_hook(_nothing)
    return lipschitz(model, x)


def samples_globally(model: nn.Module, x: Tensor) -> Bound:
    return Bound(lipschitz(model, x).bound + 1e-3 * torch.rand(()))


def returns_dict(model: nn.Module, x: Tensor) -> dict:
    return lipschitz(model, x).to_dict()


def keeps_graph(model: nn.Module, x: Tensor) -> Bound:
    lipschitz(model, x)
    return Bound(model[0].weight.norm())


def unsound(model: nn.Module, x: Tensor) -> Bound:
    return Bound(0.01 * lipschitz(model, x).bound)


def accepts_nan(model: nn.Module, x: Tensor) -> Bound:
    return lipschitz(model, torch.zeros(1))


def bound_holds(model: nn.Module, report: Bound, seed: int) -> bool:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(seed))
    slopes = torch.func.vmap(torch.func.jacrev(lambda row: model(row)))(x)
    return bool((torch.linalg.matrix_norm(slopes, 2) <= report.bound + 1e-5).all())


def probe_example(f: object) -> Example:
    return Example("probe", apply=f, model=mlp, inputs=lambda n, seed: (torch.randn(n, 5),), sound=bound_holds)


def test_a_sound_probe_passes_everything() -> None:
    assert set(check_method(probe_example(lipschitz))) == set(CHECKS["probe"])


@pytest.mark.parametrize(
    ("f", "check"),
    [
        (leaves_eval, "reads_only"),
        (leaves_grad, "reads_only"),
        (leaves_probe_hook, "reads_only"),
        (samples_globally, "reads_only"),
        (samples_globally, "deterministic"),
        (returns_dict, "returns_a_report"),
        (keeps_graph, "returns_a_report"),
        (unsound, "sound"),
        (accepts_nan, "refuses_bad_input"),
    ],
)
def test_broken_probes_are_caught(f: object, check: str) -> None:
    with pytest.raises(AssertionError):
        run_check(probe_example(f), check)


# ---------------------------------------------------------------- solver


@dataclass
class Root:
    """x with x^2 = 2, by Newton from a seeded start."""

    x: float
    said: float = field(default=0.0)

    def residual(self) -> float:
        return self.said


def newton(seed: int, *, steps: int = 8, lie: float | None = None, globally: bool = False) -> Root:
    g = None if globally else torch.Generator().manual_seed(seed)
    x = 1.0 + torch.rand((), generator=g, dtype=torch.float64).item()
    for _ in range(steps):
        x -= (x * x - 2) / (2 * x)
    return Root(x, abs(x * x - 2) if lie is None else lie)


def solver_example(**options: object) -> Example:
    return Example("solver", solve=lambda seed: newton(seed, **options), residual=lambda s: abs(s.x**2 - 2))


def test_a_sound_solver_passes_everything() -> None:
    assert set(check_method(solver_example())) >= set(CHECKS["solver"]) - {"evaluates_anywhere"}


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ({"steps": 1, "lie": 0.0}, "residual_is_true"),
        ({"lie": float("nan")}, "reports_its_residual"),
        ({"steps": 1, "globally": True}, "deterministic"),
        ({"globally": True}, "keeps_the_global_state"),
    ],
)
def test_broken_solvers_are_caught(options: dict, check: str) -> None:
    with pytest.raises(AssertionError):
        run_check(solver_example(**options), check)


# ---------------------------------------------------------------- dataset


class Points(torch.utils.data.Dataset):
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generator(self, i: int) -> torch.Generator | None:
        return torch.Generator().manual_seed(1000 * self.seed + i)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not 0 <= i < 10:
            raise IndexError(i)
        return torch.randn(3, generator=self.generator(i)), i


class SeedlessPoints(Points):
    def generator(self, i):
        return torch.Generator().manual_seed(i)


class GlobalPoints(Points):
    def generator(self, i):
        return None


class OrderPoints(Points):
    def __init__(self, seed):
        super().__init__(seed)
        self.shared = torch.Generator().manual_seed(seed)

    def generator(self, i):
        return self.shared

    def __reduce__(self):
        return OrderPoints, (self.seed,)


class EndlessPoints(Points):
    def __getitem__(self, i):
        return torch.randn(3, generator=self.generator(i)), i


def test_a_sound_dataset_passes_everything() -> None:
    assert set(check_method(Example("dataset", make=Points))) == set(CHECKS["dataset"])


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (SeedlessPoints, "seeded_items"),
        (GlobalPoints, "seeded_items"),
        (GlobalPoints, "keeps_the_global_state"),
        (OrderPoints, "seeded_items"),
        (EndlessPoints, "shapes"),
    ],
)
def test_broken_datasets_are_caught(cls: type, check: str) -> None:
    with pytest.raises(AssertionError):
        run_check(Example("dataset", make=cls), check)


# ---------------------------------------------------------------- the suite itself


def test_an_example_says_what_it_lacks() -> None:
    with pytest.raises(BadInput, match="needs model, loader"):
        Example("learner", make=GoodLearner)
    with pytest.raises(BadInput, match="none of"):
        Example("gadget", make=SGD)
    with pytest.raises(BadInput, match="reason"):
        Example("optimizer", make=SGD, skip={"closure": " "})
    with pytest.raises(BadInput, match="no check"):
        check_method(Example("optimizer", make=SGD, skip={"nonsense": "because"}))


def test_a_declared_skip_is_honoured_and_nothing_else() -> None:
    ran = check_method(Example("optimizer", make=ForgetsClosure, skip={"closure": "takes no closure"}))
    assert "closure" not in ran and "resumes" in ran
