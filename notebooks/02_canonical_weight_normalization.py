# %% [markdown]
# # What does training in CP form change?
#
# *Canonical weight normalization* trains not the numbers of a kernel but the pieces of
# its CP form: weights $\lambda$, a scale $\sigma$ and unit vectors. Nothing changes in
# what one layer can compute with enough components; what changes is the path that
# gradient descent takes. This notebook follows that path.
#
# **After this notebook you can**
#
# 1. write the layer's forward and its gradients in closed form, and check both;
# 2. say why the stored columns only grow under plain SGD, and what that does to the
#    step;
# 3. say how far a step of SGD moves a kernel in each storage, and why the lengths of
#    the columns decide at which rates training is stable;
# 4. compare it with weight normalization and with plain training fairly: learning rate
#    tuned for each method, several seeds, test data touched once.
#
# **You need** `01_cp_decomposition`, and the chain rule.
#
# **Time, measured on two CPU cores:** 4.0 minutes; fast mode 0.8.

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from tqdm import trange

import cpnb
from cpnb.cp import component_gram, normalize_columns
from cpnb.explore import explore, plots, step_spectrum
from cpnb.layers import COLUMN
from cpnb.train import fast_mode, paired_difference
from cpnb.truncation import select_components

plots.use_style()
torch.set_num_threads(1)  # small tensors: a second thread mostly waits for the first
FAST = fast_mode()
print("fast mode" if FAST else "full mode")


# %% [markdown]
# The exercises check themselves with this small function.


# %%
def check(name, got, expected):
    """Say whether an exercise is solved."""
    if got is None:
        print(f"{name}: not solved yet, the function returned None.")
        return
    torch.testing.assert_close(got, expected)
    print(f"{name}: correct.")


# %% [markdown]
# ## 1. The smallest layer, by hand
#
# A linear layer with two inputs and two outputs, in CP form with two components:
#
# $$W = \sigma \sum_{r=1}^{R} \lambda_r\; \hat a_r \circ \hat b_r, \qquad
# \hat a_r = a_r / \|a_r\|, \quad \hat b_r = b_r / \|b_r\| .$$
#
# The columns are *stored* at any length and *used* at length one. Take $\sigma = 2$,
# $\lambda = (5, -1)$, $a_1 = (3, 4)$, $b_1 = (1, 0)$, $a_2 = (0, 7)$, $b_2 = (0, 2)$.
#
# **Predict:** what is $W$? (The unit columns are $(0.6, 0.8)$, $(1, 0)$, $(0, 1)$ and
# $(0, 1)$.)

# %%
tiny = cpnb.CPLinear(2, 2, bias=False, rank=2)
with torch.no_grad():
    tiny.unit.fill_(1.0)  # σ is stored in a unit; here that is one
    tiny.scale.fill_(2.0)
    tiny.lam.copy_(torch.tensor([5.0, -1.0]))
    tiny.factors[0].copy_(torch.tensor([[3.0, 0.0], [4.0, 7.0]]))  # columns a_1, a_2
    tiny.factors[1].copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # columns b_1, b_2
print(tiny.weight.detach())

# %% [markdown]
# ## 2. The forward of a convolution
#
# For a kernel with four modes there are four factor matrices, and still one $\lambda_r$
# per component and one $\sigma$ per layer (Veeramacheneni, Wolter, Klein and Garcke
# 2022, [arXiv:2206.01509](https://arxiv.org/abs/2206.01509)). Written out, the forward
# is:

# %%
generator = torch.Generator().manual_seed(0)
layer = cpnb.CPConv2d(3, 4, 3, rank=5, dtype=torch.float64, generator=generator)
images = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=generator)

units, norms = normalize_columns(list(layer.factors))
kernel = cpnb.cp_to_kernel(layer.sigma * layer.lam, units)
output = F.conv2d(images, kernel, layer.bias)

torch.testing.assert_close(kernel, layer.weight)
torch.testing.assert_close(output, layer(images))
print("three lines by hand give what CPConv2d gives, shape", tuple(output.shape))

# %% [markdown]
# Two facts follow at once. **Scale invariance:** the length of a stored column does not
# matter. **The norm needs no kernel:** with the matrix of cosines $\Gamma$, in which
# products are taken entry by entry,
#
# $$\|W\|_F^2 = \sigma^2\, \lambda^\top \Gamma\, \lambda, \qquad
# \Gamma = (\hat A^\top \hat A) * (\hat B^\top\hat B) * (\hat C^\top\hat C) *
# (\hat D^\top\hat D) .$$

# %%
longer = copy.deepcopy(layer)
with torch.no_grad():
    longer.factors[0][:, 2] *= 1000
print("change of the kernel:", (longer.weight - layer.weight).abs().max().item())

gamma = component_gram(units)
square = layer.sigma**2 * layer.lam @ gamma @ layer.lam
torch.testing.assert_close(square, layer.weight.square().sum())
print(f"‖W‖² = {square.item():.6f}, from a {tuple(gamma.shape)} matrix")

