# %% 1 · forgets that it sees itself
answer = (319, 0)
# %% 1 · counts one too many
answer = (321, 0)
# %% 1 · forgets the question
answer = (300, 0)
# %% 1 · gives what is visible
answer = (3776, 0)
# %% 1 · thinks that both layers are local
answer = (320, 320)
# %% 1 · swaps the layers
answer = (0, 320)
# %% 1 · thinks that the picture stays whole
answer = (0, 0)
# %% 1 · gives one number
answer = 320
# %% 1 · gives a share
answer = (0.078, 0)


# %% 2 · never forgets
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.kept[layer_idx] = k, v
        return k, v


# %% 2 · returns the cut tensors
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        if layer_idx % 2 == 0:
            k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        self.kept[layer_idx] = k, v
        return k, v


# %% 2 · forgets in all layers
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.kept[layer_idx] = k[:, :, -self.window :], v[:, :, -self.window :]
        return k, v


# %% 2 · forgets in the odd layers
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        keep = slice(-self.window, None) if layer_idx % 2 else slice(None)
        self.kept[layer_idx] = k[:, :, keep], v[:, :, keep]
        return k, v


# %% 2 · keeps the first tokens
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        keep = slice(None) if layer_idx % 2 else slice(self.window)
        self.kept[layer_idx] = k[:, :, keep], v[:, :, keep]
        return k, v


# %% 2 · keeps one too few
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        keep = slice(None) if layer_idx % 2 else slice(1 - self.window, None)
        self.kept[layer_idx] = k[:, :, keep], v[:, :, keep]
        return k, v


# %% 2 · cuts the keys only
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        keep = slice(None) if layer_idx % 2 else slice(-self.window, None)
        self.kept[layer_idx] = k[:, :, keep], v
        return k, v


# %% 2 · mixes the layers
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, None

    def update(self, layer_idx, k, v):
        if self.kept:
            k, v = torch.cat((self.kept[0], k), dim=2), torch.cat((self.kept[1], v), dim=2)
        keep = slice(None) if layer_idx % 2 else slice(-self.window, None)
        self.kept = k[:, :, keep], v[:, :, keep]
        return k, v


# %% 2 · joins along the channels
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=-1), torch.cat((old_v, v), dim=-1)
        self.kept[layer_idx] = k, v
        return k, v


# %% 2 · cuts what was kept, not what is kept
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            if layer_idx % 2 == 0:
                old_k, old_v = old_k[:, :, -self.window :], old_v[:, :, -self.window :]
                old_k, old_v = old_k[:, :, k.shape[2] :], old_v[:, :, v.shape[2] :]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.kept[layer_idx] = k, v
        return k, v


# %% 2 · puts the new tokens first
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((k, old_k), dim=2), torch.cat((v, old_v), dim=2)
        keep = slice(None) if layer_idx % 2 else slice(self.window)
        self.kept[layer_idx] = k[:, :, keep], v[:, :, keep]
        return k, v


# %% 3 · ordinary scores
scores = [1.0, 2.0, 3.0, 4.0]
# %% 3 · makes the hidden key loud
scores = [0.0, 0.0, 0.0, 1000.0]
# %% 3 · one visible key stays high
scores = [-500.0, -500.0, 0.0, 0.0]
# %% 3 · low, but not low enough
scores = [-50.0, -50.0, -50.0, 0.0]
# %% 3 · thinks that high scores do it
scores = [500.0, 500.0, 500.0, 0.0]
# %% 3 · uses infinity
scores = [float("-inf")] * 4
# %% 3 · gives three scores
scores = [-500.0, -600.0, -700.0]
# %% 3 · gives a word
scores = "-500"
# %% 3 · equal and low, but the cap does not press them together
scores = [-1.0, -1.0, -1.0, 0.0]
# %% 3 · two of three are low enough
scores = [-500.0, -600.0, -50.0, 0.0]
