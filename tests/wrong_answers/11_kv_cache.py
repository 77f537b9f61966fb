# %% 1 · thinks that every key knows the last token
letters = "abcd"
# %% 1 · thinks that the mask decides in layer 0 too
letters = "cd"
# %% 1 · thinks that a causal layer 1 changes
letters = "bd"
# %% 1 · thinks that a key is made of its own token in all layers
letters = "c"
# %% 1 · mixes the layers up
letters = "a"
# %% 1 · thinks that nothing changes
letters = ""
# %% 1 · answers with a list
letters = ["d"]
# %% 1 · answers in words
letters = "layer 1"


# %% 2 · grows by cat
class DoublingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.kept[layer_idx] = k, v
        return k, v


# %% 2 · takes a huge room at once
class DoublingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        if layer_idx not in self.kept:
            room = k.new_empty(k.shape[0], k.shape[1], 4096, k.shape[3])
            self.kept[layer_idx] = [room, room.clone(), 0]
        keys, values, start = self.kept[layer_idx]
        end = start + k.shape[2]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.kept[layer_idx][2] = end
        return keys[:, :, :end], values[:, :, :end]


# %% 2 · doubles once only, ten tokens do not fit
class DoublingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        if layer_idx not in self.kept:
            room = k.new_empty(k.shape[0], k.shape[1], 4, k.shape[3])
            self.kept[layer_idx] = [room, room.clone(), 0]
        keys, values, start = self.kept[layer_idx]
        end = start + k.shape[2]
        if end > keys.shape[2]:
            size = keys.shape[2] + 1
            new = [k.new_empty(k.shape[0], k.shape[1], size, k.shape[3]) for _ in range(2)]
            new[0][:, :, :start], new[1][:, :, :start] = keys[:, :, :start], values[:, :, :start]
            keys, values = new
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.kept[layer_idx] = [keys, values, end]
        return keys[:, :, :end], values[:, :, :end]


# %% 2 · forgets to copy the old tokens
class DoublingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        size = 4
        if layer_idx in self.kept:
            keys, values, start = self.kept[layer_idx]
        else:
            keys, values, start = k.new_zeros(2, 3, 4, 8), v.new_zeros(2, 3, 4, 8), 0
        end = start + k.shape[2]
        if end > keys.shape[2]:
            size = 2 * keys.shape[2]
            keys, values = k.new_zeros(2, 3, size, 8), v.new_zeros(2, 3, size, 8)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.kept[layer_idx] = keys, values, end
        return keys[:, :, :end], values[:, :, :end]


# %% 2 · returns the whole room
class DoublingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        if layer_idx not in self.kept:
            room = k.new_zeros(k.shape[0], k.shape[1], 4, k.shape[3])
            self.kept[layer_idx] = [room, room.clone(), 0]
        keys, values, start = self.kept[layer_idx]
        end = start + k.shape[2]
        while end > keys.shape[2]:
            keys, values = torch.cat((keys, keys), dim=2), torch.cat((values, values), dim=2)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.kept[layer_idx] = [keys, values, end]
        return keys, values


# %% 2 · one room for all layers
class DoublingCache:
    def __init__(self):
        self.keys = self.values = None
        self.filled = 0

    def update(self, layer_idx, k, v):
        if self.keys is None:
            self.keys = k.new_zeros(k.shape[0], k.shape[1], 4, k.shape[3])
            self.values = self.keys.clone()
        end = self.filled + k.shape[2]
        while end > self.keys.shape[2]:
            self.keys = torch.cat((self.keys, self.keys), dim=2)
            self.values = torch.cat((self.values, self.values), dim=2)
        self.keys[:, :, self.filled : end], self.values[:, :, self.filled : end] = k, v
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]


# %% 2 · forgets the values
class DoublingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        keys, start = self.kept.get(layer_idx, (k.new_zeros(2, 3, 4, 8), 0))
        end = start + k.shape[2]
        while end > keys.shape[2]:
            keys = torch.cat((keys, keys), dim=2)
        keys[:, :, start:end] = k
        self.kept[layer_idx] = keys, end
        return keys[:, :, :end], v