# %% [markdown]
# ### Exercise 1: the forward from scratch
#
# Write `my_weight(sigma, lam, factors)` for a *linear* layer, with torch operations
# only.
#
# ```text
# for o, i:   W[o,i] = sigma · Σ_r  lam[r] · A[o,r]/‖A[:,r]‖ · B[i,r]/‖B[:,r]‖
# ```


# %%
def my_weight(sigma, lam, factors):
    """Weight of a linear layer from its CP parameters."""
    # your code here: factors holds A and B
    return None


# %%
check("exercise 1", my_weight(tiny.sigma, tiny.lam, tiny.factors), tiny.weight)


# %% tags=["solution"] jupyter={"source_hidden": true}
def my_weight_solution(sigma, lam, factors):
    """Weight of a linear layer from its CP parameters."""
    A, B = (factor / factor.norm(dim=0) for factor in factors)
    return sigma * (A * lam) @ B.T


check(
    "exercise 1, solution",
    my_weight_solution(tiny.sigma, tiny.lam, tiny.factors),
    tiny.weight,
)

# %% [markdown]
# ## 3. The gradients
#
# Let $G = \partial\ell/\partial W$ be the gradient of the loss for the full kernel. The
# chain rule gives (re-derived here; the cell below checks it against autograd)
#
# $$\frac{\partial\ell}{\partial\sigma} = \frac{\langle G, W\rangle}{\sigma}, \qquad
# \frac{\partial\ell}{\partial\lambda_r} = \sigma\,\langle G,\;
# \hat a_r\circ\hat b_r\circ\hat c_r\circ\hat d_r\rangle,$$
#
# $$\frac{\partial\ell}{\partial a_r} = \frac{\sigma\lambda_r}{\|a_r\|}\,
# \bigl(I - \hat a_r\hat a_r^\top\bigr)\, g_r, \qquad
# g_r = G \times_2 \hat b_r \times_3 \hat c_r \times_4 \hat d_r .$$

# %%
layer.zero_grad()
layer(images).square().mean().backward()  # autograd, through the CP form

W = layer.weight.detach().requires_grad_()
F.conv2d(images, W, layer.bias.detach()).square().mean().backward()
G = W.grad

with torch.no_grad():
    A, B, C, D = units
    inner = torch.einsum("oihw,ir,hr,wr->or", G, B, C, D)  # column r is g_r
    by_sigma = (G * W).sum() / layer.sigma
    by_lam = layer.sigma * (inner * A).sum(0)
    projected = inner - A * (A * inner).sum(0)
    by_a = layer.sigma * layer.lam / norms[0] * projected

torch.testing.assert_close(by_sigma * layer.unit, layer.scale.grad)
torch.testing.assert_close(by_lam, layer.lam.grad)
torch.testing.assert_close(by_a, layer.factors[0].grad)
print("the closed formulas equal autograd for σ, λ and A, in float64")

# %% [markdown]
# The matrix $I - \hat a\hat a^\top$ removes everything along $a$. The gradient of a
# column is therefore **orthogonal to the column**, whatever the loss. An ordinary
# weight row has no such property:


# %%
def cosines(columns, gradients):
    """Cosine between each column and its gradient."""
    return F.cosine_similarity(columns, gradients, dim=0).detach()


for name, factor in zip("ABCD", layer.factors, strict=True):
    print(f"{name}: largest |cosine| {cosines(factor, factor.grad).abs().max():.1e}")
rows = cosines(W.reshape(4, -1).T, G.reshape(4, -1).T)
print("rows of the plain kernel:", [round(value, 2) for value in rows.tolist()])

# %% [markdown]
# ### What orthogonality does to a step
#
# Pythagoras: after a step of plain SGD with learning rate $\eta$,
# $\|a - \eta g\|^2 = \|a\|^2 + \eta^2\|g\|^2$. The column can only become longer. And a
# longer column turns less: the gradient is divided by the length, and the same sideways
# move of a longer arrow is a smaller angle. Together the angle goes like $1/\|a\|^2$.
#
# **Predict:** the column is twice as long. By which factor does the angle of one step
# shrink?

# %%
target = torch.tensor([0.0, 1.0], dtype=torch.float64)


def one_step(length, rate=0.5):
    """Column before and after one step towards a target, and the angle in degrees."""
    a = length * torch.tensor([1.0, 0.0], dtype=torch.float64)
    a.requires_grad_()
    (-(a / a.norm()) @ target).backward()
    after = a.detach() - rate * a.grad
    return a.detach(), after, math.degrees(torch.atan2(after[1], after[0]))


print("‖a‖ before   ‖a‖ after   turned by")
for length in (1, 2, 4, 8):
    before, after, angle = one_step(length)
    print(f"{before.norm():10.1f} {after.norm():11.4f} {angle:10.2f}°")

