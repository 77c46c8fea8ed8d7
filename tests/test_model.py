import math

import pytest
import torch
import torch.nn.functional as F
from helpers import CIFAR, HQ, TINY, assert_same, tiny, wake
from official_keys import official_keys
from torch import nn

from config import load_config
from dataset import with_facts
from model import UNet, at_precision, build_network, group_count, timestep_embedding
from pl_utils import DDPM


@pytest.mark.parametrize(
    ("kwargs", "count", "tensors", "attention_levels"),
    [(CIFAR, 35_746_307, 328, {1}), (HQ, 113_673_219, 450, {4})],
)
def test_layers_of_the_paper(kwargs, count, tensors, attention_levels):
    with torch.device("meta"):
        net = UNet(**kwargs)
    state = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    assert state == official_keys(
        ch=128, multipliers=kwargs["channel_multipliers"], attention_levels=attention_levels
    )
    assert len(state) == tensors
    assert sum(p.numel() for p in net.parameters()) == count
    assert all(m.eps == 1e-6 for m in net.modules() if isinstance(m, nn.GroupNorm))
    assert all(m.num_groups == 32 for m in net.modules() if isinstance(m, nn.GroupNorm))
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {kwargs["dropout"]}


def test_initial_weights():
    net = UNet(**{**TINY, "base_channels": 64})
    silent = 0
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.bias.eq(0).all()
            area = layer.weight[0, 0].numel() if layer.weight.ndim == 4 else 1
            fans = (layer.weight.shape[0] + layer.weight.shape[1]) * area / 2
            scale = 1.0
            if name.endswith(("conv2", "proj_out", "conv_out")):
                scale, silent = 1e-10, silent + 1
            bound = math.sqrt(3 * scale / fans)  # uniform variance scaling, fan average
            assert layer.weight.abs().max() <= bound
            assert layer.weight.abs().max() > 0.97 * bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        if isinstance(layer, nn.GroupNorm):
            assert layer.weight.eq(1).all()
            assert layer.bias.eq(0).all()
    assert silent == 2 + 2 + 2 + 3 + 3 + 2 + 3 + 1 + 1  # blocks, attentions, head


def test_loss_is_one_at_step_0():
    net = UNet(**TINY)
    eps = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = net(eps, torch.randint(1000, (64,)))
    assert out.abs().max() < 1e-3
    torch.testing.assert_close((eps - out).square().mean(), eps.square().mean())


def test_timestep_embedding():
    t = torch.tensor([0, 1, 250, 999])
    e = timestep_embedding(t, 128).double()
    rates = 10_000.0 ** (-torch.arange(64, dtype=torch.float64) / 63)  # 1 ... exactly 1e-4
    assert rates[1] == pytest.approx(0.863988, abs=1e-6)
    assert rates[62] == pytest.approx(1.157423e-4, rel=1e-6)
    torch.testing.assert_close(e[:, :64], (t[:, None] * rates).sin(), atol=2e-4, rtol=0)
    torch.testing.assert_close(e[:, 64:], (t[:, None] * rates).cos(), atol=2e-4, rtol=0)
    assert e[0, :64].eq(0).all()
    assert e[0, 64:].eq(1).all()
    odd = timestep_embedding(t, 129)
    assert odd.shape == (4, 129)
    assert odd[:, -1].eq(0).all()


def literal_forward(net: UNet, x, t):
    """The official layer table of the two-level network, written out, on the network's weights."""
    p = dict(net.named_parameters())

    def norm(name, h):
        b, c, height, width = h.shape
        g = h.reshape(b, 32, c // 32, height, width)
        mean = g.mean((2, 3, 4), keepdim=True)
        var = g.var((2, 3, 4), keepdim=True, unbiased=False)
        h = ((g - mean) / (var + 1e-6).sqrt()).reshape(h.shape)
        return h * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def conv(name, h, **kwargs):
        return F.conv2d(h, p[f"{name}.weight"], p[f"{name}.bias"], **kwargs)

    def dense(name, h):
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def swish(h):
        return h * torch.sigmoid(h)

    def block(name, h):
        r = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", h)), padding=1)
        r = r + dense(f"{name}.temb_proj", swish(temb))[:, :, None, None]
        r = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", r)), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return r + (conv(shortcut, h) if f"{shortcut}.weight" in p else h)

    def attention(name, h):
        n = norm(f"{name}.norm", h)
        q, k, v = (conv(f"{name}.{part}", n).flatten(2) for part in "qkv")
        w = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * h.shape[1] ** -0.5, dim=-1)
        a = torch.einsum("bij,bcj->bci", w, v).reshape(h.shape)
        return h + conv(f"{name}.proj_out", a)

    emb = timestep_embedding(t, net.base_channels).to(x.dtype)
    temb = dense("temb.dense.1", swish(dense("temb.dense.0", emb)))
    h0 = conv("conv_in", x, padding=1)
    h1 = block("down.0.block.0", h0)
    h2 = block("down.0.block.1", h1)
    padded = torch.zeros(*h2.shape[:2], h2.shape[2] + 1, h2.shape[3] + 1, dtype=x.dtype)
    padded[:, :, :-1, :-1] = h2  # zeros at the bottom and the right
    h3 = conv("down.0.downsample.conv", padded, stride=2)
    h4 = attention("down.1.attn.0", block("down.1.block.0", h3))
    h5 = attention("down.1.attn.1", block("down.1.block.1", h4))
    h = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", h5)))
    for i, skip in enumerate([h5, h4, h3]):
        h = attention(f"up.1.attn.{i}", block(f"up.1.block.{i}", torch.cat([h, skip], 1)))
    h = conv("up.1.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    for i, skip in enumerate([h2, h1, h0]):
        h = block(f"up.0.block.{i}", torch.cat([h, skip], 1))
    return conv("conv_out", swish(norm("norm_out", h)), padding=1)


def test_forward_is_the_layer_table():
    net = wake(UNet(**TINY)).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 10, 999])
    with torch.no_grad():
        expected = literal_forward(net, x, t)
        torch.testing.assert_close(net(x, t), expected.float(), rtol=1e-5, atol=1e-6)
        assert expected.std() > 0.1


