"""The arithmetic that guided-diffusion and diffae share, in torch and NCHW, over named tensors: from the papers and the names of the state dicts.

Neither original is a package, so none runs beside ours. Both are guided-diffusion's UNet: what differs (diffae conditions on a second vector, and
counts fewer groups where there are fewer channels) is an argument here.
"""

import numpy as np
import parity


def weight(name, shape):
    """The parity weights, with the scales of norms around one: here their names do not say that they are norms."""
    scale = len(shape) == 1 and name.endswith("weight") and "norm" not in name
    return parity.weight(name, shape) + np.float32(scale)


class Reference:
    """Layers by name. `used` are the names asked for, which must be all there are."""

    def __init__(self, tensors, heads, new_order=False):
        self.torch = parity.original("torch")
        self.tensors = {name: self.torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
        self.heads, self.new_order, self.used = heads, new_order, set()

    def __getitem__(self, name):
        self.used.add(name)
        return self.tensors[name]

    def layer(self, name, x):
        """A dense layer, or a convolution of any size that keeps the resolution, or halves it where it is called `op`."""
        f = self.torch.nn.functional
        w, b = self[f"{name}.weight"], self[f"{name}.bias"]
        if w.ndim == 2:
            return f.linear(x, w, b)
        if w.ndim == 3:
            return f.conv1d(x, w, b)
        return f.conv2d(x, w, b, stride=2 if name.endswith(".op") else 1, padding=w.shape[-1] // 2)

    def norm(self, name, x):
        return self.torch.nn.functional.group_norm(x, min(32, x.shape[1]), self[f"{name}.weight"], self[f"{name}.bias"], eps=1e-5)

    def silu(self, x):
        return x * self.torch.sigmoid(x)

    def time(self, name, t, dim):
        half = dim // 2
        angles = np.asarray(t, np.float64)[:, None] / 1e4 ** (np.arange(half) / half)
        sinusoids = self.torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
        return self.layer(f"{name}.2", self.silu(self.layer(f"{name}.0", sinusoids)))

    def resize(self, x, way):
        f = self.torch.nn.functional
        return {"down": lambda: f.avg_pool2d(x, 2), "up": lambda: f.interpolate(x, scale_factor=2, mode="nearest"), "": lambda: x}[way]()

    def res(self, name, x, emb=None, z=None, way=""):
        h = self.layer(f"{name}.in_layers.2", self.resize(self.silu(self.norm(f"{name}.in_layers.0", x)), way))
        if emb is not None:
            time = self.layer(f"{name}.emb_layers.1", self.silu(emb))[:, :, None, None]
            if time.shape[1] == h.shape[1]:
                h = self.norm(f"{name}.out_layers.0", h + time)
            else:
                scale, shift = time.chunk(2, dim=1)
                h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
            if z is not None:
                h = h * (1 + self.layer(f"{name}.cond_emb_layers.1", self.silu(z))[:, :, None, None])
            h = self.layer(f"{name}.out_layers.3", self.silu(h))
        x = self.resize(x, way)
        return h + (x if x.shape[1] == h.shape[1] else self.layer(f"{name}.skip_connection", x))

    def attend(self, qkv, heads, new_order):
        """Each head in turn: its channels of q, k and v are found by counting."""
        c = qkv.shape[1] // (3 * heads)
        answers = []
        for head in range(heads):
            starts = [(part * heads + head) * c if new_order else (head * 3 + part) * c for part in range(3)]
            q, k, v = (qkv[:, start : start + c] for start in starts)
            weights = self.torch.softmax(self.torch.einsum("bct,bcs->bts", q, k) / c**0.5, dim=-1)
            answers.append(self.torch.einsum("bts,bcs->bct", weights, v))
        return self.torch.cat(answers, dim=1)

    def attention(self, name, x):
        qkv = self.layer(f"{name}.qkv", self.norm(f"{name}.norm", x).flatten(2))
        h = self.attend(qkv, self.heads(x.shape[1]), self.new_order)
        return x + self.layer(f"{name}.proj_out", h).reshape(x.shape)

    def change(self, name, x, way, updown, conv, *condition):
        """A change of resolution: by a residual block, a convolution, or neither."""
        if updown:
            return self.res(name, x, *condition, way=way)
        if not conv:
            return self.resize(x, way)
        return self.layer(f"{name}.op", x) if way == "down" else self.layer(f"{name}.conv", self.resize(x, way))

    def encode(self, x, levels, layers, attended, updown, conv, *condition, prefix=""):
        """The answer of the middle, and the input blocks' for each level."""
        x, skips, number = self.layer(f"{prefix}input_blocks.0.0", x), [], 0
        for level in range(levels):
            skips.append([x])
            for _ in range(layers):
                number += 1
                x = self.res(f"{prefix}input_blocks.{number}.0", x, *condition)
                x = self.attention(f"{prefix}input_blocks.{number}.1", x) if level in attended else x
                skips[-1].append(x)
            if level + 1 < levels:
                number += 1
                x = self.change(f"{prefix}input_blocks.{number}.0", x, "down", updown, conv, *condition)
        x = self.res(f"{prefix}middle_block.0", x, *condition)
        return self.res(f"{prefix}middle_block.2", self.attention(f"{prefix}middle_block.1", x), *condition), skips

    def decode(self, x, skips, layers, attended, updown, conv, *condition):
        number = 0
        for level in reversed(range(len(skips))):
            for i in range(layers + 1):
                x = self.torch.cat([x, skips[level].pop()], dim=1) if skips[level] else x
                x = self.res(f"output_blocks.{number}.0", x, *condition)
                x = self.attention(f"output_blocks.{number}.1", x) if level in attended else x
                if level and i == layers:
                    x = self.change(f"output_blocks.{number}.{1 + (level in attended)}", x, "up", updown, conv, *condition)
                number += 1
        return self.layer("out.2", self.silu(self.norm("out.0", x)))