# %%
fig, ax = plt.subplots(figsize=(6.4, 2.6))
for length, color in ((1, "C0"), (2, "C1"), (4, "C2")):
    before, after, angle = one_step(length)
    ax.annotate("", before, (0, 0), arrowprops={"arrowstyle": "->", "color": "0.6"})
    ax.annotate("", after, (0, 0), arrowprops={"arrowstyle": "->", "color": color})
    ax.plot(*zip(before, after, strict=True), ":", color=color)
    ax.text(*(after + 0.04), f"turned by {angle:.1f}°", color=color)
ax.set(xlim=(0, 5), ylim=(-0.1, 0.75), xlabel="first entry", ylabel="second entry")
ax.set_title("The longer the column, the smaller the turn")
plt.show()

# %% [markdown]
# **What to see:** each gradient step (dotted) leaves its column at a right angle, and
# the same learning rate turns a long column far less than a short one.
#
# ## 4. Columns grow during training
#
# Now a real network, plain SGD without momentum and without weight decay. We watch the
# lengths of the nine input columns of the last layer, as multiples of what they were at
# the start, at three learning rates and for twelve epochs.
#
# **Predict:** will any column shrink? And if each step adds $\eta^2\|g\|^2$ to the
# squared length, how much more growth will a ten times larger learning rate bring?

# %%
data = cpnb.load_data("digits")
EPOCHS = 4 if FAST else 12
PLAIN_SGD = {
    "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": None,
    "batch_size": 64, "epochs": EPOCHS, "progress": False,
}  # fmt: skip


def column_lengths(lr, weight_decay=0.0):
    """Growth of fc2's input columns after 0, 1, … epochs, and the last accuracy."""
    generator = torch.Generator().manual_seed(0)
    net = cpnb.DigitsNet(generator=generator)
    net = cpnb.canonicalize(net, generator=generator)
    seen = [net.fc2.factors[1].detach().norm(dim=0)]

    def watch(epoch, model, record):
        seen.append(model.fc2.factors[1].detach().norm(dim=0))

    recipe = PLAIN_SGD | {"lr": lr, "weight_decay": weight_decay, "epochs": 12}
    run = cpnb.fit(net, data, callback=watch, **recipe)
    return torch.stack(seen) / seen[0], run.history[-1]["validation_accuracy"]


# %%
lengths, learned = {}, {}
for lr in (0.02, 0.05, 0.2):
    lengths[lr], learned[lr] = column_lengths(lr)
growth = {lr: values.mean(1) - 1 for lr, values in lengths.items()}

print("rate   mean growth   validation accuracy   smallest change in any epoch")
for lr, values in lengths.items():
    smallest = (values[1:] - values[:-1]).min().item()
    assert smallest > -1e-6  # float32 rounding
    print(f"{lr:<4} {growth[lr][-1]:13.6f} {learned[lr]:21.1%} {smallest:30.1e}")
assert learned[0.2] > 0.9, "the network at rate 0.2 should have learned"

ratio = growth[0.2] / growth[0.02]
print(f"growth at 0.2 over growth at 0.02: about {ratio[1]:.0f} after one epoch,")
print(f"about {ratio[-1]:.0f} after the last")

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2))
for (lr, values), color in zip(lengths.items(), ("C2", "C1", "C0"), strict=True):
    axes[0].plot(values, color=color, alpha=0.7, linewidth=1)
    axes[1].plot(1 / values**2, color=color, alpha=0.7, linewidth=1)
    axes[1].plot([], color=color, label=f"rate {lr}, accuracy {learned[lr]:.0%}")
ends = ", ".join(f"{100 * values[-1]:.2g} %" for values in growth.values())
axes[0].set_title(f"‖a‖ grows by {ends} in the mean")
axes[0].set(xlabel="epoch", ylabel="‖a‖ / ‖a‖ at the start")
share = 1 / lengths[0.2][-1].max() ** 2
axes[1].set_title(f"the effective step falls to {share:.0%} at rate 0.2")
axes[1].set(xlabel="epoch", ylabel="effective step, share", ylim=(0, 1.02))
axes[1].legend(loc="lower left")
plt.show()

# %% [markdown]
# **What to see:** one line per column. None ever becomes shorter (the assertion in the
# cell would fail). At rate 0.2 the network learns, and meanwhile the effective step
# falls and then levels off: a mild learning-rate schedule that the geometry makes by
# itself, one for each column (the right title gives the column that grew most). At the
# smallest rate the network has learned least, and its columns have grown least.
#
# The answer to the prediction: a *hundred* times, if the gradients were the same. They
# are not. After one epoch the ratio printed above is in the thousands, because only the
# larger rate has moved the network away from its start, to where the gradients of the
# columns are larger; at the end both have learned, and it is below a hundred. So the
# effect is always there, but whether it *matters* depends on the learning rate.
#
# ### Exercise 2: the price of weight decay
#
# Weight decay pulls every stored number towards zero. For a column whose *length* does
# not matter, what can that do? Complete `lengths_with_decay()`: what `column_lengths`
# returns for a run like those above, at rate 0.2 with `weight_decay=0.01`. Predict
# first: which of the statements above stops being true?


