import pytest
import torch
from fastft_kernels import FusedAdam, GradientNorm, ZClip, gradient_norm, gradient_norms
from torch import nn

SHAPES = ((3, 5), (0,), (1,), (2, 1024), (1100,), (9, 7))
GROUPS = (1, 0, 2, 0, 1, 2)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(gradient_norm, "CHUNK", 1024)
    monkeypatch.setattr(gradient_norm, "BLOCK", 512)


def make_grads(device, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    torch.manual_seed(2)
    return [
        torch.randn(shape, device=device).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(SHAPES)
    ]


def truth(grads, groups):
    squares = torch.stack([g.double().square().sum() for g in grads]).cpu()
    per_group = torch.zeros(3, dtype=torch.float64).index_add(0, torch.tensor(groups), squares)
    return squares.sum().sqrt(), squares.sqrt(), per_group.sqrt()


def test_norms_against_float64(device):
    grads = make_grads(device)
    grads[3] = grads[3].t()
    # With gaps, which no kernel reads over.
    grads[4] = torch.stack([grads[4], 100 * grads[4]], -1)[:, 0]
    scale = torch.tensor(8.0, device=device)
    result = GradientNorm(GROUPS, max_norm=0.5)(grads, scale)
    total, per_tensor, per_group = truth([g.double() / 8 for g in grads], GROUPS)
    for got, want in [
        (result.global_norm, total),
        (result.tensor_norms, per_tensor),
        (result.group_norms, per_group),
        (result.clip_coefficient, 0.5 / (total + 1e-6)),
        (result.grad_divisor, 8 / (0.5 / (total + 1e-6))),
        (result.largest, max(g.double().abs().max() for g in grads if g.numel()) / 8),
    ]:
        torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=1e-6, atol=1e-7)
    assert (float(result.nonfinite), float(result.skip)) == (0.0, 0.0)


def test_same_bits_twice_and_addresses_that_move(device):
    norm = GradientNorm(GROUPS)
    grads = make_grads(device)
    first = norm(grads)
    second = norm([g.clone() for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    third = norm([None, *grads[1:]])
    assert float(third.tensor_norms[0]) == 0.0
    assert float(third.global_norm) < float(first.global_norm)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_counts_what_is_not_finite(bad, device):
    grads = make_grads(device)
    grads[3][1, 1000] = bad
    grads[5][0, 0] = bad
    result = GradientNorm(GROUPS, max_norm=1.0, zclip=ZClip())(grads)
    assert float(result.nonfinite) == 2
    assert float(result.skip) == 1
    assert float(result.clip_coefficient) == 1
    assert float(result.largest) == float("inf")


def test_zclip_matches_its_reference_path(device):
    from fastft_kernels.device import interpret_on_cpu

    ours = GradientNorm(max_norm=5.0, zclip=ZClip(warmup=3))
    plain = GradientNorm(max_norm=5.0, zclip=ZClip(warmup=3))
    for scale in (1.0, 1.1, 0.9, 1.05, 3.0, float("nan"), 1.0, 100.0):
        g = torch.tensor([0.6, 0.8]) * scale
        a = ours([g.to(device)])
        interpret_on_cpu(False)
        b = plain([g])
        interpret_on_cpu(device.type == "cpu")
        torch.testing.assert_close(a.clip_coefficient.cpu(), b.clip_coefficient)
        assert a.clip_coefficient.item() < 1 or scale not in (3.0, 100.0)
        assert ours.state is not None
        assert plain.state is not None
        torch.testing.assert_close(ours.state.cpu(), plain.state)
    assert ours.state.tolist()[2] == 7
    resumed = GradientNorm(max_norm=5.0, zclip=ZClip(warmup=3))
    resumed.load_state_dict(ours.state_dict())
    spike = [torch.tensor([30.0, 40.0], device=device)]
    assert torch.equal(resumed(spike).clip_coefficient, ours(spike).clip_coefficient)


def test_another_tensor_at_the_same_address(device):
    memory = torch.ones(64, device=device)
    norm = GradientNorm()
    assert norm([memory]).global_norm.item() == 8.0
    assert norm([memory[:16]]).global_norm.item() == 4.0
    narrow = memory.view(torch.bfloat16)
    expected = narrow.double().norm().item()
    assert norm([narrow]).global_norm.item() == pytest.approx(expected, rel=1e-6)


def test_clips_and_skips_through_adam(device):
    p = nn.Parameter(torch.ones(70, device=device))
    q = nn.Parameter(torch.ones(70, device=device))
    norm, fused = GradientNorm(max_norm=1.0), FusedAdam([p], lr=0.1, weight_decay=0.0)
    plain = torch.optim.AdamW([q], lr=0.1, weight_decay=0.0)
    for step in range(4):
        torch.manual_seed(step)
        q.grad = torch.randn_like(q)
        p.grad = q.grad * 1024
        if step == 2:
            p.grad[3] = torch.inf
        result = norm([p.grad], torch.tensor(1024.0, device=device))
        fused.step(grad_divisor=result.grad_divisor, skip=result.skip)
        if step != 2:
            nn.utils.clip_grad_norm_([q], 1.0)
            plain.step()
    torch.testing.assert_close(p, q)


def test_function_in_one_graph_and_opcheck(device):
    grads = make_grads(device)
    grads = [g for g in grads if g.numel()]
    groups = [g for g, s in zip(GROUPS, SHAPES, strict=True) if s != (0,)]

    def clipped(*grads):
        result = gradient_norms(grads, groups, max_norm=1.0)
        return result.clip_coefficient * grads[0], result.group_norms

    compiled = torch.compile(clipped, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*grads), clipped(*grads), strict=True):
        torch.testing.assert_close(got, want)
    torch.library.opcheck(torch.ops.fastft.gradient_norms, (grads, groups, 1.0, None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientNorm(max_norm=0.0), "max_norm must be above 0; got 0.0"),
        (lambda: GradientNorm(max_norm=float("nan")), "max_norm must be above 0; got nan"),
        (lambda: GradientNorm([0, -1]), "group_ids must be 0 or more; got -1"),
        (lambda: ZClip(warmup=0), "ZClip: warmup must be 1 or more; got 0"),
        (lambda: ZClip(decay=1.0), r"ZClip: decay must be in \[0, 1\); got 1.0"),
        (lambda: ZClip(z_limit=-1.0), "ZClip: z_limit must be above 0; got -1.0"),
    ],
)
def test_refused_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refused_gradients(device):
    one = torch.ones(2, 2, device=device)
    for odd, name in (
        (one.double(), "float64"),
        (one + 1j, "complex64"),
        (one.to_sparse(), "spar"),
    ):
        with pytest.raises(ValueError, match=f"^GradientNorm: gradients must be dense .*{name}"):
            GradientNorm()([one, odd])
    with pytest.raises(ValueError, match="at least one gradient must exist"):
        GradientNorm()([None])
    with pytest.raises(ValueError, match="got 2 for 1"):
        GradientNorm([0, 0])([one])
