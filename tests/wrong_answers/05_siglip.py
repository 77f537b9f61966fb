# %% 1 · every weight grows with the picture
answer = 4 * 412_442_352
# %% 1 · nothing changes
answer = 412_442_352
# %% 1 · forgets the 256 positions that are there
answer = 412_442_352 + 1024 * 1152
# %% 1 · twice the side, twice the patches
answer = 412_442_352 + 256 * 1152
# %% 1 · counts the rows and not their width
answer = 412_442_352 + 768
# %% 1 · four times the positions, added
answer = 412_442_352 + 4 * 256 * 1152
# %% 1 · counts (448 - 224) / 14 rows
answer = 412_442_352 + 16 * 1152
# %% 1 · a float
answer = 0.4e9


# %% 2 · does not add the MLP
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return mlp(norm(x, "layer_norm2"))


# %% 2 · adds nothing
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = attend(norm(x, "layer_norm1"))
    return mlp(norm(x, "layer_norm2"))


# %% 2 · attention only
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    return x + attend(norm(x, "layer_norm1"))


# %% 2 · normalises the stream itself
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = norm(x, "layer_norm1")
    x = x + attend(x)
    x = norm(x, "layer_norm2")
    return x + mlp(x)


# %% 2 · post-norm
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = norm(x + attend(x), "layer_norm1")
    return norm(x + mlp(x), "layer_norm2")


# %% 2 · both branches read the same stream
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    return x + attend(norm(x, "layer_norm1")) + mlp(norm(x, "layer_norm2"))


# %% 2 · forgets the first norm
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(x)
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · swaps the norms
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm2"))
    return x + mlp(norm(x, "layer_norm1"))


# %% 2 · takes the exact GELU
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · takes a relu
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.relu(h) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · std divides by D - 1
def block_by_hand(x, w, attend):
    def norm(x, name):
        x = (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · does not take the mean out
def block_by_hand(x, w, attend):
    def norm(x, name):
        size = (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return x / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · normalises each channel over the patches
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=0, keepdim=True)
        size = (centred.square().mean(dim=0, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · normalises over everything
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean()
        size = (centred.square().mean() + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · forgets weight and bias of the norms
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · forgets the bias of the norms
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · PyTorch's own epsilon
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · epsilon outside the root
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True)).sqrt() + 1e-6
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 2 · forgets a bias of the MLP
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = x @ w["mlp.fc1.weight"].T
        return F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    return x + mlp(norm(x, "layer_norm2"))


# %% 3 · the honest layer
class SneakyLayer(SiglipEncoderLayer):
    pass


# %% 3 · post-norm
class SneakyLayer(SiglipEncoderLayer):
    def forward(self, x):
        x = self.layer_norm1(x + self.self_attn(x))
        return self.layer_norm2(x + self.mlp(x))


# %% 3 · another GELU
class SneakyLayer(SiglipEncoderLayer):
    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x))))


# %% 3 · another epsilon
class SneakyLayer(SiglipEncoderLayer):
    def forward(self, x):
        self.layer_norm1.eps = 1.1e-6
        return super().forward(x)


# %% 3 · forgets to return
class SneakyLayer(SiglipEncoderLayer):
    def forward(self, x):
        x = x + self.self_attn(self.layer_norm2(x))
        x = x + self.mlp(self.layer_norm1(x))


# %% 3 · leaves the MLP out
class SneakyLayer(SiglipEncoderLayer):
    def forward(self, x):
        return x + self.self_attn(self.layer_norm1(x))


# %% 3 · changes the parameters
class SneakyLayer(SiglipEncoderLayer):
    def __init__(self, config):
        super().__init__(config)
        self.layer_norm2 = nn.Identity()


# %% 3 · forgets the MLP's biases
class SneakyLayer(SiglipEncoderLayer):
    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        h = F.gelu(self.layer_norm2(x) @ self.mlp.fc1.weight.T, approximate="tanh")
        return x + h @ self.mlp.fc2.weight.T


# %% 3 · both halves read the same stream
class SneakyLayer(SiglipEncoderLayer):
    def forward(self, x):
        return x + self.mlp(self.layer_norm2(x)) + self.self_attn(self.layer_norm1(x))


# %% 2 · attention reads the stream and the norm comes behind it
def block_by_hand(x, w, attend):
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x):
        h = F.gelu(x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"], approximate="tanh")
        return h @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    x = x + norm(attend(x), "layer_norm1")
    return x + norm(mlp(x), "layer_norm2")