# %%
def lengths_with_decay():
    """Column lengths (epochs + 1, columns) and accuracy of a run with weight decay."""
    # your code here: one call of column_lengths
    return None


# %%
def check_decay(found):
    """Check exercise 2 and say what weight decay did."""
    if found is None:
        print("exercise 2: not solved yet, the function returned None.")
        return
    free = lengths[0.2]
    found, accuracy = found
    assert found.shape == free.shape, "expected one row per epoch, and the start"
    change = (found[-1] / free[-1]).mean()
    shrank = (found[1:] < found[:-1]).any(0).float().mean()
    print(f"exercise 2: columns end at {change:.2f} of their length without decay,")
    print(f"and {shrank:.0%} of the columns became shorter in some epoch;")
    print(f"accuracy {accuracy:.1%} with decay, {learned[0.2]:.1%} without.")


check_decay(lengths_with_decay())


# %% tags=["solution"] jupyter={"source_hidden": true}
def lengths_with_decay_solution():
    """Column lengths (epochs + 1, columns) and accuracy of a run with weight decay."""
    return column_lengths(0.2, weight_decay=0.01)


check_decay(lengths_with_decay_solution())

# %% [markdown]
# Weight decay cannot make the kernel smaller through its columns. It makes the columns
# shorter and thereby the *effective step larger*. For a scale-invariant parameter it is
# a learning-rate control, not a penalty on size.
#
# ## 5. The relative: weight normalization
#
# Weight normalization (Salimans and Kingma 2016,
# [arXiv:1602.07868](https://arxiv.org/abs/1602.07868)) writes every row of a weight
# matrix as length times direction, $w_o = g_o\, v_o/\|v_o\|$. As a sum over rows,
#
# $$W = \sum_o g_o\; e_o \circ \hat v_o ,$$
#
# with unit vectors $e_o$ for the outputs. **That is a CP form**: one component for each
# output, $\lambda = g$, $\hat b_o = \hat v_o$, and the first factor is the identity
# matrix, which is *not* trained. Let us build both and compare weights and gradients.

# %%
generator = torch.Generator().manual_seed(0)
linear = nn.Linear(6, 4, bias=False, dtype=torch.float64)
nn.init.normal_(linear.weight, generator=generator)
inputs = torch.randn(10, 6, dtype=torch.float64, generator=generator)
normed = weight_norm(linear)
g, v = (
    normed.parametrizations.weight.original0,
    normed.parametrizations.weight.original1,
)

twin = cpnb.CPLinear(6, 4, bias=False, rank=4, dtype=torch.float64)
with torch.no_grad():
    twin.unit.fill_(1.0)
    twin.scale.fill_(1.0)
    twin.lam.copy_(g[:, 0])
    twin.factors[0].copy_(torch.eye(4))
    twin.factors[1].copy_(v.T)

for net in (normed, twin):
    net(inputs).pow(3).mean().backward()
torch.testing.assert_close(twin.weight, normed.weight)
torch.testing.assert_close(twin.lam.grad, g.grad[:, 0])
torch.testing.assert_close(twin.factors[1].grad, v.grad.T)
print("same weight, same gradients for λ = g and B = vᵀ")
print("gradient of the first factor:", twin.factors[0].grad.norm().item())

# %% [markdown]
# What is the same: weights, length and direction trained apart, the orthogonal
# gradient, the growing lengths. What differs is the last line: here the first factor
# *does* get a gradient. Canonical weight normalization also turns the output
# directions, shares each component between all outputs, and can have fewer components
# than outputs. With one output there is nothing left to turn: a layer with a single row
# and one component *is* weight normalization. In numbers:

# %%
row = nn.Linear(6, 1, bias=False, dtype=torch.float64)
nn.init.normal_(row.weight, generator=torch.Generator().manual_seed(0))
single = cpnb.from_layer(row, rank=1)
print("factors of a one-row layer:", [tuple(f.shape) for f in single.factors])
print("difference of the weights :", (single.weight - row.weight).abs().max().item())

plain = cpnb.DigitsNet(generator=torch.Generator().manual_seed(0))
normed_net = copy.deepcopy(plain)
for module in normed_net.children():
    weight_norm(module)
for name, net in {
    "plain": plain,
    "weight norm": normed_net,
    "canonical, break-even rank": cpnb.canonicalize(plain, init="unified"),
    "canonical, half of it": cpnb.canonicalize(plain, rank=0.5, init="unified"),
}.items():
    print(f"{name:28}{sum(p.numel() for p in net.parameters()):8,} parameters")

