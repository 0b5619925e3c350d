import copy

import pytest
import torch
from fastft_kernels import FusedAdam, adam
from fastft_kernels.adam import AdamSchedule
from fastft_kernels.adam_plan import StateLayout
from fastft_kernels.device import interpret_on_cpu
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity

LAYOUTS: tuple[StateLayout, ...] = ("fp32", "bf16", "8bit")
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks per tensor and several tiles per chunk, on tiny tensors."""
    for layout in LAYOUTS:
        monkeypatch.setitem(adam.SCHEDULES, layout, AdamSchedule(chunk=1024, block=512, warps=4))


def make_params(device, dtype=torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(3)
    shapes = [(3, 5), (1,), (0,), (1100,), (2, 1024), (7, 33)]
    return [nn.Parameter(torch.randn(s).to(device, dtype)) for s in shapes]


def set_grads(params, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        g = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        p.grad = g * scale


def groups(params) -> list[dict]:
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-3, "weight_decay": 0.0}]


def clones(params) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("decoupled", [True, False])
def test_follows_torch(decoupled, device):
    ours, theirs = make_params(device), make_params(device)
    fused = FusedAdam(groups(ours), **OPTIONS, decoupled=decoupled)
    plain = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups(theirs), **OPTIONS)
    for step in range(4):
        for group in (*fused.param_groups, *plain.param_groups):
            group["lr"] *= 0.9
        for params, optimizer in ((ours, fused), (theirs, plain)):
            set_grads(params, step)
            params[3].grad = None if step == 1 else params[3].grad
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        assert float(fused.state[a]["step"]) == float(plain.state[b]["step"])


@pytest.mark.parametrize("interpreted", [True, False])
def test_without_betas_nothing_is_left_of_a_moment(interpreted, device):
    """Gradients whose squares are lost beside those of a step before."""
    interpret_on_cpu(interpreted and device.type == "cpu")
    ours, theirs = (nn.Parameter(torch.ones(700, device=device)) for _ in range(2))
    settings = {"lr": 1e-3, "betas": (0.0, 0.0)}
    pair = FusedAdam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for g in (1.0, 1e-4, 3e-4):
        for p, optimizer in zip((ours, theirs), pair, strict=True):
            p.grad = torch.full_like(p, g)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_and_cpu_reference_agree(layout, dtype, device):
    ours, theirs = make_params(device, dtype), make_params(torch.device("cpu"), dtype)
    fused = FusedAdam(groups(ours), **OPTIONS, state_layout=layout, monitor=True)
    plain = FusedAdam(groups(theirs), **OPTIONS, state_layout=layout, monitor=True)
    for step in range(3):
        divisor = torch.tensor(4.0)
        set_grads(ours, step, 4.0)
        set_grads(theirs, step, 4.0)
        fused.step(grad_divisor=divisor.to(device))
        interpret_on_cpu(False)
        plain.step(grad_divisor=divisor)
        interpret_on_cpu(device.type == "cpu")
    # A last-bit difference may round a moment to the neighbouring code, and seldom does. Stored in
    # bf16, parameters differ by a last place per step: the interpreter truncates that cast.
    mean_limit = {"fp32": 1e-6, "bf16": 2e-4, "8bit": 2e-3}[layout]
    mean_limit += 0 if dtype == torch.float32 else 3 * 2.0**-8
    for a, b in zip(ours, theirs, strict=True):
        difference = (a.detach().cpu().float() - b.detach().float()).abs()
        if len(a):
            assert difference.max().item() <= 0.05
            assert difference.mean().item() <= mean_limit
    for a, b in zip(fused.statistics(), plain.statistics(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-2, atol=1e-3)
    # The bits of both are drawn alike, at every step anew.
    if layout != "fp32" and dtype == torch.float32:
        for name in ("exp_avg", "exp_avg_sq"):
            alike = [
                fused.state[a][name].cpu() == plain.state[b][name]
                for a, b in zip(ours, theirs, strict=True)
            ]
            assert torch.cat([same.flatten() for same in alike]).float().mean() > 0.99


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skip_changes_nothing_and_nan_stays_out(layout, device):
    params = make_params(device)
    optimizer = FusedAdam(params, **OPTIONS, state_layout=layout)
    set_grads(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step(skip=torch.ones((), device=device))
    for a, b in zip(params, before, strict=True):
        assert torch.equal(a, b)
    after = optimizer.state_dict()["state"]
    for key, entry in state.items():
        for name, value in entry.items():
            assert torch.equal(value, after[key][name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_exact(layout, device):
    params = make_params(device)
    optimizer = FusedAdam(params, **OPTIONS, state_layout=layout, seed=5)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    others = clones(params)
    resumed = FusedAdam(others, **OPTIONS, state_layout=layout, seed=5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for both, opt in ((params, optimizer), (others, resumed)):
        set_grads(both, 2)
        opt.step()
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


def test_state_dict_goes_to_torch_and_back(device):
    params = make_params(device)
    optimizer = FusedAdam(groups(params), **OPTIONS)
    set_grads(params, 0)
    optimizer.step()
    theirs = clones(params)
    plain = torch.optim.AdamW(groups(theirs), **OPTIONS)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    back = clones(params)
    again = FusedAdam(groups(back), **OPTIONS)
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    for some, opt in ((params, optimizer), (theirs, plain), (back, again)):
        set_grads(some, 1)
        opt.step()
    for a, b, c in zip(params, theirs, back, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        assert torch.equal(a, c)


def test_odd_memory_late_and_frozen_tensors(device):
    torch.manual_seed(0)
    base = torch.randn(6, 40, device=device)
    ours = [
        nn.Parameter(base.clone()[:, ::2]),
        nn.Parameter(base.clone().T),
        nn.Parameter(base.clone().flatten()[1:].detach()),
        nn.Parameter(base.clone(), requires_grad=False),
        nn.Parameter(torch.randn(130, device=device).to(torch.bfloat16)),
    ]
    theirs = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in ours]
    fused, plain = FusedAdam(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    late = [nn.Parameter(torch.ones(5, device=device)) for _ in range(2)]
    for step in range(3):
        if step == 1:
            fused.add_param_group({"params": [late[0]]})
            plain.add_param_group({"params": [late[1]]})
        for params, optimizer in (([*ours, late[0]], fused), ([*theirs, late[1]], plain)):
            set_grads([p for p in params if p.requires_grad], step)
            optimizer.step()
    assert ours[0].stride() == (40, 2)
    assert torch.equal(ours[3], base)
    for a, b in zip([*ours[:4], late[0]], [*theirs[:4], late[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[4], theirs[4], rtol=2e-2, atol=2e-2)


def test_what_changes_between_steps(device):
    """Memory that moved, a first gradient, other settings: each is seen at the next step."""
    ours, theirs = make_params(device), make_params(device)
    pairs = (ours, FusedAdam(ours, **OPTIONS)), (theirs, torch.optim.AdamW(theirs, **OPTIONS))
    for step in range(6):
        for params, optimizer in pairs:
            set_grads(params, step)
            if step < 2:
                params[3].grad = None
            if step == 3:
                params[4].data = params[4].data.clone()
            if step == 4:
                optimizer.param_groups[0] |= {"weight_decay": 0.5, "betas": (0.5, 0.9), "eps": 0.1}
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_bytes_of_state_per_parameter(device):
    for layout, wanted in zip(LAYOUTS, (8.0, 4.0, 2 + 2 / 128), strict=True):
        p = nn.Parameter(torch.randn(64, 128, device=device))
        optimizer = FusedAdam([p], **OPTIONS, state_layout=layout)
        set_grads([p], 0)
        optimizer.step()
        sizes = [t.nbytes for name, t in optimizer.state[p].items() if name != "step"]
        assert sum(sizes) / p.numel() == wanted


def test_hooks_and_profilers_see_every_step_once(device):
    p = nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    optimizer, seen = FusedAdam([p], lr=1.0), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    handle.remove()
    assert seen == ["before", "after"]
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as recorded:
        FusedAdam([p]).step()
    counts = {event.key: event.count for event in recorded.key_averages()}
    assert counts["Optimizer.step#FusedAdam.step"] == 1


def test_refusals(device):
    p = nn.Parameter(torch.ones(3, device=device))
    with pytest.raises(ValueError, match="state_layout"):
        FusedAdam([p], state_layout="4bit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr must be a float"):
        FusedAdam([p], lr=torch.tensor(1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        FusedAdam([nn.Parameter(torch.ones(3, dtype=torch.float64))])
    for name in ("lr", "eps", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name} must be 0 or more; got -1"):
            FusedAdam([{"params": [p], name: -1.0}])
    optimizer = FusedAdam([p])
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 1
    p.grad = torch.ones_like(p)
    longer = nn.Parameter(torch.ones(4, device=device))
    for plain, target, message in (
        (torch.optim.AdamW([p], amsgrad=True), p, "amsgrad is not supported"),
        (torch.optim.AdamW([p], maximize=True), p, "maximize is not supported"),
        (torch.optim.SGD([p], momentum=0.9), p, "must hold step, exp_avg and exp_avg_sq"),
        (torch.optim.AdamW([p]), longer, r"its parameter's shape, \(4,\); got \(3,\)"),
    ):
        plain.step()
        with pytest.raises(ValueError, match=message):
            FusedAdam([target]).load_state_dict(plain.state_dict())
    sparse = nn.Parameter(torch.ones(3, 2, device=device))
    sparse.grad = torch.eye(3, 2, device=device).to_sparse()
    with pytest.raises(ValueError, match="gradients must be dense"):
        FusedAdam([sparse]).step()


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize(("layout", "tolerance"), [("bf16", 1e-3), ("8bit", 2e-2)])
def test_moments_are_rounded_without_bias(layout, tolerance, interpreted, device):
    """Rounded down or to the nearest, both moments would be off by more, and some stand still."""
    interpret_on_cpu(interpreted and device.type == "cpu")
    p = nn.Parameter(torch.zeros(64, 128, device=device))
    optimizer = FusedAdam([p], betas=(0.9, 0.999), state_layout=layout)
    # Beside a large one, moments below what an exponent per 128 can tell from zero.
    gradient = torch.full_like(p, 1.1)
    gradient[32:] = 2.0**-17
    gradient[32:, 0] = 1.1
    for _ in range(12):
        p.grad = gradient
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    shares = {"exp_avg": 1 - 0.9**12, "exp_avg_sq": 1 - 0.999**12}
    for (name, share), power in zip(shares.items(), (1, 2), strict=True):
        mean = state[name][:32].float().mean().item()
        assert mean == pytest.approx(share * 1.1**power, rel=tolerance), name
    mean = state["exp_avg"][32:, 1:].float().mean().item()
    assert mean == pytest.approx(
        shares["exp_avg"] * 2.0**-17, rel=0.3 if layout == "8bit" else 0.01
    )
