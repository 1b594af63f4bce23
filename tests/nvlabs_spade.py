"""A small replica of NVlabs/SPADE's networks in plain PyTorch, with their module names and the older spectral norm.

Written from the published code's structure, independently of ``pixnorm.networks``: one-hot maps throughout, and every
operation by itself.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn


def spectral(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but that of the checkpoints
        return torch.nn.utils.spectral_norm(layer)


class SPADE(nn.Module):
    def __init__(self, channels, labels, hidden, statistics):
        super().__init__()
        kind = nn.BatchNorm2d if statistics == "batch" else nn.InstanceNorm2d
        self.param_free_norm = kind(channels, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(labels, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x, seg):
        actv = self.mlp_shared(F.interpolate(seg, size=x.size()[2:], mode="nearest"))
        return self.param_free_norm(x) * (1 + self.mlp_gamma(actv)) + self.mlp_beta(actv)


class SPADEResnetBlock(nn.Module):
    def __init__(self, fin, fout, *spade):
        super().__init__()
        middle = min(fin, fout)
        self.conv_0 = spectral(nn.Conv2d(fin, middle, 3, padding=1))
        self.conv_1 = spectral(nn.Conv2d(middle, fout, 3, padding=1))
        self.norm_0, self.norm_1 = SPADE(fin, *spade), SPADE(middle, *spade)
        self.learned_shortcut = fin != fout
        if self.learned_shortcut:
            self.conv_s = spectral(nn.Conv2d(fin, fout, 1, bias=False))
            self.norm_s = SPADE(fin, *spade)

    def forward(self, x, seg):
        shortcut = self.conv_s(self.norm_s(x, seg)) if self.learned_shortcut else x
        dx = self.conv_0(F.leaky_relu(self.norm_0(x, seg), 0.2))
        return shortcut + self.conv_1(F.leaky_relu(self.norm_1(dx, seg), 0.2))


class Generator(nn.Module):
    def __init__(self, rows, columns, labels, nf, z_dim=0, layers="normal", hidden=8, statistics="batch"):
        super().__init__()
        self.size, self.layers, self.z_dim, self.nf = (rows, columns), layers, z_dim, nf
        spade = labels, hidden, statistics
        if z_dim:
            self.fc = nn.Linear(z_dim, 16 * nf * rows * columns)
        else:
            self.fc = nn.Conv2d(labels, 16 * nf, 3, padding=1)
        self.head_0 = SPADEResnetBlock(16 * nf, 16 * nf, *spade)
        self.G_middle_0 = SPADEResnetBlock(16 * nf, 16 * nf, *spade)
        self.G_middle_1 = SPADEResnetBlock(16 * nf, 16 * nf, *spade)
        self.up_0 = SPADEResnetBlock(16 * nf, 8 * nf, *spade)
        self.up_1 = SPADEResnetBlock(8 * nf, 4 * nf, *spade)
        self.up_2 = SPADEResnetBlock(4 * nf, 2 * nf, *spade)
        self.up_3 = SPADEResnetBlock(2 * nf, nf, *spade)
        if layers == "most":
            self.up_4 = SPADEResnetBlock(nf, nf // 2, *spade)
        self.conv_img = nn.Conv2d(nf // 2 if layers == "most" else nf, 3, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, seg, z=None):
        x = self.fc(z if self.z_dim else F.interpolate(seg, size=self.size))
        x = x.view(-1, 16 * self.nf, *self.size)
        x = self.head_0(x, seg)
        x = self.G_middle_0(self.up(x), seg)
        if self.layers in ("more", "most"):
            x = self.up(x)
        x = self.G_middle_1(x, seg)
        for block in (self.up_0, self.up_1, self.up_2, self.up_3):
            x = block(self.up(x), seg)
        if self.layers == "most":
            x = self.up_4(self.up(x), seg)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


class Encoder(nn.Module):
    def __init__(self, nf, z_dim):
        super().__init__()
        widths = [3, nf, 2 * nf, 4 * nf, 8 * nf, 8 * nf, 8 * nf]
        for i in range(6):
            conv = spectral(nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1, bias=False))
            setattr(self, f"layer{i + 1}", nn.Sequential(conv, nn.InstanceNorm2d(widths[i + 1])))
        self.fc_mu, self.fc_var = nn.Linear(8 * nf * 16, z_dim), nn.Linear(8 * nf * 16, z_dim)

    def forward(self, x):
        x = F.interpolate(x, size=(256, 256), mode="bilinear")
        x = self.layer1(x)
        for i in range(2, 7):
            x = getattr(self, f"layer{i}")(F.leaky_relu(x, 0.2))
        x = F.leaky_relu(x, 0.2).flatten(1)
        return self.fc_mu(x), self.fc_var(x)


class NLayerDiscriminator(nn.Module):
    def __init__(self, channels, nf, layers):
        super().__init__()
        self.model0 = nn.Sequential(nn.Conv2d(channels, nf, 4, stride=2, padding=2), nn.LeakyReLU(0.2))
        for n in range(1, layers):
            before, nf = nf, nf * 2
            conv = spectral(nn.Conv2d(before, nf, 4, stride=1 if n == layers - 1 else 2, padding=2, bias=False))
            block = nn.Sequential(nn.Sequential(conv, nn.InstanceNorm2d(nf)), nn.LeakyReLU(0.2))
            setattr(self, f"model{n}", block)
        setattr(self, f"model{layers}", nn.Sequential(nn.Conv2d(nf, 1, 4, padding=2)))

    def forward(self, x):
        results = [x]
        for model in self.children():
            results.append(model(results[-1]))
        return results[1:]


class MultiscaleDiscriminator(nn.Module):
    def __init__(self, labels, nf, layers=4, scales=2):
        super().__init__()
        for i in range(scales):
            self.add_module(f"discriminator_{i}", NLayerDiscriminator(labels + 3, nf, layers))

    def forward(self, seg, image):
        x, result = torch.cat([seg, image], 1), []
        for scale in self.children():
            result.append(scale(x))
            x = F.avg_pool2d(x, 3, stride=2, padding=[1, 1], count_include_pad=False)
        return result


def converged(network):
    """Spectral norms at the fixed point of the power iteration, where one more step, in any order, changes nothing."""
    for layer in network.modules():
        if hasattr(layer, "weight_u"):
            u, _, v = torch.linalg.svd(layer.weight_orig.detach().flatten(1), full_matrices=False)
            layer.weight_u.copy_(u[:, 0])
            layer.weight_v.copy_(v[0])
    return network