# %% [markdown]
# ## 6. Signed λ, and the released code
#
# Our $\lambda$ may have any sign. The code released with the paper computes with
# $|\lambda|$ but, when it truncates, sorts by *signed* $\lambda$. Where all $\lambda$
# are positive there is no difference. Take $\lambda = (1, -5)$:

# %%
eye = torch.eye(2)
with torch.no_grad():
    for factor in tiny.factors:
        factor.copy_(eye)
    tiny.scale.fill_(1.0)
    tiny.lam.copy_(torch.tensor([1.0, -5.0]))
absolute = copy.deepcopy(tiny)
absolute.signed = False
print("signed λ:", tiny.weight.tolist())
print("with |λ|:", absolute.weight.tolist())

# %% [markdown]
# **Predict:** keep one of the two components. Which one would you keep, and which one
# does an order by signed $\lambda$ keep?

# %%
for rule, order in {"signed λ": tiny.lam, "|λ|": tiny.lam.abs()}.items():
    kept = select_components(tiny, order.topk(1).indices)
    error = cpnb.relative_error(tiny.weight, kept.weight).item()
    lam = kept.components()[0].item()
    print(f"largest by {rule:8}: keeps λ = {lam:4.0f}, error {error:.2f}")

# %% [markdown]
# During training the sign matters too. Fit one number, target $-1$, start at
# $\lambda = 0.5$, directions fixed at one:

# %%
print("step       signed λ    with |λ|")
values = {"signed": torch.tensor(0.5), "absolute": torch.tensor(0.5)}
for step in range(0, 61):
    if step % 20 == 0:
        weights = values["signed"], values["absolute"].abs()
        print(f"{step:4} {weights[0]:14.3f} {weights[1]:11.3f}")
    for name, lam in values.items():
        lam = lam.clone().requires_grad_()
        weight = lam if name == "signed" else lam.abs()
        (weight + 1).square().backward()
        values[name] = (lam - 0.05 * lam.grad).detach()

# %% [markdown]
# With $|\lambda|$ a component cannot change its sign through $\lambda$: it stays near
# zero, and only a factor column could turn round instead. cpnb uses signed $\lambda$
# everywhere and orders by $|\lambda|$; `signed=False` reproduces the other behaviour.
#
# ## 7. How far does one step go?
#
# A step of SGD moves a plain kernel by $-\eta G$. In CP form it moves the stored
# numbers, and they move the kernel: with $J$ the Jacobian of the kernel by the stored
# numbers, by $-\eta\, J J^\top G$ to first order. Plain weights have $J J^\top = I$.
#
# **By hand.** Take $2\times2$, two components, $\sigma = 1$, $\lambda = (3, 1)$ and
# unit columns $\hat a_r = \hat b_r = e_r$, so that $W$ is diagonal. Which numbers move
# which entry?
#
# - $W_{12}$: the column $a_2$ at rate $\lambda_2 = 1$ and $b_1$ at rate
#   $\lambda_1 = 3$; together $1 + 9 = 10$. The same for $W_{21}$.
# - $W_{11}$ and $W_{22}$: $\lambda_1$ and $\lambda_2$, each at rate 1, and $\sigma$ at
#   rates $(3, 1)$: the matrix $I + (3,1)^\top(3,1)$.
#
# **Predict** the largest eigenvalue of $J J^\top$. At which learning rate, compared
# with a plain kernel, will training become unstable?

# %%
hand = copy.deepcopy(tiny)
with torch.no_grad():
    hand.scale.fill_(1.0)
    hand.lam.copy_(torch.tensor([3.0, 1.0]))
    for factor in hand.factors:
        factor.copy_(torch.eye(2))
found = step_spectrum(hand)
print(f"largest {found.largest:.2f}, mean {found.mean:.2f}")
assert abs(found.largest - 11) < 0.01  # I + (3,1)ᵀ(3,1) has the eigenvalue 1 + 9 + 1
assert abs(found.mean - 8) < 0.5  # (10 + 10 + 11 + 1) / 4, from random probes

# %% [markdown]
# About an eleventh of the rate. For a kernel of real size it is worse: $\sigma$ alone
# has the eigenvalue $\|W\|^2$, which for He's variance is twice the number of outputs.
#
# But lengths and units are free: they change the steps and not the function. The
# **step gauge** stores a column of mode $n$ at the length
# $0.7\,|\sigma\lambda_r|\sqrt{N_{\max}/N_n}$ and $\sigma$ and $\lambda$ in units that
# make them 16 times slower than that (re-derived here, constants chosen by measurement
# on other networks). Every start of the library is in it; `cpnb.step_gauge_` puts an
# older network into it. Three ways to store one kernel:


# %%
def unit_columns_(layer, units=False):
    """Store a layer's columns at length one; σ = 1 unless it keeps its units."""
    lam, columns = layer.components()
    with torch.no_grad():
        if not units:
            layer.unit.fill_(1.0)
            layer.scale.fill_(1.0)
            layer.lam.copy_(lam)
        for factor, column in zip(layer.factors, columns, strict=True):
            factor.copy_(column)
    return layer


