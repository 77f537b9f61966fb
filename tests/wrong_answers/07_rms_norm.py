# %% 1 · takes the size for the length
lengths = [1, 2, 1, 0]
# %% 1 · forgets the 1 in 1 + w
lengths = [0, 2048**0.5, 0, 0]
# %% 1 · lets the thousand through
lengths = [2048**0.5, 2 * 2048**0.5, 1000 * 2048**0.5, 0]
# %% 1 · takes the sum for its root
lengths = [2048, 4096, 2048, 0]
# %% 1 · blows zeros up
lengths = [2048**0.5, 2 * 2048**0.5, 2048**0.5, 2048**0.5]
# %% 1 · answers in words
lengths = ["45.25", "90.5", "45.25", "0"]


# %% 2 · adds the 1 as Gemma does
def llama_norm(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return h.type_as(x) * (1 + weight)


# %% 2 · rounds after the weight, as Gemma does
def llama_norm(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * weight.float()).type_as(x)


# %% 2 · works in the type of x throughout
def llama_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


# %% 2 · sum instead of mean
def llama_norm(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.square().sum(-1, keepdim=True) + eps)
    return h.type_as(x) * weight


# %% 2 · mean over everything
def llama_norm(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean() + eps)
    return h.type_as(x) * weight


# %% 2 · subtracts the mean, as LayerNorm does
def llama_norm(x, weight, eps):
    h = x.float() - x.float().mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return h.type_as(x) * weight


# %% 2 · forgets eps
def llama_norm(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True))
    return h.type_as(x) * weight


# %% 2 · forgets the weight
def llama_norm(x, weight, eps):
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).type_as(x)


# %% 2 · returns float32
def llama_norm(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return h.type_as(x).float() * weight.float()


# %% 2 · adds eps outside the root
def llama_norm(x, weight, eps):
    h = x.float()
    h = h / (h.square().mean(-1, keepdim=True).sqrt() + eps)
    return h.type_as(x) * weight


# %% 2 · forgets the root
def llama_norm(x, weight, eps):
    h = x.float()
    h = h / (h.square().mean(-1, keepdim=True) + eps)
    return h.type_as(x) * weight


# %% 3 · scales the rows
def fold(norm, linear):
    folded = nn.Linear(linear.in_features, linear.out_features, bias=False)
    with torch.no_grad():
        scale = (1 + norm.weight)[: linear.out_features]
        scale = torch.cat((scale, torch.ones(linear.out_features - len(scale))))
        folded.weight.copy_(linear.weight * scale[:, None])
    return folded


# %% 3 · forgets the 1
def fold(norm, linear):
    folded = nn.Linear(linear.in_features, linear.out_features, bias=False)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * norm.weight)
    return folded


# %% 3 · changes the layer that was given
def fold(norm, linear):
    with torch.no_grad():
        linear.weight.mul_(1 + norm.weight)
    return linear


# %% 3 · divides instead of multiplying
def fold(norm, linear):
    folded = nn.Linear(linear.in_features, linear.out_features, bias=False)
    with torch.no_grad():
        folded.weight.copy_(linear.weight / (1 + norm.weight))
    return folded


# %% 3 · has a bias that nobody set
def fold(norm, linear):
    folded = nn.Linear(linear.in_features, linear.out_features)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * (1 + norm.weight))
    return folded


# %% 3 · copies the layer only
def fold(norm, linear):
    folded = nn.Linear(linear.in_features, linear.out_features, bias=False)
    folded.load_state_dict(linear.state_dict())
    return folded


# %% 3 · swaps the sides
def fold(norm, linear):
    folded = nn.Linear(linear.out_features, linear.in_features, bias=False)
    with torch.no_grad():
        folded.weight.copy_((linear.weight * (1 + norm.weight)).T)
    return folded


# %% 3 · returns a tensor
def fold(norm, linear):
    return linear.weight * (1 + norm.weight)


# %% 3 · shares its weight with the given layer
def fold(norm, linear):
    folded = nn.Linear(linear.in_features, linear.out_features, bias=False)
    folded.weight = linear.weight
    with torch.no_grad():
        folded.weight *= 1 + norm.weight
    return folded


# %% 3 · scales the inputs by the length of the weight
def fold(norm, linear):
    folded = nn.Linear(linear.in_features, linear.out_features, bias=False)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * (1 + norm.weight).norm())
    return folded