# %% 2 · keeps keys and values in the same room
class DoublingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        if layer_idx not in self.kept:
            room = k.new_zeros(k.shape[0], k.shape[1], 4, k.shape[3])
            self.kept[layer_idx] = [room, room, 0]
        keys, values, start = self.kept[layer_idx]
        end = start + k.shape[2]
        while end > keys.shape[2]:
            keys = values = torch.cat((keys, keys), dim=2)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.kept[layer_idx] = [keys, values, end]
        return keys[:, :, :end], values[:, :, :end]


# %% 2 · doubles the wrong axis
class DoublingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        if layer_idx not in self.kept:
            room = k.new_zeros(k.shape[0], k.shape[1], 4, k.shape[3])
            self.kept[layer_idx] = [room, room.clone(), 0]
        keys, values, start = self.kept[layer_idx]
        end = start + k.shape[2]
        if end > keys.shape[2]:
            keys, values = torch.cat((keys, keys), dim=1), torch.cat((values, values), dim=1)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.kept[layer_idx] = [keys, values, end]
        return keys[:, :, :end], values[:, :, :end]


# %% 2 · returns copies instead of views
class DoublingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        if layer_idx not in self.kept:
            room = k.new_zeros(k.shape[0], k.shape[1], 4, k.shape[3])
            self.kept[layer_idx] = [room, room.clone(), 0]
        keys, values, start = self.kept[layer_idx]
        end = start + k.shape[2]
        while end > keys.shape[2]:
            keys, values = torch.cat((keys, keys), dim=2), torch.cat((values, values), dim=2)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.kept[layer_idx] = [keys, values, end]
        return keys[:, :, :end].clone(), values[:, :, :end].clone()


# %% 2 · makes room for exactly what is needed
class DoublingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        empty = k[:, :, :0]
        keys, values = self.kept.get(layer_idx, (empty, empty))
        end = keys.shape[2] + k.shape[2]
        larger = [k.new_empty(k.shape[0], k.shape[1], end, k.shape[3]) for _ in range(2)]
        for new, old, given in zip(larger, (keys, values), (k, v)):
            new[:, :, : old.shape[2]], new[:, :, old.shape[2] :] = old, given
        self.kept[layer_idx] = tuple(larger)
        return tuple(larger)


# %% 3 · rewinds one layer only
class RewindableCache(KVCache):
    def rewind(self, length):
        if not 0 <= length <= len(self):
            raise ValueError("no")
        self._lengths[0] = length


# %% 3 · raises nothing
class RewindableCache(KVCache):
    def rewind(self, length):
        self._lengths = [length] * len(self._lengths)


# %% 3 · forgets the negative
class RewindableCache(KVCache):
    def rewind(self, length):
        if length > len(self):
            raise ValueError("no")
        self._lengths = [length] * len(self._lengths)


# %% 3 · takes the number of tokens to forget
class RewindableCache(KVCache):
    def rewind(self, length):
        if not 0 <= length <= len(self):
            raise ValueError("no")
        self._lengths = [n - length for n in self._lengths]


# %% 3 · cuts the tensors
class RewindableCache(KVCache):
    def rewind(self, length):
        if not 0 <= length <= len(self):
            raise ValueError("no")
        self.keys = [t[:, :, :length] for t in self.keys]
        self.values = [t[:, :, :length] for t in self.values]
        self._lengths = [length] * len(self._lengths)


# %% 3 · copies into new rooms
class RewindableCache(KVCache):
    def rewind(self, length):
        if not 0 <= length <= len(self):
            raise ValueError("no")
        self.keys = [t.clone() for t in self.keys]
        self.values = [t.clone() for t in self.values]
        self._lengths = [length] * len(self._lengths)


# %% 3 · refuses what is allowed
class RewindableCache(KVCache):
    def rewind(self, length):
        if not 0 < length < len(self):
            raise ValueError("no")
        self._lengths = [length] * len(self._lengths)


# %% 3 · clears what is to be kept
class RewindableCache(KVCache):
    def rewind(self, length):
        if not 0 <= length <= len(self):
            raise ValueError("no")
        for t in (*self.keys, *self.values):
            t[:, :, :length] = 0
        self._lengths = [length] * len(self._lengths)


# %% 3 · only says so
class RewindableCache(KVCache):
    def rewind(self, length):
        if not 0 <= length <= len(self):
            raise ValueError("no")
        self.shown = length

    def __len__(self):
        return getattr(self, "shown", min(self._lengths))