STORAGES = {
    "unit columns, σ = 1": unit_columns_,
    "unit columns, σ and λ in units": lambda layer: unit_columns_(layer, units=True),
    "step gauge": cpnb.step_gauge_,
}
generator = torch.Generator().manual_seed(0)
conv = cpnb.CPConv2d(32, 64, 3, generator=generator)
print(f"{'eigenvalues of J Jᵀ':34} largest     mean")
for name, store in STORAGES.items():
    found = step_spectrum(store(cpnb.step_gauge_(conv)), generator=generator)
    print(f"{name:34}{found.largest:8.2f} {found.mean:8.3f}")
dense_step = step_spectrum(nn.Conv2d(32, 64, 3))
print(f"{'plain kernel':34}{dense_step.largest:8.2f} {dense_step.mean:8.3f}")
assert found.largest < 10 and 0.5 < found.mean < 2

# %% [markdown]
# **What to see:** the eigenvalue of 131 belongs to $\sigma$ alone, and goes with its
# unit. What is left is of the size of a plain kernel's. In this layer
# $|\sigma\lambda_r| = 0.85$, so that unit columns happen to have about the right
# length; at another rank or shape they have not, and in the step gauge they do. Does it
# matter? The networks, and a training by momentum SGD at rates that suit the plain
# network:

# %%
METHODS = {
    "dense": "plain",
    "weight": "weight norm",
    "canonical": "canonical, unified start",
    "canonical, power start": "canonical, power start",
}


def build(method, seed):
    """A network in one of the parametrisations, all from the same dense start."""
    generator = torch.Generator().manual_seed(seed)
    net = cpnb.DigitsNet(generator=generator)
    if method == "weight":
        for module in net.children():
            weight_norm(module)
    elif method.startswith("canonical"):
        init = "power" if method.endswith("power start") else "unified"
        net = cpnb.canonicalize(net, init=init, generator=generator)
    return net


MOMENTUM = PLAIN_SGD | {"momentum": 0.9}
STEP_RATES = [0.003, 0.01, 0.03, 0.1]


def reached(net, lr):
    """Validation accuracy in % after a training; chance if it diverged."""
    run = cpnb.fit(net, data, lr=lr, seed=0, **MOMENTUM)
    done = run.status == "finished"
    return 100 * run.history[-1]["validation_accuracy"] if done else 10.0


# %%
print("validation accuracy, %" + "".join(f"{lr:>10}" for lr in STEP_RATES))
for name, store in {"plain": None, **STORAGES}.items():
    values = []
    for lr in STEP_RATES:
        net = build("canonical" if store else "dense", seed=0)
        for layer in cpnb.cp_layers(net).values():
            store(layer)
        values.append(reached(net, lr))
    print(f"{name:34}" + " ".join(f"{value:8.1f}" for value in values))

# %% [markdown]
# **What to see:** with $\sigma = 1$ the training breaks at a rate at which the plain
# network still learns; in the step gauge it holds. The factor 0.7 is a choice. All
# columns longer: smaller steps everywhere, and steadier training at high rates;
# shorter: the reverse. Slide the length (nothing is trained while you do: the curves
# were made beforehand).