@pytest.mark.parametrize("multipliers", [[1], [2, 1], [3, 3, 1], [1, 2, 2, 4]])
@pytest.mark.parametrize(("channels", "base"), [(1, 16), (2, 20), (3, 32), (4, 6)])
def test_any_shape(multipliers, channels, base):
    net = UNet(
        image_size=24,
        channels=channels,
        out_channels=channels,
        classes=0,
        null_label=False,
        base_channels=base,
        channel_multipliers=multipliers,
        num_res_blocks=1,
        attention_resolutions=[24 // 2 ** (len(multipliers) - 1)],
        dropout=0.5,
        num_heads=1,
        scale_shift_norm=False,
        time_scale=1.0,
        variant="ddpm",
    )
    x = torch.randn(2, channels, 24, 24)
    out = net(x, torch.tensor([0, 5]))
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(torch.randn(1, channels, 48, 32), torch.tensor([3])).shape[2:] == (48, 32)


def test_group_rule():
    assert [group_count(c) for c in (32, 64, 96, 128, 192)] == [32] * 5
    assert [group_count(c) for c in (4, 8, 10, 16, 20, 24, 48)] == [1, 2, 2, 4, 5, 6, 12]


def test_batch_mates_do_not_meet():
    net = wake(UNet(**TINY)).eval()
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 100, 500, 999])
    with torch.no_grad():
        alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(net(x, t), alone, rtol=1e-4, atol=1e-5)


def test_a_network_without_numbers_takes_those_of_a_file():
    config = load_config("configs/smoke.yml")
    empty = build_network(config, "meta")
    assert all(p.is_meta for p in empty.parameters())
    whole = wake(build_network(config)).eval()
    empty.load_state_dict(whole.state_dict(), assign=True)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 19])
    assert torch.equal(empty.eval()(x, t), whole(x, t))


def test_a_network_is_two_parts_and_one_embedding_does_for_all():
    net = wake(UNet(**TINY)).eval()
    x = torch.randn(3, 3, 8, 8)
    each = net(x, torch.full((3,), 17))
    rows = net.embed(torch.tensor([5, 17]))
    for row in (rows[1], rows[1:]):
        torch.testing.assert_close(net.predict(x, row), each, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net(x, torch.tensor([17])), each, rtol=1e-5, atol=1e-5)
    assert net.features(x, torch.tensor([17])).shape == (3, 64)
    rounded = at_precision(net, "bfloat16")
    error = (rounded(x, torch.tensor([17])) - each).abs().max() / each.abs().max()
    assert 1e-4 < error < 0.1
    assert torch.equal(rounded.embed(torch.tensor([17])), net.embed(torch.tensor([17])))
    assert at_precision(net, "float32") is net


def test_transposed_images_and_kernels_give_a_transposed_prediction():
    config = {**TINY, "image_size": 12, "attention_resolutions": [6], "classes": 5}
    net, turned = (wake(UNet(**config)).double().eval() for _ in "ab")
    for name, layer in turned.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.mT.contiguous()
    x, t = torch.randn(2, 3, 12, 20, dtype=torch.float64), torch.tensor([3, 900])
    labels = torch.eye(5)[[1, 4]]
    with torch.no_grad():
        torch.testing.assert_close(
            net(x, t, labels).mT, turned(x.mT.contiguous(), t, labels), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("null_label", [True, False])
def test_labels_join_the_time_before_its_last_swish(null_label):
    net = wake(UNet(**{**TINY, "classes": 3, "null_label": null_label}))
    t, (one, two, three), silu = torch.tensor([7]), torch.eye(3), nn.functional.silu
    table, (first, second) = net.temb.label.weight, net.temb.dense
    assert table.shape == (3 + null_label, 128)
    temb = second(silu(first(timestep_embedding(t, 32))))
    none = table[3] if null_label else 0
    for labels, row in ((one, table[0]), (two, table[1]), (one + three, table[0] + table[2]),
                        (0 * one, none)):  # fmt: skip
        torch.testing.assert_close(net.embed(t, labels[None]), silu(temb + row))
    assert torch.equal(net.embed(t), net.embed(t, torch.zeros(1, 3)))
    with pytest.raises(ValueError, match=r"labels are \[1, 4\]; here they are \[B, 3\]"):
        net.embed(t, torch.zeros(1, 4))


def test_labels_change_no_other_initial_weight():
    config = [f"dataset.labels={on}" for on in ("false", "true")]
    plain, labelled = (DDPM(with_facts(tiny(on))).unet.state_dict() for on in config)
    assert labelled.pop("temb.label.weight").shape == (11, 32)
    assert_same(dict(plain), dict(labelled))


def test_wrong_images_are_refused():
    net = UNet(**TINY)
    with pytest.raises(ValueError, match="multiples of 2"):
        net(torch.zeros(1, 3, 9, 8), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        net(torch.zeros(1, 1, 8, 8), torch.zeros(1))
