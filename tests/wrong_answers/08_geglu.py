# %% 1 · lets the gate through alone
passes = [6, 0, 0, 6, 0]
# %% 1 · a shut gate changes the sign
passes = [12, -18, 0, -12, 600]
# %% 1 · a gate at 0 is half open
passes = [12, 0, 2.5, -12, 0]
# %% 1 · bends the up value too
passes = [12, 0, 0, 0, 0]
# %% 1 · lets the up value through
passes = [2, 3, 5, -2, -100]
# %% 1 · gives words
passes = ["12", "0", "0", "-12", "0"]


# %% 2 · stacks up first
def merge(layer):
    return torch.cat((layer.up_proj.weight, layer.gate_proj.weight))


def merged_forward(x, gate_up, down):
    up, gate = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.gelu(gate, approximate="tanh") * up, down)


# %% 2 · stacks side by side
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight), dim=1)


def merged_forward(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.gelu(gate, approximate="tanh") * up, down)


# %% 2 · puts up through GELU
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight))


def merged_forward(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(gate * F.gelu(up, approximate="tanh"), down)


# %% 2 · the other GELU
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight))


def merged_forward(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.gelu(gate) * up, down)


# %% 2 · GELU before the cut
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight))


def merged_forward(x, gate_up, down):
    gate, up = F.gelu(F.linear(x, gate_up), approximate="tanh").chunk(2, dim=-1)
    return F.linear(gate * up, down)


# %% 2 · no GELU
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight))


def merged_forward(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(gate * up, down)


# %% 2 · cuts the wrong axis
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight))


def merged_forward(x, gate_up, down):
    gate, up = F.linear(x, gate_up).repeat(1, 2, 1).chunk(2, dim=1)
    return (gate * up)[..., : x.shape[-1]]


# %% 2 · forgets down
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight))


def merged_forward(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


# %% 2 · cuts the weight and makes three products
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight))


def merged_forward(x, gate_up, down):
    gate, up = gate_up.chunk(2)
    return F.linear(F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T), down)


# %% 2 · takes every other channel for the gate
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight))


def merged_forward(x, gate_up, down):
    both = F.linear(x, gate_up)
    return F.linear(F.gelu(both[..., ::2], approximate="tanh") * both[..., 1::2], down)


# %% 2 · weaves the rows
def merge(layer):
    return torch.stack((layer.gate_proj.weight, layer.up_proj.weight), dim=1).flatten(0, 1)


def merged_forward(x, gate_up, down):
    both = F.linear(x, gate_up)
    return F.linear(F.gelu(both[..., ::2], approximate="tanh") * both[..., 1::2], down)


# %% 3 · one neuron is enough
def multiplier():
    return torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.0, 1], [0, 0]]), torch.ones(1, 2)


# %% 3 · adds the halves instead of subtracting
def multiplier():
    gate = torch.tensor([[1.0, 0], [-1, 0]])
    up = torch.tensor([[0.0, 1], [0, 1]])
    return gate, up, torch.ones(1, 2)


# %% 3 · negates twice
def multiplier():
    gate = torch.tensor([[1.0, 0], [-1, 0]])
    up = torch.tensor([[0.0, 1], [0, -1]])
    return gate, up, torch.tensor([[1.0, -1]])


# %% 3 · a gate for each number
def multiplier():
    return torch.eye(2), torch.tensor([[0.0, 1], [1, 0]]), torch.full((1, 2), 0.5)


# %% 3 · the square of the sum
def multiplier():
    gate = torch.tensor([[1.0, 1], [-1, -1]])
    return gate, gate.clone(), torch.tensor([[0.25, -0.25]])


# %% 3 · down is a column
def multiplier():
    gate = torch.tensor([[1.0, 0], [-1, 0]])
    return gate, torch.tensor([[0.0, 1], [0, 1]]), torch.tensor([[1.0], [-1]])


# %% 3 · lists
def multiplier():
    return [[1, 0], [-1, 0]], [[0, 1], [0, 1]], [[1, -1]]