# %%
LENGTHS = [0.35, 0.7, 1.4, 2.8]
swept = {}
for index in trange(len(LENGTHS) * len(STEP_RATES), desc="lengths"):
    c, lr = LENGTHS[index // len(STEP_RATES)], STEP_RATES[index % len(STEP_RATES)]
    net = build("canonical", seed=0)
    with torch.no_grad():
        for layer in cpnb.cp_layers(net).values():
            for factor in layer.factors:
                factor.mul_(c / COLUMN)
    swept.setdefault(c, []).append(reached(net, lr))


def draw_lengths(figure, c):
    """Accuracy against the rate for one length of the columns, and its best rate."""
    ax = figure.subplots()
    for length, values in swept.items():
        color = "C0" if length == c else "0.8"
        ax.plot(STEP_RATES, values, "o-", color=color, zorder=2 + (length == c))
    ax.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy, %")
    far = (COLUMN / c) ** 2
    ax.set_title(f"Columns of length {c} · |σλ|: steps {far:.2g} × as far")
    best = max(zip(swept[c], STEP_RATES, strict=True))
    return f"At length {c} the best of these rates is {best[1]}, with {best[0]:.1f} %."


explore(draw_lengths, c=LENGTHS)

# %% [markdown]
# With lengths alone the steps of all columns scale by $1/c^2$, as a learning rate
# would. To compare methods at *one* rate would still compare step lengths, so the race
# tunes the rate of each.
#
# ## 8. The race
#
# The rules. Plain SGD without momentum at a constant rate, the setting of the theory
# above. For each method the learning rate is chosen on the **validation** split, with
# seeds that are used for nothing else. Then fresh seeds are trained at the chosen rate,
# and each trained network is shown the **test** split exactly once.
#
# **Predict:** which method reaches the best test accuracy, and by how much? And which
# one tolerates the widest range of learning rates?

# %%
RATES = [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
RATES = [0.05, 0.2, 0.8] if FAST else RATES
TUNING_SEEDS = [300] if FAST else [300, 301, 302, 303]
FRESH_SEEDS = range(200, 205) if FAST else range(200, 210)
print(f"{len(RATES)} rates × {len(TUNING_SEEDS)} tuning seeds, {EPOCHS} epochs;")
print(f"then n = {len(FRESH_SEEDS)} fresh seeds per method")


def train(method, lr, seed):
    """A trained network and the record of its run."""
    net = build(method, seed)
    run = cpnb.fit(net, data, lr=lr, seed=seed, **PLAIN_SGD)
    return net, run


def final_accuracy(run):
    """Validation accuracy at the end; chance for a run that diverged."""
    return run.history[-1]["validation_accuracy"] if run.status == "finished" else 0.1


# %%
tuned = {}
for index in trange(len(METHODS) * len(RATES), desc="tuning"):
    method = list(METHODS)[index // len(RATES)]
    lr = RATES[index % len(RATES)]
    runs = [train(method, lr, seed)[1] for seed in TUNING_SEEDS]
    tuned.setdefault(method, []).append([final_accuracy(run) for run in runs])
tuned = {method: torch.tensor(values) for method, values in tuned.items()}
best = {m: RATES[int(values.mean(1).argmax())] for m, values in tuned.items()}
for method, lr in best.items():
    edge = ", the edge of the grid" if lr in (RATES[0], RATES[-1]) else ""
    worst = tuned[method][RATES.index(lr)].min()
    print(f"{METHODS[method]:26} learning rate {lr:g}{edge}; worst seed {worst:.1%}")

# %%
OTHER_LOOK = {"color": "C2", "marker": "^"}  # a method outside the table of the library
fig, ax = plt.subplots()
for method, values in tuned.items():
    look = plots.METHOD_STYLES.get(method)
    look = {"color": look.color, "marker": look.marker} if look else OTHER_LOOK
    ax.plot(RATES, values.mean(1), label=METHODS[method], **look)
ax.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy", ylim=(0, 1))
ax.set_xticks(RATES, [f"{rate:g}" for rate in RATES], minor=False)
ax.set_xticks([], minor=True)
rates = ", ".join(f"{best[method]:g}" for method in METHODS)
ax.set_title(f"Best rates, in the order of the legend: {rates}")
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# **What to see:** means over the tuning seeds. The curves have their tops at different
# rates, and they fall off at different places: a comparison at any single rate would
# have crowned whichever method that rate suits. Near such a cliff the next seed may
# fall off, and at a constant rate the loss of a seed may jump up in its last epoch even
# where the cliff is far. That is why full mode tunes with several seeds. They may still
# all be lucky, and so the range over the fresh seeds is printed below.

# %%
races = {method: [] for method in METHODS}
tested = {method: [] for method in METHODS}
for index in trange(len(METHODS) * len(FRESH_SEEDS), desc="fresh seeds"):
    method = list(METHODS)[index // len(FRESH_SEEDS)]
    net, run = train(method, best[method], FRESH_SEEDS[index % len(FRESH_SEEDS)])
    races[method].append(run)
    tested[method].append(cpnb.accuracy(net, data.test))
tested = {method: torch.tensor(values) for method, values in tested.items()}

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
plots.plot_training(races, "train_loss", ax=axes[0])
plots.plot_training(races, "validation_accuracy", ax=axes[1])
axes[0].set_title("loss on the training images")
axes[1].set_title("accuracy on the validation images")
axes[0].set_ylim(bottom=0)
axes[1].set_ylim(0, 1.02)
plt.show()

# %% [markdown]
# **What to see:** lines are means and bands ± one standard deviation over the fresh
# seeds, each method at its own learning rate. Look at the first epochs and at the end
# separately; the order need not be the same. Where a band widens again in the last
# epochs, one or two seeds have jumped away from the others. The legend's "dense" is
# plain training, its "canonical (CP)" the unified start.

# %%
print(f"test accuracy, mean ± std over n = {len(FRESH_SEEDS)} seeds, {EPOCHS} epochs")
for method, values in tested.items():
    low, high = values.min(), values.max()
    print(
        f"{METHODS[method]:26} lr {best[method]:<7g} {values.mean():.2%} ± "
        f"{values.std():.2%}   (from {low:.1%} to {high:.1%})"
    )
error = (tested["dense"].mean() * (1 - tested["dense"].mean()) / 359).sqrt()
print(f"one image is {1 / 359:.2%}; another test set of this size: ± {error:.2%}")

# %% [markdown]
# The same seed gives every method the same dense start and the same order of images, so
# the fair question is the *difference* per seed, with its 95 % interval (Student's
# $t$): where that holds zero, the two are *not told apart*, as in every notebook.

# %%
print("points of test accuracy against plain training")
for method in list(METHODS)[1:]:
    gap = paired_difference(100 * tested[method], 100 * tested["dense"])
    print(f"{METHODS[method]:26} {gap}")

# %%
early = {m: torch.tensor([r.history[1]["train_loss"] for r in races[m]]) for m in races}
ranked = sorted(early, key=lambda m: early[m].mean().item())
print(
    "training loss in epoch 2, smallest first: "
    + "; ".join(
        f"{METHODS[m]} {early[m].mean():.2f} ± {early[m].std():.2f}" for m in ranked
    )
)

# %% [markdown]
# **How far this answer reaches.** The sentences above are about one small network on
# one small data set, plain SGD, a constant learning rate and few epochs, with one fixed
# split of the data. The intervals speak of seeds, not of other images. A single seed
# that jumps at the end can widen an interval so far that a difference of some points is
# not told apart: that is no sign that two methods are equal. Rates were
# tuned on a coarse grid with few seeds; every method could gain from a finer search. At
# the break-even rank the canonical network holds about as many parameters as the plain
# one, so nothing here is compression; that is what `05_truncation` is about.
#
# ### Exercise 3: the mean of the steps
#
# Write `mean_step(sizes, rank, c)`: the mean eigenvalue of $J J^\top$ of a kernel with
# modes of these sizes when every column is stored at length $c\,|\sigma\lambda_r|$, all
# modes alike, and $\sigma$ and $\lambda$ are frozen.
#
# ```text
# a column of mode n moves the kernel in N_n − 1 directions, each at (σλ/‖a‖)² = 1/c²;
# the mean is over all entries of the kernel
# ```


# %%
def mean_step(sizes, rank, c):
    """Mean eigenvalue of J Jᵀ, columns only."""
    # your code here
    return None


# %%
def check_mean(title, function):
    """Compare with a measured layer, 1×1 modes left out."""
    if function((64, 32, 3, 3), 179, 1.0) is None:
        print(f"{title}: not solved yet, the function returned None.")
        return
    layer = cpnb.CPConv2d(32, 64, 3, rank=100)
    lam, columns = layer.components()
    with torch.no_grad():
        for factor, column in zip(layer.factors, columns, strict=True):
            factor.copy_(2 * lam.abs() * column)
    layer.lam.requires_grad_(False)
    layer.scale.requires_grad_(False)
    measured = step_spectrum(layer).mean
    expected = function((64, 32, 3, 3), 100, 2.0)
    print(f"{title}: formula {expected:.4f}, measured {measured:.4f}")
    assert abs(measured / expected - 1) < 0.05


check_mean("exercise 3", mean_step)


# %% tags=["solution"] jupyter={"source_hidden": true}
def mean_step_solution(sizes, rank, c):
    """Mean eigenvalue of J Jᵀ, columns only."""
    return rank * sum(size - 1 for size in sizes) / c**2 / math.prod(sizes)


check_mean("exercise 3, solution", mean_step_solution)

# %% [markdown]
# ## What was not shown
#
# - *Other starts* of the CP network and why their variance matters:
#   `03_initialization`.
# - *Momentum and adaptive optimisers*, for which the lengths need not grow: the step is
#   then no longer the gradient, and not orthogonal to the column.
# - *Larger networks and data*, where the paper makes its comparisons.
#
# ## Summary
#
# - A CP layer computes
#   $W = \sigma\sum_r\lambda_r\,\hat a_r\circ\hat b_r\circ\hat c_r\circ\hat d_r$; the
#   length of a stored column does not matter.
# - The gradient of a column is orthogonal to it. Under plain SGD its length only grows,
#   and its effective step shrinks as $1/\|a\|^2$.
# - Weight normalization is the same form with one component per output and the first
#   factor fixed at the identity.
# - One step moves the kernel by $-\eta\,JJ^\top G$. With $\sigma$ stored plainly the
#   largest eigenvalue of $JJ^\top$ is $\|W\|^2$, and training breaks; the step gauge
#   brings it near that of a plain kernel without changing the function.
# - In the race of this notebook, plain SGD on digits with every rate tuned, plain
#   training and weight normalization reach 98.3 % and the canonical networks about a
#   point less.
#
# **Next:** `03_initialization`: where should a canonical network start?
#
# **References.** L. Veeramacheneni, M. Wolter, R. Klein, J. Garcke, *Canonical
# convolutional neural networks*, 2022, arXiv:2206.01509. T. Salimans, D. Kingma,
# *Weight normalization*, 2016, arXiv:1602.07868. Y. Pan et al., *A unified weight
# initialization paradigm for tensorial convolutional neural networks*, 2022,
# arXiv:2205.15307.

# %%
print("cpnb", cpnb.__version__, "· torch", torch.__version__.split("+")[0])
