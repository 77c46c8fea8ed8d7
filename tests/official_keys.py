"""Keys and shapes of the official network, built from its layer table (not from our code)."""


def official_keys(*, ch: int, multipliers: list[int], attention_levels: set[int]) -> dict:
    """{name: shape} of the U-Net with 2 residual blocks a level and 3-channel pictures."""
    shapes: dict[str, list[int]] = {}

    def layer(name, *weight):
        shapes[f"{name}.weight"] = list(weight)
        shapes[f"{name}.bias"] = [weight[0]]

    def block(name, c_in, c_out):
        layer(f"{name}.norm1", c_in)
        layer(f"{name}.conv1", c_out, c_in, 3, 3)
        layer(f"{name}.temb_proj", c_out, 4 * ch)
        layer(f"{name}.norm2", c_out)
        layer(f"{name}.conv2", c_out, c_out, 3, 3)
        if c_in != c_out:
            layer(f"{name}.nin_shortcut", c_out, c_in, 1, 1)

    def attention(name, c):
        layer(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", c, c, 1, 1)

    layer("temb.dense.0", 4 * ch, ch)
    layer("temb.dense.1", 4 * ch, 4 * ch)
    layer("conv_in", ch, 3, 3, 3)
    widths = [ch * m for m in multipliers]
    top = len(widths) - 1
    skips, c = [ch], ch
    for i, width in enumerate(widths):
        for b in range(2):
            block(f"down.{i}.block.{b}", c, width)
            c = width
            skips.append(c)
            if i in attention_levels:
                attention(f"down.{i}.attn.{b}", c)
        if i < top:
            layer(f"down.{i}.downsample.conv", c, c, 3, 3)
            skips.append(c)
    block("mid.block_1", c, c)
    attention("mid.attn_1", c)
    block("mid.block_2", c, c)
    for i in range(top, -1, -1):
        for b in range(3):
            block(f"up.{i}.block.{b}", c + skips.pop(), widths[i])
            c = widths[i]
            if i in attention_levels:
                attention(f"up.{i}.attn.{b}", c)
        if i > 0:
            layer(f"up.{i}.upsample.conv", c, c, 3, 3)
    layer("norm_out", c)
    layer("conv_out", 3, c, 3, 3)
    return shapes
